"""Lengths -> batches of several documents a row (`sample_packing`), and documents -> packed arrays.

A batch holds at most batch_size × max_seq_length tokens, in rows about as long as its longest document: a token's
attention costs as much as its row is long, so short documents stand in many short rows and only the gaps behind
longer ones are filled with shorter ones. An epoch is shuffled and cut into windows; in each, documents go
longest first into the first row with room (first-fit decreasing), and the batches are shuffled. Each document
stands in each epoch once, whole. Everything follows from (lengths, batch size, row length, seed) and the index.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from train.data.batches import WINDOW_BATCHES, Batch
from train.data.row_media import Standing, media_array
from train.data.tokens import TokenizedExample

SHORT_ROW = 256
"""Up to here attention is a small part of the work, and rows may be longer than their longest document."""
EVEN_WIDTH = 1000
"""Rows of this width spend as much time in attention as in everything else: measured with D = 512 on a CPU (2,048
tokens in rows of 64, 512, 2,048 took 4.4, 7.0, 12.4 s); more in wider models."""


@dataclass(frozen=True)
class Layout:
    """Which document stands where in one batch.

    width  tokens a row
    rows   document ids of each row, in order
    """

    width: int
    rows: tuple[tuple[int, ...], ...]

    @property
    def num_positions(self) -> int:
        return self.width * len(self.rows)

    @property
    def work(self) -> float:
        """Estimated time of a forward, in positions of a row without attention."""
        return self.num_positions * (1 + self.width / EVEN_WIDTH)


class PackedPlan:
    """Which documents make batch k of a run, and where they stand, for any k >= 0; asking changes nothing."""

    def __init__(self, lengths: Sequence[int], batch_size: int, row_length: int, seed: int) -> None:
        assert len(lengths) > 0
        assert batch_size > 0
        assert max(lengths) <= row_length, "a document is cut to the row's length before"
        self.batch_size = batch_size
        self.seed = seed
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._row_length = row_length
        self._capacity = batch_size * row_length
        self._starts = [0]
        """First batch of each epoch known so far, and of the one after."""
        self._made: tuple[int, list[Layout]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Of the first epoch; others may differ by a few, for other documents meet in a window."""
        return self._start(1)

    def num_batches(self, epochs: float) -> int:
        """Batches of so many passes over the documents."""
        whole, part = int(epochs), epochs - int(epochs)
        return self._start(whole) + math.ceil(part * (self._start(whole + 1) - self._start(whole)))

    def epoch(self, index: int) -> int:
        """The epoch batch `index` stands in, from 0."""
        while self._starts[-1] <= index:
            self._start(len(self._starts))
        return bisect_right(self._starts, index) - 1

    def layout(self, index: int) -> Layout:
        """Batch `index`, counted from the start of the run across epochs."""
        epoch = self.epoch(index)
        return self._layouts(epoch)[index - self._starts[epoch]]

    def rows(self, index: int) -> tuple[int, ...]:
        """Document ids of batch `index`."""
        return tuple(document for row in self.layout(index).rows for document in row)

    def batch(self, rows: Sequence[TokenizedExample], index: int) -> Batch:
        """Batch `index` of these rows, as arrays."""
        return collate_packed(rows, self.layout(index))

    @property
    def padding_share(self) -> float:
        """Padded positions over all positions of the first epoch."""
        positions = sum(layout.num_positions for layout in self._layouts(0))
        return 1.0 - int(self._lengths.sum()) / positions

    @property
    def largest(self) -> Layout:
        """The batch of the first epoch that takes the most work: what memory has to suffice for."""
        return max(self._layouts(0), key=lambda layout: layout.work)

    def _start(self, epoch: int) -> int:
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + len(self._layouts(len(self._starts) - 1)))
        return self._starts[epoch]

    def _layouts(self, epoch: int) -> list[Layout]:
        if self._made is None or self._made[0] != epoch:
            self._made = (epoch, self._pack(epoch))
        return self._made[1]

    def _pack(self, epoch: int) -> list[Layout]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self._lengths))
        window = np.cumsum(self._lengths[order]) // (self._capacity * WINDOW_BATCHES)
        pool = _Pool()
        layouts: list[Layout] = []
        for documents in np.split(order, np.flatnonzero(np.diff(window)) + 1):
            pool.add(documents.tolist(), self._lengths[documents].tolist())
            # What would leave a batch short waits for the next window: one short batch an epoch, not one a window.
            while pool.num_tokens >= self._capacity:
                layouts.append(self._next(pool))
        while pool.num_tokens:
            layouts.append(self._next(pool))
        return [layouts[place] for place in rng.permutation(len(layouts))]

    def _next(self, pool: _Pool) -> Layout:
        """The next batch, taken out of the pool; of the widths worth trying, the one with the least work a token."""
        widths = row_widths(pool.longest, self._row_length)
        if len(widths) > 1:
            tried = []
            for width in widths:
                before = pool.num_tokens
                layout = self._fill(pool, width)
                tried.append(layout.work / (before - pool.num_tokens))
                pool.put_back(layout, self._lengths)
            widths = [widths[int(np.argmin(tried))]]
        return self._fill(pool, widths[0])

    def _fill(self, pool: _Pool, width: int) -> Layout:
        rows: list[tuple[int, ...]] = []
        while pool.num_tokens and (len(rows) + 1) * width <= self._capacity:
            room = width
            row: list[int] = []
            while (taken := pool.take(room)) is not None:
                document, length = taken
                row.append(document)
                room -= length
            rows.append(tuple(row))
        return Layout(width, tuple(rows))


