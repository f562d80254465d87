"""Many adapters stacked beside one base, so that every row of a batch uses its own. Arrays only, no names.

Slot 0 is the base: all zeros, never written. A batch of base rows sets no slots and pays nothing.
Owned by the thread that runs the network.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from serve.adapters.fit import LowRank, linear_modules
from serve.adapters.lora import banked_delta, linear_shape
from serve.model.network import TextNetwork


class RowSlots:
    """Which slot each row of the coming forward uses. Set before a forward, read by every banked layer."""

    def __init__(self) -> None:
        self.slots: mx.array | None = None
        """[B] uint32, or None when all rows are the base's."""
        self.rows: mx.array | None = None
        """[B] uint32: 0 … B-1."""

    def set(self, slots: mx.array | None) -> None:
        """The coming forward's rows use these slots."""
        self.slots = slots
        if slots is not None and (self.rows is None or self.rows.size != slots.size):
            self.rows = mx.arange(slots.size, dtype=mx.uint32)


class BankedLinear(nn.Module):
    """A base layer and its stack of updates. `a` [S, D, R], `b` [S, R, O]."""

    def __init__(self, linear: nn.Module, rows: RowSlots, a: mx.array, b: mx.array) -> None:
        super().__init__()
        self.linear = linear
        self._rows = rows
        self._a = a
        self._b = b

    def __call__(self, x: mx.array) -> mx.array:
        """[B, ..., D] → [B, ..., O]."""
        y = self.linear(x)
        rows, slots = self._rows.rows, self._rows.slots
        if rows is None or slots is None:
            return y
        if x.ndim == 3:
            return y + banked_delta(x, self._a, self._b, rows, slots)
        flat = x.reshape(x.shape[0], -1, x.shape[-1])
        return y + banked_delta(flat, self._a, self._b, rows, slots).reshape(y.shape)


class Bank:
    """All adapter weights on the device. Grows in slots and rank on demand; a module is wrapped at first use."""

    def __init__(self, network: TextNetwork) -> None:
        self.rows = RowSlots()
        self._network = network
        self._dtype = network.parameters_dtype()
        self._num_slots = 1
        self._rank = 0
        self._layers: dict[str, BankedLinear] = {}

    @property
    def num_slots(self) -> int:
        """Slots there is memory for, the base's included."""
        return self._num_slots

    @property
    def num_bytes(self) -> int:
        """Memory of the whole bank."""
        return sum(layer._a.nbytes + layer._b.nbytes for layer in self._layers.values())

    def install(self, slot: int, updates: Mapping[str, LowRank]) -> None:
        """Write one adapter into `slot` (≥ 1), zeros where it has no update. Evaluates before it returns.

        A forward already in flight keeps the values it started with.
        """
        assert slot >= 1, "slot 0 is the base"
        rank = max(update.a.shape[1] for update in updates.values())
        self._wrap_new(updates)
        self._grow(max(self._num_slots, _power_of_two(slot + 1)), max(self._rank, rank))
        for path, layer in self._layers.items():
            update = updates.get(path)
            layer._a[slot] = _padded(update.a, layer._a.shape[1:], self._dtype) if update else 0
            layer._b[slot] = _padded(update.b, layer._b.shape[1:], self._dtype) if update else 0
        mx.eval([(layer._a, layer._b) for layer in self._layers.values()])

    def _wrap_new(self, updates: Mapping[str, LowRank]) -> None:
        linears = linear_modules(self._network.module)
        for path in updates.keys() - self._layers.keys():
            inputs, outputs = linear_shape(linears[path])
            a = mx.zeros((self._num_slots, inputs, self._rank), dtype=self._dtype)
            b = mx.zeros((self._num_slots, self._rank, outputs), dtype=self._dtype)
            layer = BankedLinear(linears[path], self.rows, a, b)
            _replace(self._network.module, path, layer)
            self._layers[path] = layer

    def _grow(self, num_slots: int, rank: int) -> None:
        more_slots, more_rank = num_slots - self._num_slots, rank - self._rank
        if more_slots == 0 and more_rank == 0:
            return
        for layer in self._layers.values():
            layer._a = mx.pad(layer._a, [(0, more_slots), (0, 0), (0, more_rank)])
            layer._b = mx.pad(layer._b, [(0, more_slots), (0, more_rank), (0, 0)])
        mx.eval([(layer._a, layer._b) for layer in self._layers.values()])
        self._num_slots, self._rank = num_slots, rank


def _padded(value: mx.array, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    widths = [(0, target - size) for size, target in zip(value.shape, shape, strict=True)]
    return mx.pad(value.astype(dtype), widths)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _replace(root: nn.Module, path: str, new: nn.Module) -> None:
    parent_path, _, name = path.rpartition(".")
    parent: object = root
    for part in parent_path.split(".") if parent_path else []:
        parent = parent[int(part)] if isinstance(parent, list) else parent[part]  # type: ignore[index]
    setattr(parent, name, new)
