"""KV memory of a batch: rows in buckets, so that each costs what it holds and nobody pays for the longest.

A bucket is buffers [C, H, P, ·] of C rows with room for P positions in one precision. A row holds positions
[0, length) of its bucket's P; what lies beyond is finite garbage that the mask hides and the next write replaces,
for whatever puts a row in its place overwrites all of it. Lengths and places live with the scheduler; a forward is
told where it writes by a `Span`, and attention runs bucket by bucket (`serve/cache/attention.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np

from serve.cache.capacity import MAX_POSITIONS, Bucket, Move, Place, RowCost
from serve.cache.codecs import outliers
from serve.cache.layers import Groups, LayerRows, Stretch
from serve.cache.precision import GROUP_SIZES, PLAIN, KvPrecision
from serve.cache.segment import Segment, total_tokens
from serve.cache.spans import Span, SpanPart
from serve.cache.states import StateRows
from serve.errors import RequestError
from serve.model import rotary

__all__ = ["BatchRows", "Span", "SpanPart"]

BYTES_AT_ONCE = 64 << 20
"""Copies that moving rows holds beside the buffers, or those of one layer."""


class BatchRows:
    """All layers' rows. Made by `serve.cache.families.make_rows`.

    caches  what the family's code is given as its cache: one object a layer, rows or several rows in a CacheList
    cost    what a row takes
    """

    def __init__(
        self,
        caches: Sequence[Any],
        layers: Sequence[LayerRows | StateRows],
        cost: RowCost,
        prove: Callable[[BatchRows], None],
    ) -> None:
        self.caches = list(caches)
        self.cost = cost
        self._layers = list(layers)
        self._attending: dict[int, LayerRows] = {
            index: layer
            for index, layer in enumerate(layers)
            if isinstance(layer, LayerRows) and layer.is_used
        }
        self._recurrent: dict[int, StateRows] = {
            index: layer for index, layer in enumerate(layers) if isinstance(layer, StateRows)
        }
        self._prove = prove
        self._attached = ""
        self._num_attached = 0
        self._chunk_tokens = cost.prefill_chunk_tokens
        self._ring = min(
            (layer.ring for layer in self.attending if layer.ring is not None), default=MAX_POSITIONS
        )
        self._num_written: dict[Bucket, np.ndarray] = {}
        """By bucket: behind the last position that each row was given, padding included."""
        self._num_in_state: dict[int, int] = {}
        """By row of state: tokens it has taken in."""

    @property
    def attending(self) -> list[LayerRows]:
        """The layers that keep keys and values."""
        return list(self._attending.values())

    @property
    def own(self) -> list[LayerRows]:
        """Those of the family's code, first to last."""
        return self.attending[: len(self.attending) - self._num_attached]

    @property
    def num_bytes(self) -> int:
        """Memory held by all layers."""
        return sum(array.nbytes for array in self.arrays())

    @property
    def fingerprint(self) -> str:
        """Tells apart rows whose half bits go to other channels: one's stored forms are nonsense to the other."""
        digest = hashlib.sha256()
        for layer in self._attending.values():
            for sizes in layer.sizes or ():
                digest.update(outliers(sizes).tobytes())
        digest.update(self._attached.encode())
        return digest.hexdigest()

    def attach(self, layers: Sequence[LayerRows], name: str) -> None:
        """Layers of somebody else's, which the family's code is not given: they stand, move and are kept with rows.

        Before any row is in use. `name` tells apart whose they are, and of what weights.
        """
        assert not self._num_written, "rows are in use"
        first = len(self._layers)
        self._layers += layers
        self._attending |= dict(enumerate(layers, first))
        shapes = (*self.cost.layers, *(layer.shape for layer in layers))
        self.cost = replace(self.cost, layers=shapes, _bytes={})
        self._attached += f"|{name}"
        self._num_attached += len(layers)

    def prove(self) -> None:
        """Raise ModelError unless rows in company are what the family's own cache is. Leaves the rows empty.

        It also finds out whether the family's code takes held rows or needs plain arrays.
        """
        self._prove(self)

    def check(self, precision: KvPrecision) -> None:
        """RequestError where this model's keys and values cannot be stored so, with what would do.

        From any thread; the first turbo precision imports mlx-vlm here, which takes seconds, and not in a step.
        """
        if precision.scheme == "turbo":
            import_module("serve.cache.turbo")
        for layer in self._attending.values():
            held = layer.shape.precision(precision)
            for name, dim in (("keys", layer.shape.key_dim), ("values", layer.shape.value_dim)):
                if held.scheme == "affine" and dim % held.group_size:
                    fitting = [size for size in GROUP_SIZES if dim % size == 0]
                    raise RequestError(
                        f"kv_group_size is {held.group_size}, which does not divide the {dim} channels of this "
                        f"model's {name}; "
                        + (
                            f"expected one of {fitting}"
                            if fitting
                            else "they can be quantized by turbo bits alone, such as 3.5"
                        ),
                        "kv_group_size",
                    )

    def arrays(self) -> list[mx.array]:
        """All layers' arrays: what to evaluate with a step."""
        return [array for layer in self._layers for array in layer.state]

    def resize(self, capacities: Mapping[Bucket, int]) -> None:
        """Exact row counts; a bucket left out gives its memory back."""
        for layer in self._attending.values():
            layer.resize(capacities)
        kept = {bucket: count for bucket, count in capacities.items() if count}
        old = self._num_written
        self._num_written = {bucket: np.zeros(count, dtype=np.int64) for bucket, count in kept.items()}
        for bucket, written in self._num_written.items():
            if bucket in old:
                count = min(len(written), len(old[bucket]))
                written[:count] = old[bucket][:count]

    def move(self, moves: Sequence[Move], state_moves: Sequence[tuple[int, int]] = ()) -> None:
        """Copy rows, all at once: every source is read before any target is written.

        state_moves  (from, to) rows of recurrent state
        """
        if moves:
            groups: dict[tuple[Bucket, Bucket], list[Move]] = {}
            for move in moves:
                groups.setdefault((move.source.bucket, move.target.bucket), []).append(move)
            # An IndexError here, for a row that is not there: MLX would write into what is not its own.
            written = [self._num_written[move.source.bucket][move.source.row] for move in moves]
            assert all(move.target.row < len(self._num_written[move.target.bucket]) for move in moves)
            _move_layers(self.attending, groups)
            for move, count in zip(moves, written, strict=True):
                self._num_written[move.target.bucket][move.target.row] = count
        if state_moves and self._recurrent:
            sources, targets = (
                mx.array(np.asarray(rows, dtype=np.int32)) for rows in zip(*state_moves, strict=True)
            )
            copies = [layer.gather(sources) for layer in self._recurrent.values()]
            mx.eval(copies)
            for state_layer, copy in zip(self._recurrent.values(), copies, strict=True):
                state_layer.scatter(targets, copy, 1 + max(target for _, target in state_moves))
            counts = [self._num_in_state.get(source, -1) for source, _ in state_moves]
            for (_, row), tokens in zip(state_moves, counts, strict=True):
                self._num_in_state[row] = tokens

    def set_span(self, span: Span) -> None:
        """The coming forward reads and writes there."""
        rotary.share(span.offset)
        for layer in self._layers:
            layer.span = span
        for run in span.runs:
            assert run.last < run.bucket.num_positions, "a row has outgrown its bucket"
            assert span.num_tokens <= self._chunk_tokens or run.last + span.num_tokens <= self._ring, (
                "a chunk is longer than a window's buffer has room for beside the window"
            )
            written = self._num_written[run.bucket]
            for rows in run.new_ranges:
                written[rows] = 0
            # Wrong guesses stay where they were written, and in a ring stand where others stood, until written over.
            written[run.rows] = np.maximum(written[run.rows], run.starts + span.num_tokens)
        if self._recurrent:
            stops = (span.starts + span.num_tokens).tolist()
            self._num_in_state.update(zip(span.state_rows, stops, strict=True))

    @property
    def has_states(self) -> bool:
        """Some layers keep a state that takes in every token of a forward: it cannot be cut short afterwards."""
        return bool(self._recurrent)

    def hold_states(self) -> None:
        """The coming forward may run tokens that are nobody's: `put_back` follows."""
        for states in self._recurrent.values():
            states.hold()

    def put_back(self, lengths: Mapping[int, int]) -> None:
        """Rows of state that have run such tokens, and how many they had taken in before: they are as they were."""
        rows = mx.array(np.asarray(list(lengths), dtype=np.int32)) if lengths else None
        for states in self._recurrent.values():
            states.put_back(rows)
        self._num_in_state |= lengths

    def take(self, place: Place, state_row: int, start: int, stop: int) -> Segment:
        """Positions [start, stop) of a row, as they are stored, and the state behind them if the row holds no more.

        The copies must be under way before the next forward is built: one that is still pending when the row is
        written next would keep its buffer from being donated.
        """
        full, window = {}, {}
        first = start
        for index, layer in self._attending.items():
            if layer.shape.window is None:
                full[index] = layer.take(place, start, stop)
            else:
                capacity = layer.stores[place.bucket].capacity
                oldest = int(self._num_written[place.bucket][place.row]) - capacity
                first = max(first, min(oldest, stop))
        if first < stop:
            for index, layer in self._attending.items():
                if layer.shape.window is not None:
                    window[index] = layer.take(place, first, stop)
        has_state = self._num_in_state.get(state_row) == stop
        state = {index: states.take(state_row) for index, states in self._recurrent.items() if has_state}
        has_windows = any(layer.shape.window is not None for layer in self._attending.values())
        return Segment(
            place.bucket.precision,
            stop - start,
            full,
            window,
            state,
            num_window_tokens=stop - first if has_windows else stop - start,
            keeps_state=bool(self._recurrent),
        )

    def put(self, place: Place, state_row: int, segments: Sequence[Segment], num_positions: int) -> None:
        """A new row that holds [0, num_positions) of the segments, which follow each other; all else is zeros.

        Plain segments become what the bucket is. Where the last of them is cut short, no layer may keep state.
        """
        length = total_tokens(segments)
        assert num_positions <= min(length, place.bucket.num_positions), "more positions than there are"
        for index, layer in self._attending.items():
            window = layer.shape.window
            stretches: list[Stretch] = []
            start = 0
            for segment in segments:
                stop = min(start + segment.num_tokens, num_positions)
                held = (segment.full if window is None else segment.window).get(index)
                first = start if window is None else start + segment.num_tokens - segment.num_window_tokens
                if held is not None and first < stop:
                    precision = segment.precision if window is None else PLAIN
                    stretches.append((first, precision, tuple(part[:, : stop - first] for part in held)))
                start += segment.num_tokens
            _check_window(stretches, num_positions, window)
            layer.put(place, stretches)
        self._num_written[place.bucket][place.row] = num_positions
        if self._recurrent:
            assert num_positions == length, "the state behind a segment's middle is not known"
            assert segments[-1].has_state, "the state behind the last position is not known"
            for index, states in self._recurrent.items():
                states.put(state_row, segments[-1].state[index])
            self._num_in_state[state_row] = num_positions

    def clear(self) -> None:
        """Give all memory back; no row may be in use."""
        for layer in self._attending.values():
            layer.resize({})
        for state_layer in self._recurrent.values():
            state_layer.clear()
        rotary.share(None)
        self._num_written, self._num_in_state = {}, {}


def _check_window(stretches: Sequence[Stretch], num_positions: int, window: int | None) -> None:
    """What the next token looks back on must be there."""
    first = num_positions
    for start, _, parts in reversed(stretches):
        if start + parts[0].shape[1] < first:
            break
        first = start
    needed = 0 if window is None else max(0, num_positions - window + 1)
    assert first <= needed, f"keys from {needed} on are needed and those from {first} on are there"


def _move_layers(layers: Sequence[LayerRows], groups: Groups) -> None:
    pending: list[tuple[LayerRows, list[list[mx.array]]]] = []
    num_bytes = 0
    for layer in layers:
        copies = layer.gather(groups)
        pending.append((layer, copies))
        num_bytes += sum(copy.nbytes for parts in copies for copy in parts)
        if num_bytes < BYTES_AT_ONCE and layer is not layers[-1]:
            continue
        # The copies must exist before the writes: a pending gather would keep the buffer from being donated
        # and each write would copy all of it.
        mx.eval([copies for _, copies in pending])
        for moved, copies in pending:
            moved.scatter(groups, copies)
        pending, num_bytes = [], 0
