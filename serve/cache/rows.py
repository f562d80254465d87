"""KV memory of a batch: fixed rows with their own lengths, so that joining, leaving and trimming copy nothing.

Row r holds positions [0, length_r); what lies beyond is finite garbage that the mask hides and the next write
replaces. Lengths live with the scheduler; a forward is told where it writes by a `Span`. The layer objects keep the
duck-typed contract of mlx-lm's models (`update_and_fetch`, `offset`, `make_mask`, `state`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from serve.cache.capacity import positions_capacity, rows_capacity


class Span:
    """Where one forward reads and writes: rows, the positions of its tokens, and how far it looks back.

    rows       row indices in the buffers, B of them
    starts     [B] first position written, one a row
    num_tokens T, tokens a row in this forward (right padding included)
    num_rows   rows in use, whether this forward runs them or not: all are below it
    new_rows   those of `rows` whose sequence begins here
    longest    positions of the longest row in use, this forward's writes included
    """

    def __init__(
        self,
        rows: Sequence[int],
        starts: Sequence[int],
        num_tokens: int,
        *,
        num_rows: int,
        new_rows: Sequence[int] = (),
        longest: int = 0,
    ) -> None:
        self.rows = list(rows)
        self.num_tokens = num_tokens
        self.num_rows = num_rows
        self.new_ranges = _ranges(new_rows)
        self.is_first = len(new_rows) == len(self.rows)
        """Every row of this forward begins."""
        self.extent = max(starts) + num_tokens
        self.longest = max(longest, self.extent)
        self.offset = mx.array(np.asarray(starts, dtype=np.int32))  # [B]
        self.positions = self.offset[:, None] + mx.arange(num_tokens, dtype=mx.int32)[None]  # [B, T]
        self._row_index = mx.array(np.asarray(self.rows, dtype=np.int32))
        self._masks: dict[int | None, mx.array] = {}
        first = self.rows[0]
        self.slice = slice(first, first + len(self.rows)) if self._is_range() else None
        self.is_everything = self.slice == slice(0, num_rows)
        """This forward runs every row in use."""

    def mask(self, window: int | None) -> mx.array:
        """[B, 1, T, extent] bool: a token sees positions up to its own, at most `window` of them."""
        if window not in self._masks:
            keys = mx.arange(self.extent, dtype=mx.int32)[None, None]  # [1, 1, extent]
            queries = self.positions[:, :, None]  # [B, T, 1]
            mask = keys <= queries
            if window is not None:
                mask = mask & (keys > queries - window)
            self._masks[window] = mask[:, None]
        return self._masks[window]

    def write(self, buffer: mx.array, values: mx.array) -> None:
        """buffer [C, H, P, D], values [B, H, T, D]."""
        heads = mx.arange(values.shape[1], dtype=mx.int32)
        buffer[self._row_index[:, None, None], heads[None, :, None], self.positions[:, None, :]] = values

    def read(self, buffer: mx.array) -> mx.array:
        """[B, H, extent, D]: a view where the rows are neighbours, which decoding rows always are."""
        if self.slice is not None:
            return buffer[self.slice, :, : self.extent]
        return buffer[:, :, : self.extent][self._row_index]

    def read_rows(self, buffer: mx.array) -> mx.array:
        """buffer [C, ...] → [B, ...], the rows' own."""
        if self.slice is None:
            return buffer[self._row_index]
        return buffer if len(self.rows) == buffer.shape[0] else buffer[self.slice]

    def write_rows(self, buffer: mx.array, values: mx.array) -> None:
        """buffer [C, ...], values [B, ...]: whole rows."""
        buffer[self.slice if self.slice is not None else self._row_index] = values

    def _is_range(self) -> bool:
        first = self.rows[0]
        return self.rows == list(range(first, first + len(self.rows)))


def _ranges(rows: Sequence[int]) -> list[slice]:
    """Neighbours together: a slice is written several times faster than the same rows by index."""
    ranges: list[slice] = []
    for row in sorted(rows):
        if ranges and ranges[-1].stop == row:
            ranges[-1] = slice(ranges[-1].start, row + 1)
        else:
            ranges.append(slice(row, row + 1))
    return ranges


