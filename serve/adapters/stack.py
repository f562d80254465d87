"""One layer's updates, stacked: the arrays, what they take, and how they grow and shrink. No names, no requests.

Entry 0 is the base: all zeros, never written. A stack takes what the adapters in it need: none of it is allocated
before the first, its rank is the largest one's, and it is given back when they leave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from serve.adapters.fit import LowRank, Size
from serve.adapters.lora import LANES
from serve.model.weights import EXPERTS, linear_shape

ENTRY_BLOCK = 4
NO_SIZE = Size(0, False)

Arrays = tuple[mx.array, mx.array, mx.array | None]
"""a, b and gain."""


def entries_for(count: int) -> int:
    """Entries there is memory for with `count` adapters: the base's and theirs, in blocks of 4."""
    return -(-(count + 1) // ENTRY_BLOCK) * ENTRY_BLOCK if count else 0


class Stack:
    """The updates of one layer. Owned by the thread that runs the network; sizes may be read from any.

    a     [S, D, R], of experts [E, S, D, R]; empty while there is nothing in it
    b     [S, R, O], of experts [E, S, R, O]; likewise
    gain  [S, O], or None while no update has one
    """

    def __init__(self, layer: nn.Module, dtype: mx.Dtype) -> None:
        self.a = self.b = mx.zeros(0)
        self.gain: mx.array | None = None
        self.sizes: dict[int, Size] = {}
        """By slot, of the updates that are in."""
        self.size = NO_SIZE
        """What there is memory for in each entry."""
        self._dtype = dtype
        self._inputs, self._outputs = linear_shape(layer)
        self._experts = (layer.weight.shape[0],) if isinstance(layer, EXPERTS) else ()

    def num_bytes(self, num_entries: int, size: Size) -> int:
        """Memory of that many entries of that size."""
        widths = (self._inputs + self._outputs) * size.rank + (self._outputs if size.has_gain else 0)
        experts = self._experts[0] if self._experts else 1
        return num_entries * experts * widths * self._dtype.size

    def needed(self, sizes: Iterable[Size] = ()) -> Size:
        """What an entry must have room for: the updates that are in, and these."""
        every = [*self.sizes.values(), *sizes]
        rank = max((s.rank for s in every), default=0)
        # Whole lanes, which gathered_update would otherwise make of it anew in each step.
        return Size(-(-rank // LANES) * LANES, any(s.has_gain for s in every))

    def resized(self, kept: Sequence[int], num_entries: int, size: Size) -> Arrays:
        """Arrays of `num_entries` entries, evaluated; entry kept[i] of these ones is entry i + 1 there."""
        a = self._moved(self.a, kept, (num_entries, self._inputs, size.rank))
        b = self._moved(self.b, kept, (num_entries, size.rank, self._outputs))
        return a, b, self._moved(self.gain, kept, (num_entries, self._outputs)) if size.has_gain else None

    def adopt(self, arrays: Arrays, size: Size) -> None:
        """Use these from now on."""
        self.a, self.b, self.gain = arrays
        self.size = size

    def is_used_by(self, slots: frozenset[int]) -> bool:
        """Whether any of these slots has an update here."""
        return not self.sizes.keys().isdisjoint(slots)

    def gain_of(self, slots: frozenset[int]) -> mx.array | None:
        """The changes of length, where any of these slots has one."""
        return self.gain if any(self.sizes.get(slot, NO_SIZE).has_gain for slot in slots) else None

    def clear(self) -> None:
        """Give all memory back."""
        assert not self.sizes, "nobody needs what is thrown away"
        self.a = self.b = mx.zeros(0)
        self.gain, self.size = None, NO_SIZE

    def write(self, slot: int, entry: int, update: LowRank | None) -> None:
        """Fill an entry that there is room for; with None, with zeros. Lazy: see `arrays`."""
        place = (slice(None),) * len(self._experts) + (entry,)
        self.a[place] = _padded(update.a, self.a[place]) if update else 0
        self.b[place] = _padded(update.b, self.b[place]) if update else 0
        if self.gain is not None:
            gain = update.gain if update else None
            self.gain[entry] = 0 if gain is None else gain.astype(self._dtype)
        if update is not None:
            self.sizes[slot] = update.size

    def arrays(self) -> list[mx.array]:
        """The arrays there are."""
        return [array for array in (self.a, self.b, self.gain) if array is not None]

    def _moved(self, old: mx.array | None, kept: Sequence[int], shape: tuple[int, ...]) -> mx.array:
        experts = self._experts if len(shape) == 3 else ()
        new = mx.zeros((*experts, *shape), dtype=self._dtype)
        if old is not None and kept and old.size and new.size:
            every = (slice(None),) * len(experts)
            taken = mx.take(old, mx.array(list(kept), dtype=mx.uint32), axis=len(experts))
            both = zip(taken.shape, new.shape, strict=True)
            inner = [slice(min(sizes)) for sizes in both][len(experts) + 1 :]
            new[(*every, slice(1, len(kept) + 1), *inner)] = taken[(*every, slice(None), *inner)]
        mx.eval(new)
        return new


class Group:
    """Layers whose stacks have the same entries: one linear layer, or all stacks of a MoE block."""

    def __init__(self, stacks: Mapping[str, Stack]) -> None:
        self.stacks = stacks
        """By module path."""
        self.entries: tuple[int | None, ...] = ()
        """The slot that entry i + 1 belongs to; None: nobody's. A slot that is not here has no update here."""
        self.num_entries = 0
        """Entries there is memory for, the base's included."""

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return sum(stack.num_bytes(self.num_entries, stack.size) for stack in self.stacks.values())

    def bytes_with(self, sizes: Mapping[str, Size]) -> int:
        """Memory it would take with one adapter more."""
        num_entries = max(self.num_entries, entries_for(self._count() + 1))
        return sum(
            stack.num_bytes(num_entries, stack.needed([sizes[path]] if path in sizes else []))
            for path, stack in self.stacks.items()
        )

    def install(self, slot: int, updates: Mapping[str, LowRank]) -> None:
        """Write an adapter's updates of these layers; grow where there is no room. Evaluates."""
        wanted = {
            path: stack.needed([updates[path].size] if path in updates else [])
            for path, stack in self.stacks.items()
        }
        num_entries = max(self.num_entries, entries_for(self._count() + 1))
        if num_entries > self.num_entries or any(s.size != wanted[path] for path, s in self.stacks.items()):
            self._resize(num_entries, wanted)
        free = [i for i, owner in enumerate(self.entries) if owner is None]
        index = free[0] if free else len(self.entries)
        for path, stack in self.stacks.items():
            stack.write(slot, index + 1, updates.get(path))
            mx.eval(stack.arrays())
        self.entries = (*self.entries[:index], slot, *self.entries[index + 1 :])

    def remove(self, slot: int) -> bool:
        """Forget an adapter; its entry is free, and nothing is copied. True if it had one."""
        was_in = slot in self.entries
        self.entries = tuple(None if owner == slot else owner for owner in self.entries)
        for stack in self.stacks.values():
            was_in |= stack.sizes.pop(slot, None) is not None
        return was_in

    def shrink(self) -> int:
        """Give back what the adapters that are in do not need. Returns the bytes that had to be copied.

        One adapter's room is left, so that replacing one again and again moves nothing.
        """
        count = self._count()
        if count == 0:
            for stack in self.stacks.values():
                stack.clear()
            self.entries, self.num_entries = (), 0
            return 0
        needed = {path: stack.needed() for path, stack in self.stacks.items()}
        is_wide = any(needed[path] != stack.size for path, stack in self.stacks.items())
        if not is_wide and self.num_entries <= entries_for(count + 1):
            return 0
        self._resize(min(self.num_entries, entries_for(count + 1)), needed)
        return self.num_bytes

    def _resize(self, num_entries: int, sizes: Mapping[str, Size]) -> None:
        """All stacks or none: where memory ends, what was there is whole."""
        kept = [i + 1 for i, owner in enumerate(self.entries) if owner is not None]
        made = {path: stack.resized(kept, num_entries, sizes[path]) for path, stack in self.stacks.items()}
        for path, stack in self.stacks.items():
            stack.adopt(made[path], sizes[path])
        self.entries = tuple(owner for owner in self.entries if owner is not None)
        self.num_entries = num_entries

    def _count(self) -> int:
        return sum(owner is not None for owner in self.entries)


def _padded(value: mx.array, place: mx.array) -> mx.array:
    widths = [(0, target - size) for size, target in zip(value.shape, place.shape, strict=True)]
    return mx.pad(value.astype(place.dtype), widths)
