"""Many adapters stacked beside one base, so that every row of a batch uses its own. Arrays only, no names.

Slot 0 is the base: all zeros, never written. A batch of base rows sets no slots and pays nothing; a batch of adapter
rows pays in the layers that its own adapters touch, and for lengths (DoRA) only where one of them has any.
Owned by the thread that runs the network.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from serve.adapters.fit import LowRank
from serve.adapters.lora import banked_delta
from serve.model.network import TextNetwork
from serve.model.weights import expert_modules, linear_modules, linear_shape


class RowSlots:
    """Which slot each row of the coming forward uses. Set before a forward, read by every banked layer."""

    def __init__(self) -> None:
        self.slots: mx.array | None = None
        """[B] uint32, or None when all rows are the base's."""
        self.rows: mx.array | None = None
        """[B] uint32: 0 … B-1."""
        self.present = 0
        """Bit s is set when a row uses slot s. A layer compares it with the slots it has an update for."""

    def set(self, slots: mx.array | None) -> None:
        """The coming forward's rows use these slots."""
        if slots is self.slots:
            return
        self.slots = slots
        self.present = 0
        if slots is None:
            return
        for slot in np.unique(np.asarray(slots)).tolist():  # made on the host: nothing is waited for
            self.present |= 1 << slot
        if self.rows is None or self.rows.size != slots.size:
            self.rows = mx.arange(slots.size, dtype=mx.uint32)


class Banked(nn.Module):
    """A base layer and its stack of updates; `SLOT_AXIS` of the arrays counts slots, the base's first."""

    SLOT_AXIS = 0

    def __init__(self, linear: nn.Module, rows: RowSlots, a: mx.array, b: mx.array) -> None:
        super().__init__()
        self.linear = linear
        self._rows = rows
        self._a = a
        self._b = b
        self._gain: mx.array | None = None
        self._updated = 0
        self._lengthened = 0

    def arrays(self) -> list[mx.array]:
        """The stacks there are."""
        return [self._a, self._b, *([] if self._gain is None else [self._gain])]

    def write(self, slot: int, update: LowRank | None) -> None:
        """Put an update into a slot; None clears it."""
        bit = 1 << slot
        self._updated, self._lengthened = self._updated & ~bit, self._lengthened & ~bit
        place = (slice(None),) * self.SLOT_AXIS + (slot,)
        self._a[place] = _padded(update.a, self._a[place]) if update else 0
        self._b[place] = _padded(update.b, self._b[place]) if update else 0
        if update is not None:
            self._updated |= bit
        self._write_gain(slot, update.gain if update else None)

    def _write_gain(self, slot: int, gain: mx.array | None) -> None:
        if gain is None:
            # A row of this slot beside one that has lengths must not find the last adapter's.
            if self._gain is not None:
                self._gain[slot] = 0
            return
        if self._gain is None:
            self._gain = mx.zeros((self._a.shape[self.SLOT_AXIS], gain.size), dtype=self._a.dtype)
        self._gain[slot] = gain.astype(self._a.dtype)
        self._lengthened |= 1 << slot

    def grow(self, more_slots: int, more_rank: int) -> None:
        """Make room: zeros."""
        widths = [(0, 0)] * self._a.ndim
        widths[self.SLOT_AXIS] = (0, more_slots)
        self._a = mx.pad(self._a, [*widths[:-1], (0, more_rank)])
        self._b = mx.pad(self._b, [*widths[:-2], (0, more_rank), (0, 0)])
        if self._gain is not None:
            self._gain = mx.pad(self._gain, [(0, more_slots), (0, 0)])


class BankedLinear(Banked):
    """A linear layer. `a` [S, D, R], `b` [S, R, O], `gain` [S, O]."""

    def __call__(self, x: mx.array) -> mx.array:
        """[B, ..., D] → [B, ..., O]; rows may be flattened together with their tokens."""
        y = self.linear(x)
        rows, slots = self._rows.rows, self._rows.slots
        if rows is None or slots is None or not self._rows.present & self._updated:
            return y
        by_row = x if x.ndim == 3 and x.shape[0] == rows.size else x.reshape(rows.size, -1, x.shape[-1])
        delta = banked_delta(by_row, self._a, self._b, rows, slots)
        if self._gain is None or not self._rows.present & self._lengthened:
            return y + (delta if delta.shape == y.shape else delta.reshape(y.shape))
        plain = (y - self.linear.bias if "bias" in self.linear else y).reshape(delta.shape)
        # m/‖W'‖ − 1 is stored, not m/‖W'‖: near 1 that keeps its digits in half precision, and the base's is 0.
        longer = delta + self._gain[slots][:, None] * (plain + delta)
        return y + longer.reshape(y.shape)


class Coding:
    """Whether the expert indices in flight carry slots too: index = expert · S + slot. Shared by one MoE block."""

    def __init__(self) -> None:
        self.num_slots = 0
        """S while they do, else 0."""


