"""Each family with media through the engine: what mlx-vlm's own code makes of each row alone, in any company.

The table of README is printed by `python tests/serve/test_vlm_families.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image
from vlm_families import FAMILIES, LARGE_VLM_FAMILIES, Reference, Row, chats_of, message, picture

from serve.adapters.version import AdapterVersion
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import Completion, generate
from serve.engine.request import Request, Sampling
from serve.media.content import Clip, Content, Picture, Sound
from serve.media.processor import MediaProcessor, load_processor
from serve.model.loading import LoadedModel, load
from serve.model.prompt import Prompt

NEAR = 1e-3
"""How far logits of the same row may be apart in other shapes, as a share of the largest."""
ANSWER_TOKENS = 8


class Served:
    """One family's model in an engine, beside mlx-vlm's own code over the same folder."""

    def __init__(self, family: str, folder: Path, reference: Reference, **limits: Any) -> None:
        self.family = family
        self.model: LoadedModel = load(str(folder), name=family)
        assert self.model.vision is not None
        self.processor = MediaProcessor(folder, load_processor(folder), self.model.vision)
        self.reference = reference
        self.engine = Engine(self.model, EngineLimits(**limits))

    def prompt(self, row: Row, chat: Sequence[Mapping[str, Any]]) -> Prompt:
        """A chat as mlx-vlm's processor tokenized it, each of its media processed alone."""
        processed = [self.processor.process(content) for content in contents_of(chat)]
        return self.processor.prompt(row.token_ids, processed)

    def request(
        self,
        name: str,
        prompt: Prompt,
        adapter: AdapterVersion | None = None,
        max_tokens: int = ANSWER_TOKENS,
    ) -> Request:
        """Greedy, to the last token."""
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, num_logprobs=0)
        return Request(name, prompt, sampling, adapter)


def contents_of(chat: Sequence[Mapping[str, Any]]) -> Iterator[Content]:
    """The media of a chat as users' media are decoded."""
    for part in (part for turn in chat for part in turn["content"]):
        if part["type"] == "image":
            yield Picture(np.asarray(part["image"]))
        elif part["type"] == "video":
            frames = part["video"].transpose(0, 2, 3, 1)
            yield Clip(tuple(map(Picture, frames)), tuple(i / 2 for i in range(len(frames))))
        elif part["type"] == "audio":
            yield Sound(part["audio"], 16_000)


def assert_is(answer: Completion, row: Row, reference: Reference) -> None:
    """Every token is the likeliest in mlx-vlm's own code after those before it, and as likely there."""
    logits = np.array(reference.logits(row, answer.token_ids[:-1]), np.float64)
    near = NEAR * np.abs(logits).max()
    drawn = logits[np.arange(len(logits)), list(answer.token_ids)]
    assert (logits.max(-1) - drawn < near).all()
    peak = logits.max(-1)
    expected = drawn - peak - np.log(np.exp(logits - peak[:, None]).sum(-1))
    np.testing.assert_allclose([each.logprob for each in answer.logprobs], expected, atol=near)


def rows_are_mlx_vlms(served: Served) -> str:
    """Each kind of row alone: tokens and their log-probabilities."""
    for name, chat in chats_of(served.family).items():
        row = served.reference.row(chat)
        (answer,) = generate(served.engine, [served.request(name, served.prompt(row, chat))])
        assert_is(answer, row, served.reference)
    return ", ".join(chats_of(served.family))


COLUMNS: dict[str, Callable[[Served], str]] = {
    "same logits as mlx-vlm": rows_are_mlx_vlms,
}


@pytest.fixture(scope="module")
def served_of(vlm_folder, vlm_reference) -> Callable[[str], Served]:
    made: dict[str, Served] = {}

    def get(family: str) -> Served:
        if family not in made:
            made[family] = Served(family, vlm_folder(family), vlm_reference(family))
        return made[family]

    return get


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
@pytest.mark.parametrize("column", COLUMNS)
def test_every_family(column, family, served_of):
    COLUMNS[column](served_of(family))
