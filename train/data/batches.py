"""Lengths -> a fixed order of batches, and rows -> padded arrays. By true length, without any global randomness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from train.data.tokens import TokenizedExample


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, padded on the right.

    tokens     [B, T] int32, padded with 0
    is_target  [B, T] bool, token (b, t) is predicted from tokens (b, <t) and counts
    """

    tokens: np.ndarray
    is_target: np.ndarray
    num_targets: int
    num_tokens: int
    row_ids: tuple[int, ...]


class BatchPlan:
    """Which rows make batch k of a run, for any k, from (lengths, batch_size, seed) alone."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pad_to: int = 8) -> None:
        raise NotImplementedError

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which each row stands once; the last short one counts."""
        raise NotImplementedError

    def rows(self, index: int) -> tuple[int, ...]:
        """Row ids of batch `index`, counted from the start of the run across epochs."""
        raise NotImplementedError

    def epoch(self, index: int) -> int:
        """The epoch batch `index` stands in, from 0."""
        raise NotImplementedError

    @property
    def padding_share(self) -> float:
        """Padded positions over all positions of an epoch."""
        raise NotImplementedError


def collate(rows: Sequence[TokenizedExample], row_ids: Sequence[int], pad_to: int = 8) -> Batch:
    """Rows `row_ids` of `rows` as one padded batch."""
    raise NotImplementedError


def validation_rows(lengths: Sequence[int], batch_size: int, num_batches: int) -> list[tuple[int, ...]]:
    """Batches of a validation, the same each time: rows evenly spaced over the sorted lengths; -1 is all rows."""
    raise NotImplementedError
