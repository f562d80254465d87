"""What a forward takes beside tokens, where prompts have media: features at their placeholders, positions, blocks.

The one place beside the runner that builds arrays for a step. A text model has none of it, and rows without media pay
for none of it but positions, which a family that turns keys by three of them is always given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from serve.cache.spans import Blocks, Span
from serve.engine.plan import Chunk, Encode, SequenceState
from serve.model.vision import Features, Placed, Vision


class HeldFeatures(Protocol):
    """Where features are at hand (`serve.engine.features`)."""

    def of(self, sequence: SequenceState, number: int) -> Features:
        """Of a piece that the sequence holds."""


class Inputs(NamedTuple):
    """As `Network.hidden` takes them."""

    embeddings: mx.array | None = None
    extras: dict[str, Any] | None = None


NOTHING = Inputs()


class Sights:
    """Of one model. Lives on the engine's thread."""

    def __init__(self, vision: Vision, features: HeldFeatures) -> None:
        self._vision = vision
        self._features = features

    def encode(self, encode: Encode) -> tuple[Features, mx.array]:
        """Lazy features of a piece, and whether all of them are numbers. Raises whatever the family's code does.

        The bank's rows are its sequence's, where that has a tower of its own, and nobody's otherwise.
        """
        made = self._vision.encode(encode.media)
        # What is kept lies by itself, row after row.
        features = Features(mx.contiguous(made.embeddings), tuple(map(mx.contiguous, made.deepstack)))
        parts = (features.embeddings, *features.deepstack)
        return features, mx.all(mx.stack([mx.all(mx.isfinite(part)) for part in parts]))

    def deltas(self, chunks: Sequence[Chunk]) -> mx.array | None:
        """[B]: how far behind its index each row's next token stands, once its prompt is computed."""
        if not self._vision.positions:
            return None
        ropes = [chunk.sequence.request.prompt.rope for chunk in chunks]
        return mx.array([0 if rope is None else rope.delta for rope in ropes], dtype=mx.int32)

    def decoding(self, span: Span, deltas: mx.array | None) -> Inputs:
        """For a forward of answers' tokens, none of a prompt's: nothing that is not on the device already."""
        if deltas is None:
            return NOTHING
        positions = (span.offset + deltas)[None, :, None]
        if span.num_tokens > 1:
            positions = positions + mx.arange(span.num_tokens, dtype=mx.int32)
        return Inputs(None, {"position_ids": mx.broadcast_to(positions, (3, span.num_rows, span.num_tokens))})

    def prompts(self, tokens: mx.array, chunks: Sequence[Chunk]) -> Inputs:
        """For a forward over tokens [B, T] of prompts."""
        placed = [one for row, chunk in enumerate(chunks) for one in self._placed(row, chunk)]
        embeddings, extras = self._vision.inputs(tokens, placed)
        if self._vision.positions:
            extras["position_ids"] = mx.array(_positions(chunks, tokens.shape[1]))
        return Inputs(embeddings, extras)

    def _placed(self, row: int, chunk: Chunk) -> list[Placed]:
        """What of its media a chunk runs, in order."""
        sequence, start, stop = chunk.sequence, chunk.start, chunk.stop
        placed = []
        for number, media in enumerate(sequence.request.prompt.media):
            low, high = np.searchsorted(media.positions, (start, stop)).tolist()
            if low < high:
                features = self._features.of(sequence, number)
                assert len(features.embeddings) == len(media.positions), "as many features as placeholders"
                placed.append(Placed(row, media.positions[low:high] - start, features.part(low, high)))
        return placed


def blocks_of(chunks: Sequence[Chunk]) -> list[Blocks] | None:
    """[B] the blocks that each row runs; none of them is cut. None where nobody has any."""
    if not any(chunk.sequence.request.prompt.blocks for chunk in chunks):
        return None
    return [
        [(a, b) for a, b in chunk.sequence.request.prompt.blocks if chunk.start < b and a < chunk.stop]
        for chunk in chunks
    ]


def _positions(chunks: Sequence[Chunk], width: int) -> np.ndarray:
    """[3, B, T] int32, 0 on padding."""
    positions = np.zeros((3, len(chunks), width), dtype=np.int32)
    for row, (sequence, start, stop, *_) in enumerate(chunks):
        rope, inside = sequence.request.prompt.rope, min(stop, sequence.num_prompt_tokens)
        positions[:, row, : stop - start] = np.arange(start, stop)
        if rope is not None:
            positions[:, row, : max(inside - start, 0)] = rope.positions[:, start:inside]
            positions[:, row, max(inside - start, 0) : stop - start] += rope.delta
    return positions
