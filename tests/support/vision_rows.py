"""Prompts with media side by side in this project's own rows, run as an engine would, and what mlx-vlm's processor
makes of the same messages."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import numpy as np
import pytest
from vlm_families import VLM_FAMILIES, Reference, Row, message, picture

from serve.adapters.bank.bank import Bank
from serve.cache.capacity import Bucket
from serve.cache.families import make_rows
from serve.cache.precision import PLAIN
from serve.cache.rows import BatchRows
from serve.cache.spans import Span, SpanPart
from serve.model.loading import LoadedModel
from serve.model.prompt import Media, Prompt
from serve.model.vision import Placed, Vision

BUCKET = Bucket(PLAIN, 256)


def always(*names: str, without: Sequence[str] = (), families: Sequence[str] = VLM_FAMILIES) -> list:
    """For `parametrize`: these families run always, the others under the marker large."""
    chosen = [family for family in families if family not in without]
    assert set(names) <= set(chosen)
    return [pytest.param(each, marks=() if each in names else pytest.mark.large) for each in chosen]


def media_of(reference: Reference, vision: Vision, pictures: Sequence, row: Row) -> tuple[Media, ...]:
    """Each picture processed alone, at the placeholders that are its own among the row's."""
    token = vision.image_token_id
    at = np.flatnonzero(np.array(row.token_ids) == token).astype(np.int32)
    media = []
    for shown in pictures:
        alone = reference.row([message(shown)])
        count = sum(1 for each in alone.token_ids if each == token)
        inputs = {
            name: np.stack([np.array(each) for each in value]) if isinstance(value, list) else np.array(value)
            for name, value in alone.inputs.items()
        }
        key = hashlib.sha256(shown.tobytes() + repr(shown.size).encode()).hexdigest()
        media.append(Media("image", key, at[:count], inputs, num_patches=4 * count))
        at = at[count:]
    assert not len(at), "placeholders of nobody"
    return tuple(media)


def prompt_of(reference: Reference, vision: Vision, *parts: object) -> tuple[Row, Prompt]:
    """A chat message as mlx-vlm's processor has it, and the same as a prompt of pieces."""
    shown = [part for part in parts if not isinstance(part, str)]
    if (
        vision.block_kind == "prompt"
    ):  # mlx-vlm's paligemma puts a picture's features at the start, wherever it is
        text = "".join(part if isinstance(part, str) else "<image>" for part in parts)
        row = reference.row_of_text(text, images=shown) if shown else reference.row_of_text(text)
    else:
        row = reference.row([message(*parts)])
    media = media_of(reference, vision, shown, row)
    prompt = Prompt(
        row.token_ids, media, vision.rope_index(row.token_ids, media), vision.blocks(row.token_ids, media)
    )
    return row, prompt


