"""What a model that sees or hears is tried with: for each kind it takes, two prompts that differ in the media alone.

The media are made here, by a seed, and made ready by the model's own processor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serve.errors import LatheError
from serve.media.content import Clip, Content, Picture, Sound
from serve.media.processor import MediaProcessor, load_processor
from serve.model.loading import LoadedModel
from serve.model.prompt import MediaKind, Prompt

SIDE = 112
"""Of pictures and frames, in pixels."""
FRAMES, FPS = 4, 2.0
SOUND_S, RATE = 1.0, 16000

Shown = tuple[Prompt, Prompt] | LatheError
"""The two prompts, or why there are none."""


def shown_to(model: LoadedModel, before: Sequence[int], after: Sequence[int]) -> dict[MediaKind, Shown]:
    """By kind, in the order of their names; nothing for a text model.

    before, after  tokens around the media
    """
    if model.vision is None:
        return {}
    try:
        processor = MediaProcessor(model.path, load_processor(model.path), model.vision)
    except LatheError as error:
        return dict.fromkeys(sorted(model.vision.kinds), error)
    return {kind: _prompts(processor, model, kind, before, after) for kind in sorted(processor.kinds)}


def _prompts(
    processor: MediaProcessor,
    model: LoadedModel,
    kind: MediaKind,
    before: Sequence[int],
    after: Sequence[int],
) -> Shown:
    made = []
    try:
        for seed in (1, 2):
            one = processor.process(_content(kind, seed))
            places = model.tokenizer.encode(one.expansion.text, add_special_tokens=False)
            made.append(processor.prompt((*before, *places, *after), [one]))
    except LatheError as error:
        return error
    first, second = made
    return first, second


def _content(kind: MediaKind, seed: int) -> Content:
    rng = np.random.default_rng(seed)
    if kind == "audio":
        return Sound(rng.uniform(-1, 1, int(SOUND_S * RATE)).astype(np.float32), RATE)
    frames = tuple(
        Picture(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(SIDE // 4, 0).repeat(SIDE // 4, 1))
        for _ in range(FRAMES if kind == "video" else 1)
    )
    return Clip(frames, tuple(number / FPS for number in range(FRAMES))) if kind == "video" else frames[0]
