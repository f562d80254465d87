"""Prompts with pictures and clips among random tokens, and what the whole model makes of one alone: one forward over
prompt and answer, no rows, no chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import numpy as np
from vlm_families import FAMILIES, clip, picture

from serve.cache.precision import PLAIN
from serve.engine.request import Request
from serve.media.content import Clip, Content, Picture
from serve.media.processor import MediaProcessor, Processed, load_processor
from serve.model.loading import LoadedModel, load
from serve.model.prompt import Prompt
from serve.model.vision import Placed


def shown(seed: int, width: int = 56, height: int = 56) -> Picture:
    """A picture of coarse random colours."""
    return Picture(np.asarray(picture(seed, width, height)))


def moving(seed: int, num_frames: int = 6) -> Clip:
    """Frames of random colours, two a second; more of them begin with the same."""
    frames = [Picture(np.ascontiguousarray(frame.transpose(1, 2, 0))) for frame in clip(seed, num_frames)]
    return Clip(tuple(frames), tuple(number / 2 for number in range(num_frames)))


def broken(prompt: Prompt, number: int, value: float | None) -> Prompt:
    """One of its pictures holds a number that is none, or has too few of them (None)."""
    media = list(prompt.media)
    inputs = dict(media[number].inputs)
    name = max(inputs, key=lambda each: inputs[each].size)
    pixels = inputs[name].astype(np.float32)
    inputs[name] = pixels[..., :-1] if value is None else np.full_like(pixels, value)
    media[number] = replace(media[number], inputs=inputs, key=f"{media[number].key} broken {value}")
    return replace(prompt, media=tuple(media))


class Eyes:
    """Of one family: makes prompts for its engine."""

    def __init__(self, family: str, folder: Path) -> None:
        model = load(str(folder))
        assert model.vision is not None
        self.kinds = model.vision.kinds
        self._written = {"image": FAMILIES[family].image, "video": FAMILIES[family].video}
        self._tokenizer = model.tokenizer
        self._processor = MediaProcessor(folder, load_processor(folder), model.vision)

    def prompt(self, *parts: Sequence[int] | Content) -> Prompt:
        """Tokens, pictures and clips in this order."""
        token_ids: list[int] = []
        processed: list[Processed] = []
        for part in parts:
            if isinstance(part, (Picture, Clip)):
                item = self._processor.process(part)
                written = str(self._written[part.kind]).replace(item.expansion.marker, item.expansion.text)
                token_ids += self._tokenizer.encode(written, add_special_tokens=False)
                processed.append(item)
            else:
                token_ids += part
        return self._processor.prompt(token_ids, processed)


class Alone:
    """A whole model, perhaps with an adapter merged into its weights, that runs one prompt and its answer at once."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model

    def logits(
        self, request: Request, token_ids: Sequence[int], caches: Sequence[object] | None = None
    ) -> mx.array:
        """[T, V] before each token of an answer.

        caches  objects a layer in place of the family's own; the row is cut where their precision begins
        """
        prompt, network, vision = request.prompt, self.model.network, self.model.vision
        assert vision is not None
        whole = [*prompt.token_ids, *token_ids]
        tokens = mx.array([whole], dtype=mx.int32)
        placed = [Placed(0, media.positions, vision.encode(media)) for media in prompt.media]
        precision = request.precision or PLAIN
        cut = min(0 if caches is None else prompt.whole(precision.start_after), len(whole))
        parts = [
            self._hidden(prompt, tokens, placed, start, stop, caches)
            for start, stop in ((0, cut), (cut, len(whole)))
            if start < stop
        ]
        hidden = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
        logits = network.logits(hidden[:, len(prompt.token_ids) - 1 : -1])
        return logits[0].astype(mx.float32)

    def _hidden(
        self,
        prompt: Prompt,
        tokens: mx.array,
        placed: Sequence[Placed],
        start: int,
        stop: int,
        caches: Sequence[object] | None,
    ) -> mx.array:
        network, vision = self.model.network, self.model.vision
        assert vision is not None
        inside = []
        for one in placed:
            low, high = np.searchsorted(one.columns, (start, stop)).tolist()
            if low < high:
                inside.append(Placed(0, one.columns[low:high] - start, one.features.part(low, high)))
        embeddings, extras = vision.inputs(tokens[:, start:stop], inside)
        if vision.positions:
            length = len(prompt.token_ids)
            own = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), (3, tokens.shape[1])).copy()
            if prompt.rope is not None:
                own[:, :length] = prompt.rope.positions
                own[:, length:] += prompt.rope.delta
            extras["position_ids"] = mx.array(own[:, None, start:stop])
        if vision.block_kind == "picture":
            assert caches is None, "windows and blocks have a cache of their own"
            return self._both_ways(prompt, tokens, embeddings)
        if vision.block_kind == "prompt":
            extras["mask"] = _mask(prompt, tokens.shape[1], None)
        return network.hidden(tokens[:, start:stop], caches, embeddings, extras)

    def _both_ways(self, prompt: Prompt, tokens: mx.array, embeddings: mx.array | None) -> mx.array:
        """gemma3's layers, with the masks that it was trained with: a picture's tokens see one another."""
        backbone = self.model.network.backbone
        if embeddings is None:
            embeddings = self.model.vision.embed(tokens)
        hidden = embeddings * mx.array(backbone.config.hidden_size**0.5, mx.bfloat16).astype(embeddings.dtype)
        for number, layer in enumerate(backbone.layers):
            is_full = number % backbone.sliding_window_pattern == backbone.sliding_window_pattern - 1
            window = None if is_full else backbone.window_size
            hidden = layer(hidden, _mask(prompt, tokens.shape[1], window), None)
        return backbone.norm(hidden)


def _mask(prompt: Prompt, num_tokens: int, window: int | None) -> mx.array:
    """[1, 1, T, T] bool."""
    queries, keys = np.arange(num_tokens)[:, None], np.arange(num_tokens)[None]
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    for start, stop in prompt.blocks:
        mask[start:stop, start:stop] = True
    return mx.array(mask[None, None])
