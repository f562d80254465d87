"""Which adapter each row of a forward uses: slot numbers in, the arrays that layers need of them out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

Entries = tuple[int | None, ...]
KEPT = 8
"""Compositions that are remembered: a step has up to three, decoding, prefilling, and both for the logits."""


class Composition:
    """Rows and their slots, with arrays that are made once and live as long as the composition does."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.slots = tuple(slots)
        """[B], the base's is 0."""
        self.present = frozenset(slots) - {0}
        self.rows = mx.arange(len(slots), dtype=mx.uint32)
        """[B]: 0 … B-1."""
        self._indices: dict[Entries, mx.array] = {}

    @property
    def num_arrays(self) -> int:
        """Arrays made for it so far."""
        return 1 + len(self._indices)

    def index(self, entries: Entries) -> mx.array:
        """[B] uint32: each row's entry in a stack of these; 0, the base's, where its slot has none."""
        found = self._indices.get(entries)
        if found is None:
            entry_of = {slot: i + 1 for i, slot in enumerate(entries) if slot is not None}
            found = mx.array(np.array([entry_of.get(slot, 0) for slot in self.slots], dtype=np.uint32))
            self._indices[entries] = found
        return found


class RowSlots:
    """The slots of the coming forward. Set before it, read by every banked layer."""

    def __init__(self) -> None:
        self.composition: Composition | None = None
        """None when all rows are the base's: such a forward skips the bank."""
        self._kept: OrderedDict[tuple[int, ...], Composition] = OrderedDict()

    def set(self, slots: Sequence[int]) -> None:
        """The coming forward's rows use these slots, one a row."""
        if not any(slots):
            self.composition = None
            return
        key = tuple(slots)
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = Composition(key)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        self.composition = found

    def forget(self) -> None:
        """Adapters have left: what was made for the entries there were is of no use."""
        self._kept.clear()
        self.composition = None
