"""Updates of one shape, stacked: the arrays, what they take, and how they grow and shrink. No names, no requests.

A stack takes what the adapters in it need: none of it is allocated before the first, an entry is as large as its
shapes say, and all is given back when the last one leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import mlx.core as mx

Shapes = tuple[tuple[int, ...], ...]
"""What an entry holds of each array."""


def entries_for(count: int) -> int:
    """Entries there is memory for where `count` are needed: as many below 8, and at most a quarter more from there.

    So the loads of many adapters, one after the other, copy each entry a few times, not once a load.
    """
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step if count > 7 else count


class Stack:
    """Arrays [S, *shape], of experts [E, S, *shape]. Owned by the thread that runs the network.

    Entry 0 is the base's where `has_zero`: zeros, never written. Sizes may be read from any thread.
    """

    def __init__(
        self, shapes: Shapes, dtype: mx.Dtype, *, num_experts: int = 0, has_zero: bool = True
    ) -> None:
        self.shapes = shapes
        self.arrays: list[mx.array] = [mx.zeros(0)] * len(shapes)
        self.entries: tuple[int | None, ...] = ()
        """The slot that entry `first + i` belongs to; None: nobody's."""
        self.num_entries = 0
        """Entries there is memory for, the base's included."""
        self.first = 1 if has_zero else 0
        """The first that is an adapter's."""
        self._dtype = dtype
        self._experts = (num_experts,) if num_experts else ()

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self._bytes(self.num_entries, self.shapes)

    @property
    def entry_bytes(self) -> int:
        """Of one update."""
        return self._bytes(1, self.shapes)

    @property
    def count(self) -> int:
        """Adapters that are in."""
        return sum(owner is not None for owner in self.entries)

    def bytes_with(self, shapes: Shapes) -> int:
        """Memory it would take with one adapter more, of entries of these shapes."""
        return self._bytes(self._entries_with_one_more(), shapes)

    def put(self, slot: int, values: Sequence[mx.array | None], shapes: Shapes | None = None) -> None:
        """Write an adapter's values into an entry of its own, smaller ones with zeros behind; None: zeros.

        Grows where there is no room, or where entries are to be of other shapes. Evaluates.
        """
        num_entries, shapes = self._entries_with_one_more(), shapes or self.shapes
        if num_entries > self.num_entries or shapes != self.shapes:
            self.resize(num_entries, shapes)
        free = [i for i, owner in enumerate(self.entries) if owner is None]
        index = free[0] if free else len(self.entries)
        at = (slice(None),) * len(self._experts) + (self.first + index,)
        for array, value in zip(self.arrays, values, strict=True):
            array[at] = 0 if value is None else _padded(value, array[at])
            mx.eval(array)
        self.entries = (*self.entries[:index], slot, *self.entries[index + 1 :])

    def remove(self, slot: int) -> bool:
        """Forget an adapter; its entry is free, and nothing is copied. True if it had one."""
        was_in = slot in self.entries
        self.entries = tuple(None if owner == slot else owner for owner in self.entries)
        return was_in

    def shrink(self, shapes: Shapes) -> int:
        """Give back what the adapters that are in do not need. Returns the bytes that had to be copied.

        One adapter's room is left, so that replacing one again and again moves nothing.
        """
        count = self.count
        if count == 0:
            self.arrays = [mx.zeros(0)] * len(shapes)
            self.entries, self.num_entries = (), 0
            self.shapes = shapes
            return 0
        wanted = min(self.num_entries, entries_for(self.first + count + 1))
        if shapes == self.shapes and wanted == self.num_entries:
            return 0
        self.resize(wanted, shapes)
        return self.num_bytes

    def resize(self, num_entries: int, shapes: Shapes) -> None:
        """All arrays or none: where memory ends, what was there is whole."""
        kept = [self.first + i for i, owner in enumerate(self.entries) if owner is not None]
        both = zip(self.arrays, shapes, strict=True)
        self.arrays = [self._moved(array, kept, (num_entries, *shape)) for array, shape in both]
        self.shapes = shapes
        self.entries = tuple(owner for owner in self.entries if owner is not None)
        self.num_entries = num_entries

    def _entries_with_one_more(self) -> int:
        return max(self.num_entries, entries_for(self.first + self.count + 1))

    def _bytes(self, num_entries: int, shapes: Shapes) -> int:
        experts = self._experts[0] if self._experts else 1
        return num_entries * experts * sum(prod(shape) for shape in shapes) * self._dtype.size

    def _moved(self, old: mx.array, kept: Sequence[int], shape: tuple[int, ...]) -> mx.array:
        new = mx.zeros((*self._experts, *shape), dtype=self._dtype)
        if kept and old.size and new.size:
            every = (slice(None),) * len(self._experts)
            first, count = kept[0], len(kept)
            if kept[-1] - first == count - 1:  # nobody left between them: no copy of its own
                taken = old[(*every, slice(first, first + count))]
            else:
                taken = mx.take(old, mx.array(list(kept), dtype=mx.uint32), axis=len(every))
            both = zip(taken.shape, new.shape, strict=True)
            inner = [slice(min(sizes)) for sizes in both][len(every) + 1 :]
            new[(*every, slice(self.first, self.first + count), *inner)] = taken[
                (*every, slice(None), *inner)
            ]
        mx.eval(new)
        return new


def _padded(value: mx.array, place: mx.array) -> mx.array:
    widths = [(0, target - size) for size, target in zip(value.shape, place.shape, strict=True)]
    value = value.astype(place.dtype)
    return mx.pad(value, widths) if any(more for _, more in widths) else value
