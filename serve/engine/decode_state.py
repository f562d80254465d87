"""What lives as long as a composition of rows does: made when the rows change, and kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from serve.cache.spans import Span
from serve.engine.plan import Chunk
from serve.engine.sampler import Sampler


@dataclass(frozen=True)
class DrawState:
    """Rows that draw a token each: how."""

    slots: list[int]
    """[B] each row's adapter in the bank."""
    sampler: Sampler
    edited: tuple[int, ...]
    """Rows whose logits something changes."""

    @classmethod
    def of(cls, chunks: Sequence[Chunk]) -> DrawState:
        """For these rows, in this order."""
        sequences = [chunk.sequence for chunk in chunks]
        return cls(
            [sequence.slot for sequence in sequences],
            Sampler([sequence.request.sampling for sequence in sequences]),
            tuple(row for row, sequence in enumerate(sequences) if sequence.edit is not None),
        )


@dataclass
class DecodeState:
    """The one-token rows of a composition."""

    composition: int
    """The plan's number of it."""
    draw: DrawState
    span: Span
    """Of the step that was started last."""
    deltas: mx.array | None
    """[B] how far from its index each row's token stands; None where no family asks."""