class BankedExperts(Banked):
    """A stack of experts. `a` [E, S, D, R], `b` [E, S, R, O]."""

    SLOT_AXIS = 1

    def __init__(self, linear: nn.Module, rows: RowSlots, a: mx.array, b: mx.array, coding: Coding) -> None:
        super().__init__(linear, rows, a, b)
        self._coding = coding

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As SwitchLinear: x [..., 1, D] and the expert of each entry → [..., 1, O]."""
        num_slots = self._coding.num_slots
        if not num_slots:
            return self.linear(x, indices, sorted_indices=sorted_indices)
        # Sorted by expert · S + slot is sorted by expert as well.
        y = self.linear(x, indices // num_slots, sorted_indices=sorted_indices)
        if not self._rows.present & self._updated:
            return y
        for stack in (self._a, self._b):
            x = mx.gather_mm(x, stack.flatten(0, 1), rhs_indices=indices, sorted_indices=sorted_indices)
        return y + x.astype(y.dtype)


class Bank:
    """All adapter weights on the device. Grows in slots and rank on demand; a module is wrapped at first use."""

    def __init__(self, network: TextNetwork) -> None:
        self.rows = RowSlots()
        self._network = network
        self._dtype = network.parameters_dtype()
        self._num_slots = 1
        self._rank = 0
        self._layers: dict[str, Banked] = {}

    @property
    def num_slots(self) -> int:
        """Slots there is memory for, the base's included."""
        return self._num_slots

    @property
    def num_bytes(self) -> int:
        """Memory of the whole bank."""
        return sum(array.nbytes for layer in self._layers.values() for array in layer.arrays())

    def install(self, slot: int, updates: Mapping[str, LowRank]) -> None:
        """Write one adapter into `slot` (≥ 1), zeros where it has no update. Evaluates before it returns.

        A forward already in flight keeps the values it started with.
        """
        assert slot >= 1, "slot 0 is the base"
        rank = max(update.rank for update in updates.values())
        self._wrap_new(updates)
        self._grow(max(self._num_slots, _power_of_two(slot + 1)), max(self._rank, rank))
        for path, layer in self._layers.items():
            layer.write(slot, updates.get(path))
        mx.eval([layer.arrays() for layer in self._layers.values()])

    def _wrap_new(self, updates: Mapping[str, LowRank]) -> None:
        new = updates.keys() - self._layers.keys()
        linears = linear_modules(self._network.module)
        for path in new & linears.keys():
            inputs, outputs = linear_shape(linears[path])
            a = mx.zeros((self._num_slots, inputs, self._rank), dtype=self._dtype)
            b = mx.zeros((self._num_slots, self._rank, outputs), dtype=self._dtype)
            self._wrap(path, BankedLinear(linears[path], self.rows, a, b))
        for block in {path.rpartition(".")[0] for path in new - linears.keys()}:
            self._wrap_experts(block)

    def _wrap_experts(self, block: str) -> None:
        """All expert stacks of a MoE block at once: those without an update must read coded indices too."""
        coding = Coding()
        layers = {}
        for path, experts in expert_modules(self._network.module).items():
            if path.rpartition(".")[0] == block:
                inputs, outputs = linear_shape(experts)
                shape = (experts.weight.shape[0], self._num_slots)
                a = mx.zeros((*shape, inputs, self._rank), dtype=self._dtype)
                b = mx.zeros((*shape, self._rank, outputs), dtype=self._dtype)
                layers[path] = BankedExperts(experts, self.rows, a, b, coding)
        for path, layer in layers.items():
            self._wrap(path, layer)
        _code_slots(_at(self._network.module, block), list(layers.values()), self.rows, coding)

    def _wrap(self, path: str, layer: Banked) -> None:
        parent, _, name = path.rpartition(".")
        setattr(_at(self._network.module, parent), name, layer)
        self._layers[path] = layer

    def _grow(self, num_slots: int, rank: int) -> None:
        more_slots, more_rank = num_slots - self._num_slots, rank - self._rank
        if more_slots == 0 and more_rank == 0:
            return
        for layer in self._layers.values():
            layer.grow(more_slots, more_rank)
        mx.eval([layer.arrays() for layer in self._layers.values()])
        self._num_slots, self._rank = num_slots, rank


def _code_slots(switch: nn.Module, layers: list[BankedExperts], rows: RowSlots, coding: Coding) -> None:
    """Make a SwitchGLU send each entry's slot along with its expert, so that its own sort keeps them together.

    This one instance gets a subclass of its class; the class itself is never touched.
    """
    kind = type(switch)

    def call(self: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
        slots = rows.slots
        if slots is None or not any(rows.present & layer._updated for layer in layers):
            return kind.__call__(self, x, indices)
        num_slots = layers[0]._a.shape[1]
        own = mx.broadcast_to(slots[:, None], (slots.size, indices.size // slots.size))
        coding.num_slots = num_slots
        try:
            return kind.__call__(self, x, indices * num_slots + own.reshape(indices.shape))
        finally:
            coding.num_slots = 0

    switch.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def _padded(value: mx.array, place: mx.array) -> mx.array:
    widths = [(0, target - size) for size, target in zip(value.shape, place.shape, strict=True)]
    return mx.pad(value.astype(place.dtype), widths)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _at(root: nn.Module, path: str) -> nn.Module:
    found: object = root
    for part in path.split(".") if path else []:
        found = found[int(part)] if isinstance(found, list) else found[part]  # type: ignore[index]
    assert isinstance(found, nn.Module), f"{path} is a module"
    return found
