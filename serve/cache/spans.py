"""Where one forward reads and writes: rows of buckets, positions, masks. Built once a step, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from serve.cache.capacity import Bucket, Place

SLICED_ROWS = 8
"""Up to so many rows of a chunk are written a slice each, more of them by one index."""


class SpanPart(NamedTuple):
    """Rows of one bucket in the order of the batch."""

    bucket: Bucket
    rows: Sequence[int]
    starts: Sequence[int]
    """Position of each row's first token in this forward."""
    begins: Sequence[bool]
    """The row holds nothing yet: it is cleared first."""


def span_parts(places: Sequence[Place], starts: Sequence[int], begins: Sequence[bool]) -> list[SpanPart]:
    """Of rows in the order of the batch, those of a bucket side by side."""
    parts = []
    for bucket, group in groupby(zip(places, starts, begins, strict=True), key=lambda row: row[0].bucket):
        inside = list(group)
        parts.append(
            SpanPart(
                bucket, [p.row for p, _, _ in inside], [s for _, s, _ in inside], [b for *_, b in inside]
            )
        )
    return parts


Blocks = Sequence[tuple[int, int]]
"""Positions [a, b) of one row that see one another."""


class Piece(NamedTuple):
    """One slice assignment: rows and positions of a buffer, and where in the run's values they come from."""

    rows: slice
    positions: slice
    run_rows: slice
    tokens: slice


class Run:
    """Neighbouring rows of one bucket, b of them, at neighbouring places of the batch."""

    def __init__(
        self,
        bucket: Bucket,
        rows: slice,
        batch: slice,
        starts: np.ndarray,
        num_tokens: int,
        new_rows: list[int],
    ) -> None:
        self.bucket = bucket
        self.rows = rows
        self.batch = batch
        self.starts = starts  # [b]
        self.num_tokens = num_tokens
        self.new_ranges = _ranges(new_rows)
        self.is_whole = False
        """The run is the whole batch."""
        self.first, self.last = int(starts.min()), int(starts.max())
        self.offset: mx.array  # [b], set by the span
        self.block: tuple[mx.array, mx.array] | None = None
        """Of each token the block it is in: its first position and the one behind its last, [b, T] both."""
        self._bases: dict[tuple[int, int], mx.array] = {}
        self._indices: dict[tuple[int, int], mx.array] = {}
        self._masks: dict[tuple[int | None, int], mx.array] = {}
        self._pieces: dict[int, list[Piece]] = {}

    def next(self, offset: mx.array) -> Run:
        """The same rows a token later."""
        run = Run.__new__(Run)
        run.bucket, run.rows, run.batch, run.is_whole = self.bucket, self.rows, self.batch, self.is_whole
        run.starts, run.num_tokens, run.new_ranges = self.starts + 1, 1, []
        run.first, run.last = self.first + 1, self.last + 1
        run.offset, run.block = offset, None
        run._bases, run._indices, run._masks, run._pieces = self._bases, {}, {}, {}
        return run

    def extent(self, capacity: int) -> int:
        """Places in use in a buffer of `capacity`, this forward's writes included."""
        return min(self.last + self.num_tokens, capacity)

    def is_ring(self, capacity: int) -> bool:
        """Position p stands at p % capacity, for the buffer is shorter than its rows may be."""
        return capacity < self.bucket.num_positions

    def of(self, batch: mx.array) -> mx.array:
        """[B, ...] → [b, ...]."""
        return batch if self.is_whole else batch[self.batch]

    def positions(self) -> mx.array:
        """[b, T] of its tokens."""
        return self.offset[:, None] + mx.arange(self.num_tokens, dtype=mx.int32)

    def sees_all(self, window: int | None, capacity: int) -> bool:
        """Nothing there is hidden from a row's last token, nor from others but what comes after them."""
        stop = self.last + self.num_tokens
        is_causal = self.block is None
        return (
            is_causal and self.first == self.last and stop <= capacity and (window is None or stop <= window)
        )

    def mask(self, window: int | None, capacity: int) -> mx.array:
        """[b, 1, T, extent] bool: a token sees positions up to its own, and its block's, and none `window` behind."""
        key = (window, capacity)
        if key not in self._masks:
            queries = self.positions()[:, :, None]  # [b, T, 1]
            if not self.is_ring(capacity) or self.last + self.num_tokens <= capacity:
                keys = mx.arange(self.extent(capacity), dtype=mx.int32)[None, None]  # [1, 1, extent]
                mask = keys <= queries
            else:
                # Of the positions that share a place, the last is there.
                last = self.offset[:, None, None] + (self.num_tokens - 1)  # [b, 1, 1]
                places = mx.arange(capacity, dtype=mx.int32)[None, None]
                keys = last - mx.remainder(last - places, capacity)  # [b, 1, capacity]
                mask = (keys <= queries) & (keys >= 0)
            if self.block is not None:
                first, stop = (bound[:, :, None] for bound in self.block)  # [b, T, 1]
                mask = mask | ((keys >= first) & (keys < stop))
            if window is not None:  # of a block too, as in Hugging Face's gemma3
                mask = mask & (keys > queries - window)
            self._masks[key] = mask[:, None]
        return self._masks[key]

    def index(self, num_heads: int, capacity: int) -> mx.array:
        """[b, H, T] where its tokens stand in a buffer [C, H, P, ·] that is taken as [C · H · P, ·]."""
        key = (num_heads, capacity)
        if key not in self._indices:
            if key not in self._bases:
                rows = np.arange(self.rows.start, self.rows.stop, dtype=np.int32)[:, None, None]
                heads = np.arange(num_heads, dtype=np.int32)[None, :, None]
                self._bases[key] = mx.array((rows * num_heads + heads) * capacity)  # [b, H, 1]
            places = self.positions()
            if self.is_ring(capacity):
                places = mx.remainder(places, capacity)
            self._indices[key] = self._bases[key] + places[:, None]
        return self._indices[key]

    def pieces(self, capacity: int) -> list[Piece] | None:
        """The writes as slices; None where one index is better. Padding beyond a buffer's end is left out."""
        if capacity not in self._pieces:
            is_ring = self.is_ring(capacity)
            if self.first == self.last:
                groups = [(self.first, self.rows, slice(0, len(self.starts)))]
            elif len(self.starts) <= SLICED_ROWS or (self.last + self.num_tokens > capacity and not is_ring):
                groups = [
                    (int(start), slice(row, row + 1), slice(at, at + 1))
                    for at, (row, start) in enumerate(
                        zip(range(self.rows.start, self.rows.stop), self.starts, strict=True)
                    )
                ]
            else:
                return None
            self._pieces[capacity] = [
                Piece(rows, positions, run_rows, tokens)
                for start, rows, run_rows in groups
                for positions, tokens in _stretches(start, self.num_tokens, capacity, is_ring=is_ring)
            ]
        return self._pieces[capacity]