class Batch:
    """Prompts side by side in rows, run in any chunks, and then token by token."""

    def __init__(
        self,
        model: LoadedModel,
        prompts: Sequence[Prompt],
        bank: Bank | None = None,
        slots: Sequence[int] | None = None,
    ) -> None:
        """slots: each prompt's adapter in the bank, for its media and its tokens."""
        assert model.vision is not None
        self.model, self.vision, self.prompts = model, model.vision, prompts
        self.bank = bank or Bank(model.network)
        self.slots = slots or [0] * len(prompts)
        self.features = []
        for prompt, slot in zip(prompts, self.slots, strict=True):
            self.bank.rows.set([slot])
            self.features.append([self.vision.encode(media) for media in prompt.media])
        self.bank.rows.set([])
        self.rows: BatchRows = make_rows(model.network, prefill_chunk_tokens=64)
        self.rows.prove()
        self.rows.resize({BUCKET: len(prompts)})

    def forward(self, chunks: Sequence[tuple[int, int, int]], tokens: Sequence[Sequence[int]]) -> mx.array:
        """(row, start, stop) in any order, and the tokens of each → logits [B, T, V], behind a row's end garbage."""
        width = max(stop - start for _, start, stop in chunks)
        padded = np.zeros((len(chunks), width), dtype=np.int32)
        positions = np.zeros((3, len(chunks), width), dtype=np.int32)
        placed, blocks = [], []
        for index, ((row, start, stop), own) in enumerate(zip(chunks, tokens, strict=True)):
            prompt = self.prompts[row]
            padded[index, : stop - start] = own
            positions[:, index, : stop - start] = self._positions(prompt, start, stop)
            blocks.append([(a, b) for a, b in prompt.blocks if a < stop and start < b])
            for media, features in zip(prompt.media, self.features[row], strict=True):
                inside = np.flatnonzero((start <= media.positions) & (media.positions < stop))
                if len(inside):
                    part = features.part(int(inside[0]), int(inside[-1]) + 1)
                    placed.append(Placed(index, media.positions[inside] - start, part))
        span = Span(
            [SpanPart(BUCKET, [row], [start], [start == 0]) for row, start, _ in chunks],
            width,
            [row for row, _, _ in chunks],
            len(self.prompts),
            blocks,
        )
        self.rows.set_span(span)
        embeddings, extras = self.vision.inputs(mx.array(padded), placed)
        if self.vision.positions:
            extras["position_ids"] = mx.array(positions)
        self.bank.rows.set([self.slots[row] for row, _, _ in chunks])
        hidden = self.model.network.hidden(mx.array(padded), self.rows.caches, embeddings, extras)
        logits = self.model.network.logits(hidden)
        mx.eval(logits, self.rows.arrays())
        return logits

    @staticmethod
    def _positions(prompt: Prompt, start: int, stop: int) -> np.ndarray:
        own = np.arange(start, stop)
        if prompt.rope is None:
            return own
        return (
            prompt.rope.positions[:, start:stop] if stop <= len(prompt.token_ids) else own + prompt.rope.delta
        )

    def prefill(self, rng: random.Random, *, is_recurrent: bool) -> mx.array:
        """[rows, V] behind each prompt. Chunks of random lengths in a random order, never inside a block."""
        ends = [_cuts(prompt, rng) for prompt in self.prompts]
        last: dict[int, mx.array] = {}
        while any(len(cuts) > 1 for cuts in ends):
            waiting = [row for row, cuts in enumerate(ends) if len(cuts) > 1]
            rng.shuffle(waiting)
            chosen = waiting[:1] if is_recurrent else waiting[: rng.randint(1, len(waiting))]
            chunks = [(row, ends[row][0], ends[row][1]) for row in chosen]
            logits = self.forward(chunks, [self.prompts[row].token_ids[a:b] for row, a, b in chunks])
            for index, (row, start, stop) in enumerate(chunks):
                last[row] = logits[index, stop - start - 1]
                ends[row].pop(0)
        return mx.stack([last[row] for row in range(len(self.prompts))])

    def decode(self, answers: Sequence[Sequence[int]]) -> list[mx.array]:
        """[rows, V] after each token, all rows together."""
        found = []
        for step in range(len(answers[0])):
            starts = [len(prompt.token_ids) + step for prompt in self.prompts]
            chunks = [(row, start, start + 1) for row, start in enumerate(starts)]
            found.append(self.forward(chunks, [[answer[step]] for answer in answers])[:, 0])
        return found


def _cuts(prompt: Prompt, rng: random.Random) -> list[int]:
    length = len(prompt.token_ids)
    allowed = [at for at in range(1, length) if not any(a < at < b for a, b in prompt.blocks)]
    return sorted({0, length, *rng.sample(allowed, min(len(allowed), rng.randint(1, 6)))})


def messages_for(family: str) -> list[tuple]:
    shown = [picture(seed) for seed in range(4)]
    if family == "paligemma":  # one picture, at the start
        return [("tell me a story",), (shown[0], "what is it?"), (shown[1], "and what is this one here?")]
    return [
        ("tell me a story",),
        (shown[0], "what is it?"),
        (shown[1], "then", shown[2], "and", shown[3], "which is the second?"),
    ]


def away(found: mx.array, expected: mx.array) -> float:
    """The largest difference of two rows of logits, as a share of the largest of them."""
    return float((mx.abs(found - expected).max() / mx.abs(expected).max()).item())
