"""Which adapter each row of a forward uses: slot numbers in; what layers make of them, once for as long as rows stay.

A composition keeps the arrays of indices that its layers need, shared by all layers with the same adapters in the
same entries, and each group's plan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from serve.adapters.bank.costs import Costs

Entries = tuple[int | None, ...]
KEPT = 8
"""Compositions that are remembered: a step has up to three, decoding, prefilling, and both for the logits."""


class Holding(NamedTuple):
    """What is to be known of a stack to choose how rows are multiplied with it."""

    entries: Entries
    first: int
    """The entry of the first of them; those before are zeros."""
    weight: float
    """A product's time over that of the rank that was measured."""
    is_alone: bool
    """No other stack of its group has rows of this batch."""


class One(NamedTuple):
    """All rows of a batch have the same entry: one product."""

    entry: int


class Share(NamedTuple):
    """The rows of a batch that one stack has updates for, and the M products that they are multiplied in."""

    lhs: mx.array
    """[M] what each product takes: of the batch's rows, or of what `order` makes of them."""
    rhs: mx.array
    """[M] each product's entry."""
    every: mx.array
    """[M] 0 … M-1."""
    order: mx.array | None = None
    """[M · tile] rows that are taken together, some twice to fill a tile; None: each is multiplied where it is."""
    tile: int = 1
    """Rows in one product."""
    where: tuple[int, ...] = ()
    """[B] each row's number in the output, -1 where it has none; () where they are the batch's, in order."""
    num_rows: int = 0
    """So many of those have one."""

    @property
    def num_outputs(self) -> int:
        """Rows of the output."""
        return int(self.rhs.size) * self.tile

    def arrays(self) -> list[mx.array]:
        """What it is made of."""
        return [array for array in (self.lhs, self.rhs, self.every, self.order) if array is not None]


class Plan(Protocol):
    """How a group's layers are updated; see `plan.py`."""

    def forget(self) -> None:
        """Let go of what is kept between two layers."""

    def changed(self, index: int, x: mx.array, y: mx.array, own_bias: mx.array | None) -> mx.array:
        """A layer's output with its rows' updates."""

    def begun(self, index: int, x: mx.array, weight: mx.array, own_bias: mx.array | None) -> mx.array | None:
        """That output of the input alone, where it is cheaper made so."""


