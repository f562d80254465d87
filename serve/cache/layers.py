"""One layer's keys and values: its buffers, a store a bucket, and the face that mlx-lm's models know as a cache.

Owned by `serve.cache.rows.BatchRows`, which tells it where rows stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from serve import device
from serve.cache.attention import Mask, attend
from serve.cache.capacity import Bucket, LayerShape, Move, Place
from serve.cache.codecs import Form, make_codec
from serve.cache.precision import KvPrecision
from serve.cache.spans import Run, Span, pad_axis

Groups = Mapping[tuple[Bucket, Bucket], Sequence[Move]]
"""Moves by where they come from and where they go."""
Stretch = tuple[int, KvPrecision, tuple[mx.array, ...]]
"""Positions of a row as they are stored: the first of them, their precision, parts [H, T, width]."""


MAX_FORMS = 16
"""Forms that a layer keeps at hand; those of rows in use stay whatever their number."""


class Store:
    """One layer's buffers of one bucket: parts [C, H, P, width]."""

    def __init__(self, form: Form, num_heads: int, capacity: int) -> None:
        self.form = form
        self.num_heads = num_heads
        self.capacity = capacity
        """P: of a sliding window less than the bucket's."""
        self.parts: list[mx.array] = []

    @property
    def num_rows(self) -> int:
        """C."""
        return self.parts[0].shape[0] if self.parts else 0

    def resize(self, num_rows: int) -> None:
        """Room for `num_rows` rows: the first ones stay as they are, new ones are zeros."""
        shape = (self.num_heads, self.capacity)
        if num_rows == self.num_rows:
            return
        old = self.parts or [
            mx.zeros((0, *shape, width), dtype)
            for width, dtype in zip(self.form.widths, self.form.dtypes, strict=True)
        ]
        self.parts = []
        for part in old:
            missing = num_rows - part.shape[0]
            if missing > 0:
                more = mx.zeros((missing, *part.shape[1:]), part.dtype)
                part = more if part.shape[0] == 0 else mx.concatenate([part, more])
            else:
                part = mx.contiguous(part[:num_rows])
            self.parts.append(part)

    def write(self, run: Run, keys: mx.array, values: mx.array) -> None:
        """keys, values [b, H, T, D] of the run's tokens."""
        for rows in run.new_ranges:
            # A masked position still counts 0 · value, so what the row's last sequence left must be finite.
            for part in self.parts:
                part[rows] = 0
        encoded = self.form.encode(keys, values)
        pieces = None if run.num_tokens == 1 else run.pieces(self.capacity)
        if pieces is None:
            self._scatter(run, encoded)
            return
        for piece in pieces:
            for part, new in zip(self.parts, encoded, strict=True):
                part[piece.rows, :, piece.positions] = new[piece.run_rows, :, piece.tokens]

    def _scatter(self, run: Run, encoded: Sequence[mx.array]) -> None:
        index = run.index(self.num_heads, self.capacity)
        for number, (part, new) in enumerate(zip(self.parts, encoded, strict=True)):
            flat = part.reshape(-1, part.shape[-1])
            flat[index] = new
            self.parts[number] = flat.reshape(part.shape)

    def read(self, run: Run) -> list[mx.array]:
        """Views of the run's rows, [b, H, extent, width] a part."""
        extent = run.extent(self.capacity)
        return [part[run.rows, :, :extent] for part in self.parts]


class HeldRows:
    """What the family's code is given as keys and as values: it may only hand them on to its attention."""

    def __init__(self, layer: LayerRows, span: Span) -> None:
        self._layer = layer
        self._span = span

    def attend(self, queries: mx.array, scale: float, window: int | None, sinks: mx.array | None) -> mx.array:
        """[B, H, T, D] → [B, H, T, D], a bucket at a time."""
        layer = self._layer
        window = layer.shape.window if window is None else window
        outputs = []
        for run in self._span.runs:
            store = layer.stores[run.bucket]
            outputs.append(
                attend(
                    run,
                    run.of(queries),
                    store.form,
                    store.read(run),
                    store.capacity,
                    scale=scale,
                    window=window,
                    sinks=sinks,
                )
            )
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