class Span:
    """One forward: which rows it runs, B of them, and T tokens of each (right padding included).

    parts           in the order of the batch; the decoding rows of a bucket are neighbours
    state_rows      [B] rows of recurrent state; None: 0 … B - 1
    num_state_rows  rows of state in use, whether this forward runs them or not
    blocks          [B] of each row, those of which this forward runs all tokens; None: nobody has any
    """

    def __init__(
        self,
        parts: Sequence[SpanPart],
        num_tokens: int,
        state_rows: Sequence[int] | None = None,
        num_state_rows: int | None = None,
        blocks: Sequence[Blocks] | None = None,
    ) -> None:
        self.num_tokens = num_tokens
        starts = np.concatenate([np.asarray(part.starts, dtype=np.int32) for part in parts])
        self.num_rows = len(starts)
        self.state_rows = list(range(self.num_rows)) if state_rows is None else list(state_rows)
        self.num_state_rows = max(self.state_rows) + 1 if num_state_rows is None else num_state_rows
        self.starts = starts
        self.is_first = all(all(part.begins) for part in parts)
        """Every row of this forward begins."""
        self.runs = _runs(parts, num_tokens)
        if len(self.runs) == 1:
            self.runs[0].is_whole = True
        self._place(mx.array(starts))
        if blocks is not None and any(blocks):
            self._set_blocks(blocks)
        self._state_index = mx.array(np.asarray(self.state_rows, dtype=np.int32))
        first = self.state_rows[0]
        is_range = self.state_rows == list(range(first, first + self.num_rows))
        self.state_slice = slice(first, first + self.num_rows) if is_range else None
        self.is_everything = self.state_slice == slice(0, self.num_state_rows)
        """This forward runs every row of state in use."""

    def _set_blocks(self, blocks: Sequence[Blocks]) -> None:
        """Tell each run with a block in it; the others' masks stay what they are."""
        positions = self.starts[:, None] + np.arange(self.num_tokens, dtype=np.int32)  # [B, T]
        first, stop = positions.copy(), positions + 1
        for row, ranges in enumerate(blocks):
            start = int(self.starts[row])
            for begin, end in ranges:
                assert start <= begin < end <= start + self.num_tokens, "a block is cut"
                first[row, begin - start : end - start] = begin
                stop[row, begin - start : end - start] = end
        for run in self.runs:
            if any(blocks[row] for row in range(run.batch.start, run.batch.stop)):
                run.block = mx.array(first[run.batch]), mx.array(stop[run.batch])

    def next(self) -> Span:
        """The same rows, a token later: what decodes again and again."""
        span = Span.__new__(Span)
        span.__dict__.update(self.__dict__)
        span.num_tokens, span.starts, span.is_first = 1, self.starts + self.num_tokens, False
        assert self.num_tokens == 1, "a chunk is followed by a span of its own"
        offset = self.offset + 1
        span.offset = offset
        span._dense_masks = {}
        if len(self.runs) == 1:
            span.runs = [self.runs[0].next(offset)]
        else:
            span.runs = [run.next(offset[run.batch]) for run in self.runs]
        return span

    def read_states(self, buffer: mx.array) -> mx.array:
        """buffer [C, ...] → [B, ...], the rows' own."""
        if self.state_slice is None:
            return buffer[self._state_index]
        return buffer if self.num_rows == buffer.shape[0] else buffer[self.state_slice]

    def write_states(self, buffer: mx.array, values: mx.array) -> None:
        """buffer [C, ...], values [B, ...]: whole rows."""
        buffer[self.state_slice if self.state_slice is not None else self._state_index] = values

    def dense_mask(self, window: int | None, ring: int | None) -> mx.array:
        """[B, 1, T, E] bool for the rows' keys side by side: E positions, of the longest of them."""
        key = (window, ring)
        if key not in self._dense_masks:
            capacities = [
                run.bucket.num_positions if ring is None else min(run.bucket.num_positions, ring)
                for run in self.runs
            ]
            masks = [run.mask(window, capacity) for run, capacity in zip(self.runs, capacities, strict=True)]
            width = max(mask.shape[-1] for mask in masks)
            masks = [pad_axis(mask, width, axis=-1) for mask in masks]
            self._dense_masks[key] = masks[0] if len(masks) == 1 else mx.concatenate(masks)
        return self._dense_masks[key]

    def _place(self, offset: mx.array) -> None:
        self.offset = offset
        """[B] position of each row's first token."""
        self._dense_masks: dict[tuple[int | None, int | None], mx.array] = {}
        for run in self.runs:
            run.offset = run.of(offset)