class _Pool:
    """Documents by length; takes the longest that fits. Of equal ones, the one added last."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._by_length: dict[int, list[int]] = {}
        self._lengths: list[int] = []  # those there are, ascending

    @property
    def longest(self) -> int:
        return self._lengths[-1]

    def add(self, documents: Iterable[int], lengths: Iterable[int]) -> None:
        for document, length in zip(documents, lengths, strict=True):
            self._by_length.setdefault(length, []).append(document)
            self.num_tokens += length
        self._lengths = sorted(self._by_length)

    def put_back(self, layout: Layout, lengths: np.ndarray) -> None:
        """Undo the takes of a layout; documents of the same length may change places."""
        taken = [document for row in layout.rows for document in row]
        self.add(taken, lengths[taken].tolist())

    def take(self, room: int) -> tuple[int, int] | None:
        """(document, its length), or None where none is short enough."""
        place = bisect_right(self._lengths, room) - 1
        if place < 0:
            return None
        length = self._lengths[place]
        documents = self._by_length[length]
        document = documents.pop()
        if not documents:
            del self._by_length[length], self._lengths[place]
        self.num_tokens -= length
        return document, length


def row_widths(longest: int, row_length: int, pad_to: int = 8) -> list[int]:
    """Widths worth trying for rows whose longest document is `longest`; multiples of `pad_to` up to `row_length`.

    Rows of the longest document's length, and of its multiples while they are short. On lognormal lengths, rows of
    twice the longest document would cost a fifth more time than their padding saves, by attention over hidden keys.
    """
    most = max(min(SHORT_ROW // longest, 4), 1)
    widths = {min(-(-longest * times // pad_to) * pad_to, row_length) for times in range(1, most + 1)}
    return sorted(widths)


def collate_packed(rows: Sequence[TokenizedExample], layout: Layout) -> Batch:
    """The documents of a layout as one batch; it has segments only if any two documents share a row.

    A document's first token is no target: nothing stands before it.
    """
    shape = (len(layout.rows), layout.width)
    tokens, is_target = np.zeros(shape, np.int32), np.zeros(shape, bool)
    segments = np.full(shape, -1, np.int32)
    standing: list[list[Standing]] = [[] for _ in layout.rows]
    for place, documents in enumerate(layout.rows):
        begin = 0
        for segment, document in enumerate(documents):
            end = begin + len(rows[document])
            tokens[place, begin:end] = rows[document].token_ids
            is_target[place, begin + 1 : end] = rows[document].is_target[1:]
            segments[place, begin:end] = segment
            if (media := rows[document].media) is not None:
                standing[place].append(Standing(begin, end, media))
            begin = end
    row_ids = tuple(document for documents in layout.rows for document in documents)
    return Batch(
        tokens,
        is_target,
        num_targets=int(is_target.sum()),
        num_tokens=int((segments >= 0).sum()),
        row_ids=row_ids,
        # One document a row needs no mask of its own: causal attention never looks right, where its padding is.
        segments=segments if segments.max() > 0 else None,
        media=media_array(standing),
    )