class LayerRows:
    """One layer's keys and values, a store a bucket."""

    def __init__(
        self,
        shape: LayerShape | None,
        dtype: mx.Dtype = mx.float32,
        *,
        ring: int | None = None,
        window: int | None = None,
        sizes: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """`shape` is None where the family never writes (it keeps a cache that it does not use)."""
        self._shape = shape
        self._dtype = dtype
        self.ring = ring
        """Positions a buffer has at most, of a sliding window."""
        self.sizes = sizes
        """Mean size of each channel of keys and of values, in a fixed sample."""
        self.is_dense = False
        """The family's code looks into keys or masks: it is given plain arrays, all buckets side by side."""
        self.num_head_axes = 1
        """Axes the family's scores have between rows and tokens: 2 where grouped heads stand apart (gemma2)."""
        self.stores: dict[Bucket, Store] = {}
        self.span: Span | None = None
        self._forms: dict[KvPrecision, Form] = {}

    @property
    def shape(self) -> LayerShape:
        """What it keeps of a position."""
        assert self._shape is not None, "a layer that wrote nothing at the start is in use"
        return self._shape

    @property
    def dtype(self) -> mx.Dtype:
        """Of keys and values as they are computed."""
        return self._dtype

    @property
    def is_used(self) -> bool:
        """The family writes to it."""
        return self._shape is not None

    # mlx-lm's contract

    @property
    def offset(self) -> mx.array:
        """[B] position of the first token of the coming forward, one a row: what rotary embeddings take."""
        assert self.span is not None
        return self.span.offset

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate with a step."""
        return [part for store in self.stores.values() for part in store.parts]

    left_padding: None = None
    """mlx-vlm's batches pad at the left; no row here does."""

    @property
    def _idx(self) -> int:
        """Positions of the longest row before the coming forward: where mlx-vlm's code cuts a mask's columns, which
        are then all there."""
        assert self.span is not None
        return max(run.last for run in self.span.runs)

    def make_mask(self, num_tokens: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """What the family's code hands to its attention; `window_size` as it asks for it."""
        window = window_size if window_size is not None or self._shape is None else self._shape.window
        if not self.is_dense:
            return Mask(window)
        assert self.span is not None
        mask = self.span.dense_mask(window, self.ring)  # [B, 1, T, E]
        return mask if self.num_head_axes == 1 else mask[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """keys, values [B, H, T, D] are written; returns what attention takes."""
        span = self.span
        assert span is not None
        for run in span.runs:
            self.stores[run.bucket].write(run, run.of(keys), run.of(values))
        return self.seen(span)

    def seen(self, span: Span) -> tuple[Any, Any]:
        """What attention takes of a span whose tokens write nothing here."""
        if self.is_dense:
            return self._dense(span)
        held = HeldRows(self, span)
        return held, held

    def _dense(self, span: Span) -> tuple[mx.array, mx.array]:
        """All of the rows' keys and values, [B, H, E, D] each."""
        stores = [self.stores[run.bucket] for run in span.runs]
        pairs = [store.form.decode(store.read(run)) for run, store in zip(span.runs, stores, strict=True)]
        width = max(keys.shape[2] for keys, _ in pairs)
        keys, values = (
            mx.concatenate([pad_axis(array, width, axis=2) for array in arrays])
            for arrays in zip(*pairs, strict=True)
        )
        return keys, values

    # Rows

    def form(self, precision: KvPrecision) -> Form:
        """How rows of that precision are stored here."""
        precision = replace(self.shape.precision(precision), num_plain_layers=0)
        if precision not in self._forms:
            if len(self._forms) >= MAX_FORMS:
                used = [store.form for store in self.stores.values()]
                self._forms = {key: form for key, form in self._forms.items() if form in used}
            key_sizes, value_sizes = (None, None) if self.sizes is None else self.sizes
            self._forms[precision] = Form(
                make_codec(precision, precision.key_bits, self.shape.key_dim, self._dtype, key_sizes, seed=0),
                make_codec(
                    precision, precision.value_bits, self.shape.value_dim, self._dtype, value_sizes, seed=1
                ),
            )
        return self._forms[precision]

    def resize(self, capacities: Mapping[Bucket, int]) -> None:
        """Exact row counts; buckets left out go."""
        for bucket in [bucket for bucket in self.stores if not capacities.get(bucket)]:
            del self.stores[bucket]
        for bucket, num_rows in capacities.items():
            if num_rows and bucket not in self.stores:
                self.stores[bucket] = Store(
                    self.form(bucket.precision),
                    self.shape.num_heads,
                    self.shape.capacity(bucket.num_positions, self.ring),
                )
            if num_rows:
                self.stores[bucket].resize(num_rows)

    def gather(self, groups: Groups) -> list[list[mx.array]]:
        """What rows hold, as their target buckets store it, lazily, a list a group: what `scatter` puts there."""
        return [self._gathered(key, moves) for key, moves in groups.items()]

    def scatter(self, groups: Groups, copies: Sequence[Sequence[mx.array]]) -> None:
        """Overwrite whole rows with copies made before, and zeros behind them."""
        for ((_, target), moves), parts in zip(groups.items(), copies, strict=True):
            rows = [move.target.row for move in moves]
            for part, copy in zip(self.stores[target].parts, parts, strict=True):
                _overwrite(part, rows, copy)

    def _gathered(self, key: tuple[Bucket, Bucket], moves: Sequence[Move]) -> list[mx.array]:
        source, target = self.stores[key[0]], self.stores[key[1]]
        rows = [move.source.row for move in moves]
        longest = max(move.num_positions for move in moves)
        if source.capacity != target.capacity:
            assert longest <= min(source.capacity, target.capacity), "a row is longer than its place"
        extent = min(longest, source.capacity)
        copies = [_copied(part, rows, extent) for part in source.parts]
        if source.form is not target.form:
            copies = list(target.form.encode(*source.form.decode(copies)))
        return copies

    def take(self, place: Place, start: int, stop: int) -> tuple[mx.array, ...]:
        """Copies of a row's positions [start, stop), [H, stop - start, width] a part, lazily."""
        store = self.stores[place.bucket]
        places = [p % store.capacity for p in (start, stop - 1)]
        row, first, stop = place.row, places[0], places[1] + 1
        if first < stop:
            return tuple(mx.contiguous(part[row, :, first:stop]) for part in store.parts)
        return tuple(
            mx.concatenate([part[row, :, first:], part[row, :, :stop]], axis=1) for part in store.parts
        )

    def put(self, place: Place, stretches: Sequence[Stretch]) -> None:
        """Overwrite a row: zeros where no stretch is."""
        store = self.stores[place.bucket]
        for part in store.parts:
            part[place.row] = 0
        for start, precision, parts in stretches:
            form = self.form(precision)
            if form is not store.form:
                keys, values = form.decode(parts)
                parts = store.form.encode(keys, values)
            done, length = 0, parts[0].shape[1]
            while done < length:
                at = (start + done) % store.capacity
                count = min(length - done, store.capacity - at)
                for part, new in zip(store.parts, parts, strict=True):
                    part[place.row, :, at : at + count] = new[:, done : done + count]
                done += count


# MLX's CPU backend goes through what an array of indices names number by number, and copies slices whole.


def _copied(part: mx.array, rows: Sequence[int], extent: int) -> mx.array:
    """Positions [0, extent) of some rows of a buffer [C, H, P, ·], lazily; no view of the buffer."""
    if device.backend() == "cpu" and len(rows) > 1:
        return mx.concatenate([part[row : row + 1, :, :extent] for row in rows])
    return part[:, :, :extent][_indices(rows)]


def _overwrite(part: mx.array, rows: Sequence[int], values: mx.array) -> None:
    """Put values [b, H, T, ·] into rows of a buffer [C, H, P, ·], and zeros behind the T positions."""
    capacity, extent = part.shape[2], values.shape[2]
    if device.backend() != "cpu":
        part[_indices(rows)] = pad_axis(values, capacity, axis=2)
        return
    for index, row in enumerate(rows):
        part[row, :, :extent] = values[index]
        if extent < capacity:
            part[row, :, extent:] = 0


def _indices(rows: Sequence[int]) -> mx.array:
    return mx.array(np.asarray(rows, dtype=np.int32))