class LayerRows:
    """One layer's keys and values, [C, H, P, D] each; C and P grow on demand."""

    def __init__(self, window: int | None = None) -> None:
        self._window = window
        self.num_head_axes = 1
        """Axes the family's scores have between rows and tokens: 2 where grouped heads stand apart (gemma2)."""
        self._buffers: list[mx.array] = []
        self.span: Span | None = None

    @property
    def offset(self) -> mx.array:
        """[B] position of the first token of the coming forward, one a row: what rotary embeddings take."""
        assert self.span is not None
        return self.span.offset

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate with a step."""
        return self._buffers

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def make_mask(
        self, num_tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """The span's mask; `window_size` as the model asks for it."""
        assert self.span is not None
        mask = self.span.mask(window_size if window_size is not None else self._window)
        return mask if self.num_head_axes == 1 else mask[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """keys, values [B, H, T, D] are written; returns all of the rows' [B, H, extent, D]."""
        span = self.span
        assert span is not None
        self._reserve(keys, values, span)
        for rows in span.new_ranges:
            # A masked position still counts 0 · value, so what the row's last sequence left must be finite.
            for buffer in self._buffers:
                buffer[rows] = 0
        span.write(self._buffers[0], keys)
        span.write(self._buffers[1], values)
        return span.read(self._buffers[0]), span.read(self._buffers[1])

    def gather(self, rows: mx.array) -> list[mx.array]:
        """A copy of whole rows, lazily: what `scatter` puts elsewhere."""
        return [buffer[rows] for buffer in self._buffers]

    def scatter(self, rows: mx.array, copies: Sequence[mx.array]) -> None:
        """Overwrite whole rows with copies made before."""
        for buffer, copy in zip(self._buffers, copies, strict=True):
            buffer[rows] = copy

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers = []

    def _reserve(self, keys: mx.array, values: mx.array, span: Span) -> None:
        """Room for the span's writes. Where that copies, rows and positions that are not in use are left out, so that
        many short rows do not each keep the length of a long one that has gone."""
        num_rows, extent = rows_capacity(max(span.rows) + 1), positions_capacity(span.extent)
        if not self._buffers:
            shapes = [(num_rows, part.shape[1], extent, part.shape[3]) for part in (keys, values)]
            self._buffers = [
                mx.zeros(shape, part.dtype) for shape, part in zip(shapes, (keys, values), strict=True)
            ]
            return
        rows, _, positions, _ = self._buffers[0].shape
        if num_rows <= rows and extent <= positions:
            return
        rows = min(rows, rows_capacity(span.num_rows))
        positions = min(positions, positions_capacity(span.longest))
        widths = [(0, max(num_rows - rows, 0)), (0, 0), (0, max(extent - positions, 0)), (0, 0)]
        self._buffers = [mx.pad(buffer[:rows, :, :positions], widths) for buffer in self._buffers]


class Rows(Protocol):
    """What all kinds of rows do: LayerRows (keys and values) and StateRows (recurrent state)."""

    span: Span | None

    @property
    def state(self) -> list[mx.array]: ...
    @property
    def num_bytes(self) -> int: ...
    def gather(self, rows: mx.array) -> list[mx.array]: ...
    def scatter(self, rows: mx.array, copies: Sequence[mx.array]) -> None: ...
    def clear(self) -> None: ...


class BatchRows:
    """All layers' rows. `move` is how rows stay compact when one leaves.

    caches  what the family's code is given as its cache: one object a layer, rows or several rows in a CacheList
    layers  the rows in them
    """

    def __init__(self, caches: Sequence[Any], layers: Sequence[Rows]) -> None:
        self.caches = list(caches)
        self.layers = list(layers)

    @property
    def num_bytes(self) -> int:
        """Memory held by all layers."""
        return sum(layer.num_bytes for layer in self.layers)

    def arrays(self) -> list[list[mx.array]]:
        """All layers' arrays: what to evaluate with a step."""
        return [layer.state for layer in self.layers]

    def set_span(self, span: Span) -> None:
        """The coming forward reads and writes there."""
        for layer in self.layers:
            layer.span = span

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy rows (from, to), all at once: every source is read before any target is written."""
        if not moves:
            return
        sources = mx.array(np.asarray([source for source, _ in moves], dtype=np.int32))
        targets = mx.array(np.asarray([target for _, target in moves], dtype=np.int32))
        copies = [layer.gather(sources) for layer in self.layers]
        # The copies must exist before the writes: a pending gather would keep the buffer from being donated
        # and each write would copy all of it.
        mx.eval(copies)
        for layer, copy in zip(self.layers, copies, strict=True):
            layer.scatter(targets, copy)

    def clear(self) -> None:
        """Give all memory back; no row may be in use."""
        for layer in self.layers:
            layer.clear()
