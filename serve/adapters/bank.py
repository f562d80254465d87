"""Many adapters stacked beside one base, so that every row of a batch uses its own. Arrays only, no names.

A slot is the number of one adapter version, never given twice; 0 is the base. A batch of base rows pays nothing; a
batch of adapter rows pays in the layers that its own adapters touch, for the largest rank that is in there, and for
lengths (DoRA) only where one of them has any. Memory is of the adapters that are in, layer by layer.
Owned by the thread that runs the network; what may be called from any thread says so.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from serve.adapters.fit import LowRank, Size
from serve.adapters.lora import LANES, banked_delta, gathered_update
from serve.adapters.slots import RowSlots
from serve.adapters.stack import Group, Stack
from serve.model.network import Network
from serve.model.weights import expert_modules, linear_modules, linear_shape

logger = logging.getLogger(__name__)

BYTES_AT_ONCE = 256 << 20


class Banked(nn.Module):
    """A base layer, its stack of updates, and the group whose entries the stack has."""

    wraps_linear = True

    def __init__(self, linear: nn.Module, rows: RowSlots, stack: Stack, group: Group) -> None:
        super().__init__()
        self.linear = linear
        self._rows = rows
        self._stack = stack
        self._group = group


class BankedLinear(Banked):
    """A linear layer."""

    def __call__(self, x: mx.array) -> mx.array:
        """[B, ..., D] → [B, ..., O]; rows may be flattened together with their tokens."""
        y = self.linear(x)
        composition, stack = self._rows.composition, self._stack
        if composition is None or not stack.is_used_by(composition.present):
            return y
        rows, index = composition.rows, composition.index(self._group.entries)
        by_row = x if x.ndim == 3 and x.shape[0] == rows.size else x.reshape(rows.size, -1, x.shape[-1])
        delta = banked_delta(by_row, stack.a, stack.b, rows, index)
        gain = stack.gain_of(composition.present)
        if gain is None:
            return y + (delta if delta.shape == y.shape else delta.reshape(y.shape))
        plain = (y - self.linear.bias if "bias" in self.linear else y).reshape(delta.shape)
        # m/‖W'‖ − 1 is stored, not m/‖W'‖: near 1 that keeps its digits in half precision, and the base's is 0.
        longer = delta + gain[index][:, None] * (plain + delta)
        return y + longer.reshape(y.shape)


class Coding:
    """Whether the expert indices in flight carry entries too: index = expert · S + entry. Shared by one MoE block."""

    def __init__(self) -> None:
        self.num_entries = 0
        """S while they do, else 0."""


class BankedExperts(Banked):
    """A stack of experts."""

    def __init__(self, linear: nn.Module, rows: RowSlots, stack: Stack, group: Group, coding: Coding) -> None:
        super().__init__(linear, rows, stack, group)
        self._coding = coding

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As SwitchLinear: x [..., 1, D] and the expert of each entry → [..., 1, O]."""
        num_entries = self._coding.num_entries
        if not num_entries:
            return self.linear(x, indices, sorted_indices=sorted_indices)
        # Sorted by expert · S + entry is sorted by expert as well.
        y = self.linear(x, indices // num_entries, sorted_indices=sorted_indices)
        composition, stack = self._rows.composition, self._stack
        if composition is None or not stack.is_used_by(composition.present):
            return y
        a, b = stack.a.flatten(0, 1), stack.b.flatten(0, 1)
        update = gathered_update(x, a, b, rhs_indices=indices, sorted_indices=sorted_indices)
        return y + update.astype(y.dtype)


class Bank:
    """All adapter weights on the device. A module is wrapped at first use, and its stack is as large as is needed."""

    def __init__(self, network: Network) -> None:
        self.rows = RowSlots()
        self.num_changes = 0
        """Grows whenever `num_bytes` may be another: for the thread that owns the bank."""
        self.bytes_at_once = BYTES_AT_ONCE
        """Copied between two steps, in install or tidy: the longest a running stream is held up. One layer more at
        most."""
        self._network = network
        self._dtype = network.parameters_dtype()
        self._groups: dict[str, Group] = {}  # by module path
        self._slots: set[int] = set()
        self._leaving: deque[int] = deque()  # from any thread: slots that nobody uses any more
        self._loose: dict[Group, None] = {}  # groups that may have more than they need

    def warm_up(self, num_tokens: int) -> None:
        """Run an update of one row once, of one token and of `num_tokens`.

        Where kernels are compiled at first use (seconds on CUDA), a running stream then does not wait for them.
        """
        linear = next(iter(linear_modules(self._network.module).values()))
        inputs, outputs = linear_shape(linear)
        a = mx.zeros((2, inputs, LANES), dtype=self._dtype)
        b = mx.zeros((2, LANES, outputs), dtype=self._dtype)
        one = mx.ones(1, dtype=mx.uint32)
        for length in (1, num_tokens):
            x = mx.zeros((1, length, inputs), dtype=self._dtype)
            mx.eval(banked_delta(x, a, b, one - 1, one))

    @property
    def slots(self) -> frozenset[int]:
        """Slots that adapters are in. From any thread."""
        return frozenset(self._slots.copy()) - set(self._leaving.copy())

    @property
    def num_bytes(self) -> int:
        """Memory of the whole bank. From any thread."""
        return sum(group.num_bytes for group in self._distinct())

    def slot_bytes(self, slot: int) -> int:
        """Memory of one adapter's entries. From any thread."""
        return sum(
            stack.num_bytes(1, stack.size)
            for group in self._distinct()
            if slot in group.entries
            for stack in group.stacks.values()
        )

    def peak_bytes(self, sizes: Mapping[str, Size]) -> int:
        """Memory of the bank with an adapter of these sizes added, and of the largest copy that is made meanwhile.

        From any thread but while another adapter is installed.
        """
        total, largest = 0, 0
        new = dict(sizes)
        for group in self._distinct():
            added = {path: new.pop(path) for path in group.stacks.keys() & new.keys()}
            now = group.num_bytes
            after = group.bytes_with(added) if added else now
            total += after
            largest = max(largest, now if added else 0)
        for group in self._unwrapped(new):
            total += group.bytes_with({path: new[path] for path in group.stacks.keys() & new.keys()})
        return total + largest

    def parts(self, updates: Mapping[str, LowRank]) -> Iterator[dict[str, LowRank]]:
        """The updates in parts for `install`, each of as many layers as may be copied at once."""
        part: dict[str, LowRank] = {}
        num_bytes = 0
        for path, update in sorted(updates.items()):
            group = self._groups.get(path)
            block = path.rpartition(".")[0]
            is_same_block = any(p.rpartition(".")[0] == block for p in part)
            if num_bytes > self.bytes_at_once and not is_same_block:
                yield part
                part, num_bytes = {}, 0
            part[path] = update
            num_bytes += sum(array.nbytes for array in update.arrays().values())
            if group is not None and (now := group.num_bytes) != group.bytes_with({path: update.size}):
                num_bytes += now  # it has no room, and moves
        yield part

    def install(self, slot: int, updates: Mapping[str, LowRank]) -> None:
        """Write updates of an adapter. A MoE block's come together. Evaluates before it returns."""
        assert slot >= 1, "slot 0 is the base"
        self.num_changes += 1
        self._slots.add(slot)
        self._wrap_new(updates)
        for group in {self._groups[path]: None for path in updates}:
            group.install(slot, {path: updates[path] for path in group.stacks if path in updates})

    def leave(self, slot: int) -> None:
        """Nobody uses `slot` any more; `tidy` gives its memory back. From any thread."""
        self._leaving.append(slot)

    @property
    def tidy_is_due(self) -> bool:
        """Whether `tidy` has something to do. From any thread."""
        return bool(self._leaving or self._loose)

    def tidy(self) -> bool:
        """Give back what adapters that left have held, about as much as may be copied between two steps.

        Returns whether there is more to do.
        """
        self.num_changes += 1
        if self.tidy_is_due:
            self.rows.forget()
        while self._leaving:
            slot = self._leaving[0]
            self._loose.update((group, None) for group in self._distinct() if group.remove(slot))
            self._slots.discard(slot)
            self._leaving.popleft()
        num_bytes = 0
        while self._loose and num_bytes <= self.bytes_at_once:
            group, _ = self._loose.popitem()
            try:
                num_bytes += group.shrink()
            except (RuntimeError, MemoryError) as error:
                logger.warning(
                    "memory of adapters that left is kept: there is none to move the others: %s", error
                )
        return bool(self._loose)

    def _distinct(self) -> list[Group]:
        return list(dict.fromkeys(list(self._groups.values())))

    def _unwrapped(self, paths: Mapping[str, object]) -> list[Group]:
        """Groups as they would be made for modules that are not wrapped yet."""
        linears, experts = linear_modules(self._network.module), expert_modules(self._network.module)
        groups = [Group({path: Stack(linears[path], self._dtype)}) for path in paths if path in linears]
        for block in {path.rpartition(".")[0] for path in paths if path in experts}:
            inside = {path: layer for path, layer in experts.items() if path.rpartition(".")[0] == block}
            groups.append(Group({path: Stack(layer, self._dtype) for path, layer in inside.items()}))
        return groups

    def _wrap_new(self, updates: Mapping[str, LowRank]) -> None:
        new = dict.fromkeys(sorted(updates.keys() - self._groups.keys()))
        layers = (
            {**linear_modules(self._network.module), **expert_modules(self._network.module)} if new else {}
        )
        for group in self._unwrapped(new):
            first = next(iter(group.stacks))
            if first in expert_modules(self._network.module):
                self._wrap_experts(group, layers)
            else:
                self._wrap(first, BankedLinear(layers[first], self.rows, group.stacks[first], group), group)

    def _wrap_experts(self, group: Group, layers: Mapping[str, nn.Module]) -> None:
        """All expert stacks of a MoE block at once: those without an update must read coded indices too."""
        coding = Coding()
        for path, stack in group.stacks.items():
            self._wrap(path, BankedExperts(layers[path], self.rows, stack, group, coding), group)
        block = next(iter(group.stacks)).rpartition(".")[0]
        _code_entries(_at(self._network.module, block), group, self.rows, coding)

    def _wrap(self, path: str, layer: Banked, group: Group) -> None:
        # Also where the parent is a list of layers.
        self._network.module.update_modules(tree_unflatten([(path, layer)]))
        self._groups[path] = group


def _code_entries(switch: nn.Module, group: Group, rows: RowSlots, coding: Coding) -> None:
    """Make a SwitchGLU send each token's entry in the stacks along with its expert, so that its own sort keeps them
    together.

    This one instance gets a subclass of its class; the class itself is never touched.
    """
    kind = type(switch)

    def call(self: nn.Module, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        composition = rows.composition
        stacks = group.stacks.values()
        # mlx-vlm's blocks call themselves for each of a few tokens: the indices are coded then.
        is_coded = coding.num_entries > 0
        if (
            is_coded
            or composition is None
            or not any(stack.is_used_by(composition.present) for stack in stacks)
        ):
            return kind.__call__(self, x, indices, *args, **kwargs)
        own_entries = composition.index(group.entries)
        own = mx.broadcast_to(own_entries[:, None], (own_entries.size, indices.size // own_entries.size))
        coding.num_entries = group.num_entries
        try:
            coded = indices * group.num_entries + own.reshape(indices.shape)
            return kind.__call__(self, x, coded, *args, **kwargs)
        finally:
            coding.num_entries = 0

    switch.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def _at(root: nn.Module, path: str) -> nn.Module:
    found: object = root
    for part in path.split(".") if path else []:
        found = found[int(part)] if isinstance(found, list) else found[part]  # type: ignore[index]
    assert isinstance(found, nn.Module), f"{path} is a module"
    return found
