"""Lengths -> a fixed order of batches, and rows -> padded arrays. By true length, without any global randomness.

An epoch is shuffled, cut into windows, sorted by padded length inside each window, cut into batches, and the
batches are shuffled. Epoch and batch follow from (lengths, batch size, seed) alone, so a run resumes at any index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from train.data.row_media import Standing, media_array
from train.data.tokens import TokenizedExample

WINDOW_BATCHES = 128
"""Batches in a window: more pads less, fewer mixes more. 128 leaves about 5 % padding on lognormal lengths."""


@dataclass(frozen=True)
class Batch:
    """Rows of one forward pass, padded on the right.

    tokens      [B, T] int32, padded with 0; T - 1, what a forward reads, is a multiple of `pad_to`
    is_target   [B, T] bool, token (b, t) is predicted from tokens (b, <t) and counts
    row_ids     of the examples; n preference pairs make B = 2n rows, chosen answers first, then the rejected ones
    segments    [B, T] int32, packed rows: the document of each token, -1 for padding; None: one document a row
    labels      [B] bool, whether an answer is wanted (unpaired feedback)
    advantages  [B] float32, how much better than its group an answer was (group-relative policy optimization)
    media       [B] of tuples of Standing, what each row shows; None: none shows anything
    """

    tokens: np.ndarray
    is_target: np.ndarray
    num_targets: int
    num_tokens: int
    row_ids: tuple[int, ...]
    segments: np.ndarray | None = None
    labels: np.ndarray | None = None
    advantages: np.ndarray | None = None
    media: np.ndarray | None = None


class Plan(Protocol):
    """Which rows make which batch; `BatchPlan`, or `train.data.packing.PackedPlan`. Asking changes nothing."""

    @property
    def batches_per_epoch(self) -> int: ...

    @property
    def padding_share(self) -> float: ...

    def num_batches(self, epochs: float) -> int: ...

    def epoch(self, index: int) -> int: ...

    def rows(self, index: int) -> tuple[int, ...]: ...

    def batch(self, rows: Sequence[TokenizedExample], index: int) -> Batch: ...


class BatchPlan:
    """Which rows make batch k of a run, for any k >= 0; asking changes nothing."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pad_to: int = 8) -> None:
        assert len(lengths) > 0
        assert batch_size > 0
        self.batch_size = batch_size
        self.seed = seed
        self.pad_to = pad_to
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._padded = padded_length(self._lengths, pad_to)
        self._epoch_made: tuple[int, list[tuple[int, ...]]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which each row stands once; the last short one counts."""
        return -(-len(self._lengths) // self.batch_size)

    def num_batches(self, epochs: float) -> int:
        """Batches of so many passes over the rows."""
        return math.ceil(epochs * self.batches_per_epoch)

    def epoch(self, index: int) -> int:
        """The epoch batch `index` stands in, from 0."""
        return index // self.batches_per_epoch

    def rows(self, index: int) -> tuple[int, ...]:
        """Row ids of batch `index`, counted from the start of the run across epochs."""
        epoch, place = divmod(index, self.batches_per_epoch)
        if self._epoch_made is None or self._epoch_made[0] != epoch:
            self._epoch_made = (epoch, self._batches(epoch))
        return self._epoch_made[1][place]

    def batch(self, rows: Sequence[TokenizedExample], index: int) -> Batch:
        """Batch `index` of these rows, as arrays."""
        return collate(rows, self.rows(index), self.pad_to)

    @property
    def padding_share(self) -> float:
        """Padded positions over all positions of the first epoch."""
        batches = [np.asarray(rows) for rows in self._batches(0)]
        positions = sum(len(rows) * int(self._padded[rows].max()) for rows in batches)
        return 1.0 - int(self._lengths.sum()) / positions

    def _batches(self, epoch: int) -> list[tuple[int, ...]]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self._lengths))
        window = self.batch_size * WINDOW_BATCHES
        batches: list[tuple[int, ...]] = []
        for begin in range(0, len(order), window):
            rows = order[begin : begin + window]
            # Rows that pad to the same length keep their shuffled order: variety that costs no padding.
            rows = rows[np.argsort(self._padded[rows], kind="stable")]
            cuts = range(0, len(rows), self.batch_size)
            batches += [tuple(rows[cut : cut + self.batch_size].tolist()) for cut in cuts]
        return [batches[place] for place in rng.permutation(len(batches))]


def padded_length(lengths: np.ndarray, pad_to: int) -> np.ndarray:
    """Length of a padded row: one more than a multiple of `pad_to`, for a forward reads all tokens but the last."""
    return 1 + -(-(np.maximum(lengths, 2) - 1) // pad_to) * pad_to


def collate(rows: Sequence[TokenizedExample], row_ids: Sequence[int], pad_to: int = 8) -> Batch:
    """Rows `row_ids` of `rows` as one padded batch; pairs as two rows each, unpaired feedback with its labels."""
    examples = [rows[row] for row in row_ids]
    rejected = [example.rejected for example in examples if example.rejected is not None]
    assert len(rejected) in (0, len(examples)), "a batch holds pairs, or none"
    sequences = [*examples, *rejected]
    lengths = np.array([len(sequence) for sequence in sequences])
    shape = (len(sequences), int(padded_length(lengths.max(), pad_to)))
    tokens, is_target = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for place, sequence in enumerate(sequences):
        tokens[place, : lengths[place]] = sequence.token_ids
        is_target[place, : lengths[place]] = sequence.is_target
    labels = [example.label for example in examples if example.label is not None]
    assert len(labels) in (0, len(examples)), "a batch holds labels, or none"
    return Batch(
        tokens,
        is_target,
        int(is_target.sum()),
        int(lengths.sum()),
        tuple(row_ids),
        labels=np.array(labels, bool) if labels else None,
        media=media_array([_standing(sequence) for sequence in sequences]),
    )


def _standing(sequence: TokenizedExample) -> tuple[Standing, ...]:
    return (Standing(0, len(sequence), sequence.media),) if sequence.media is not None else ()


def num_parts(num_rows: int, width: int, max_places: int, *, are_pairs: bool) -> int:
    """In how many forwards a batch of inputs [num_rows, width] runs, each of about `max_places` or less; 0: in one.

    Rows stay whole, and so do the pairs that two of them make.
    """
    units = num_rows // 2 if are_pairs else num_rows
    return max(min(units, -(-num_rows * width // max_places)), 1) if max_places else 1


def validation_rows(lengths: Sequence[int], batch_size: int, num_batches: int) -> list[tuple[int, ...]]:
    """Batches of a validation, the same each time: rows evenly spaced over the sorted lengths; -1 is all rows."""
    by_length = np.argsort(np.asarray(lengths), kind="stable")
    total = len(by_length)
    count = total if num_batches < 0 else min(total, num_batches * batch_size)
    places = ((np.arange(count) + 0.5) * total / max(count, 1)).astype(int)
    chosen = by_length[places].tolist()
    return [tuple(chosen[cut : cut + batch_size]) for cut in range(0, count, batch_size)]