class Composition:
    """Rows and their slots, with arrays that are made once and live as long as the composition does."""

    def __init__(self, slots: Sequence[int], costs: Costs) -> None:
        self.slots = tuple(slots)
        """[B], the base's is 0."""
        self.present = frozenset(slots) - {0}
        self.size = len(self.slots)
        """B."""
        self.plans: dict[object, dict[int, Plan]] = {}
        """By group and by tokens of a row."""
        self._costs = costs
        self._rows = mx.arange(self.size, dtype=mx.uint32)
        self._indices: dict[Entries, mx.array] = {}
        self._shares: dict[tuple[Holding, int], Share | One] = {}
        self._positions: dict[tuple[tuple[tuple[int, ...], int], ...], mx.array] = {}

    @property
    def num_arrays(self) -> int:
        """Arrays made for it so far."""
        shares = [share for share in self._shares.values() if isinstance(share, Share)]
        own = {id(array) for share in shares for array in share.arrays()} - {id(self._rows)}
        return 1 + len(self._indices) + len(own) + len(self._positions)

    def index(self, entries: Entries) -> mx.array:
        """[B] uint32: each row's entry in a stack of these that begins with zeros; 0 where its slot has none."""
        found = self._indices.get(entries)
        if found is None:
            entry_of = _entry_of(entries, 1)
            found = self._indices[entries] = _indices([entry_of.get(slot, 0) for slot in self.slots])
        return found

    def share(self, holding: Holding, num_tokens: int) -> Share | One:
        """How the rows of a stack are multiplied, each of so many tokens."""
        found = self._shares.get((holding, num_tokens))
        if found is None:
            found = self._shares[holding, num_tokens] = self._make(holding, num_tokens)
        return found

    def positions(self, shares: Sequence[Share]) -> mx.array:
        """[B] uint32: each row's number in these outputs, one after the other; the next behind all if it has none."""
        key = tuple((share.where, share.num_outputs) for share in shares)
        found = self._positions.get(key)
        if found is None:
            numbers, start = np.full(self.size, -1), 0
            for share in shares:
                own = np.array(share.where)
                numbers = np.where(own >= 0, own + start, numbers)
                start += share.num_outputs
            found = self._positions[key] = mx.array(np.where(numbers < 0, start, numbers).astype(np.uint32))
        return found

    def forget(self) -> None:
        """Let go of activations that plans keep between two layers."""
        for plans in self.plans.values():
            for plan in plans.values():
                plan.forget()

    def _make(self, holding: Holding, num_tokens: int) -> Share | One:
        entry_of = _entry_of(holding.entries, holding.first)
        entry_of_row = [entry_of.get(slot, -1) for slot in self.slots]
        rows_of: dict[int, list[int]] = {}
        for row, entry in enumerate(entry_of_row):
            if entry >= 0:
                rows_of.setdefault(entry, []).append(row)
        counts = [len(rows) for rows in rows_of.values()]
        if counts == [self.size]:
            return One(entry_of_row[0])
        costs, num_base, weight = self._costs, self.size - sum(counts), holding.weight
        can_cover = holding.is_alone and (holding.first > 0 or not num_base)
        covers = can_cover and not costs.skips_base(num_base, self.size, num_tokens, weight=weight)
        zeros = [num_base] if covers and num_base else []
        tile = costs.tile([*counts, *zeros], num_tokens, weight=weight, is_placed=not covers)
        if tile == 1 and covers:
            rhs = _indices([max(entry, 0) for entry in entry_of_row])
            return Share(lhs=self._rows, rhs=rhs, every=self._rows)
        return self._tiles(sorted(rows_of.items()), tile)

    def _tiles(self, rows_of: Sequence[tuple[int, list[int]]], tile: int) -> Share:
        """Only rows that have an entry, those of one entry together."""
        where = [-1] * self.size
        order: list[int] = []
        entries: list[int] = []
        for entry, rows in rows_of:
            for start in range(0, len(rows), tile):
                own = rows[start : start + tile]
                for offset, row in enumerate(own):
                    where[row] = len(order) + offset
                order += own + own[:1] * (tile - len(own))
                entries.append(entry)
        rhs, every = _indices(entries), mx.arange(len(entries), dtype=mx.uint32)
        num_rows = sum(len(rows) for _, rows in rows_of)
        if tile == 1:
            return Share(_indices(order), rhs, every, where=tuple(where), num_rows=num_rows)
        return Share(every, rhs, every, _indices(order), tile, tuple(where), num_rows)


class RowSlots:
    """The slots of the coming forward. Set before it, read by every banked layer."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        """What compositions made from now on choose by."""
        self.composition: Composition | None = None
        """None when all rows are the base's: such a forward skips the bank."""
        self._kept: OrderedDict[tuple[int, ...], Composition] = OrderedDict()

    def set(self, slots: Sequence[int]) -> None:
        """The coming forward's rows use these slots, one a row."""
        before = self.composition
        if not any(slots):
            self.composition = None
        else:
            key = tuple(slots)
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = Composition(key, self.costs)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            self.composition = found
        if before is not None and before is not self.composition:
            before.forget()

    def drop(self, group: object) -> None:
        """Forget a group's plans: they hold its arrays, which are then changed without a copy."""
        for composition in self._every():
            composition.plans.pop(group, None)

    def forget(self) -> None:
        """Adapters have left: what was made for the entries there were is of no use."""
        self._kept.clear()
        self.composition = None

    def _every(self) -> list[Composition]:
        here = [] if self.composition is None else [self.composition]
        return [*self._kept.values(), *here]


def _entry_of(entries: Entries, first: int) -> dict[int, int]:
    return {slot: first + i for i, slot in enumerate(entries) if slot is not None}


def _indices(numbers: Sequence[int]) -> mx.array:
    return mx.array(np.array(numbers, dtype=np.uint32))