def pad_axis(array: mx.array, length: int, *, axis: int) -> mx.array:
    """Zeros behind, up to `length` along an axis."""
    missing = length - array.shape[axis]
    if missing == 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return mx.pad(array, widths)


def _runs(parts: Sequence[SpanPart], num_tokens: int) -> list[Run]:
    runs: list[Run] = []
    at = 0
    for bucket, rows, starts, begins in parts:
        low = 0
        for high in range(1, len(rows) + 1):
            if high < len(rows) and rows[high] == rows[high - 1] + 1:
                continue
            new_rows = [row for row, begin in zip(rows[low:high], begins[low:high], strict=True) if begin]
            runs.append(
                Run(
                    bucket,
                    slice(rows[low], rows[high - 1] + 1),
                    slice(at + low, at + high),
                    np.asarray(starts[low:high], dtype=np.int32),
                    num_tokens,
                    new_rows,
                )
            )
            low = high
        at += len(rows)
    return runs


def _ranges(rows: Sequence[int]) -> list[slice]:
    """Neighbours together: a slice is written several times faster than the same rows by index."""
    ranges: list[slice] = []
    for row in sorted(rows):
        if ranges and ranges[-1].stop == row:
            ranges[-1] = slice(ranges[-1].start, row + 1)
        else:
            ranges.append(slice(row, row + 1))
    return ranges


def _stretches(start: int, num_tokens: int, capacity: int, *, is_ring: bool) -> list[tuple[slice, slice]]:
    """(places, tokens) of the tokens from `start` on: at most two slices in a ring, one up to the end elsewhere."""
    if not is_ring:
        stop = min(start + num_tokens, capacity)
        return [(slice(start, stop), slice(0, stop - start))] if stop > start else []
    stretches = []
    done = 0
    while done < num_tokens:
        place = (start + done) % capacity
        count = min(num_tokens - done, capacity - place)
        stretches.append((slice(place, place + count), slice(done, done + count)))
        done += count
    return stretches
