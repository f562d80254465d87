"""Layers whose updates stand together: those that read one input, and the experts of a MoE block. No requests.

Of layers that read one input (q, k and v; gate and up) an adapter's A are one matrix, so that a step multiplies the
input once. Adapters with the same ranks there share a stack, and none is padded to another's rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from serve.adapters.bank.stack import Shapes, Stack
from serve.adapters.fitting.update import LowRank, Size
from serve.adapters.layers.lora import LANES
from serve.model.weights import linear_shape

SHARING = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Names of layers of one module that families give the same input. Where one does not, its updates are right, and
their A are multiplied more often than needed."""
NO_SIZE = Size(0, False)


class Key(NamedTuple):
    """Which stack of a group."""

    kind: Literal["low", "dense", "gain", "bias"]
    of: tuple[int, ...]
    """Ranks of all layers, whole lanes, 0 where a layer has no update; of the other kinds the layer's index."""


class Group(Protocol):
    """What the bank asks of either."""

    @property
    def paths(self) -> tuple[str, ...]: ...
    @property
    def num_bytes(self) -> int: ...
    def slot_bytes(self, slot: int) -> int: ...
    def bytes_with(self, sizes: Mapping[str, Size]) -> int: ...
    def moved_with(self, sizes: Mapping[str, Size]) -> int: ...
    def copied_with(self, sizes: Mapping[str, Size]) -> int: ...
    def install(self, slot: int, updates: Mapping[str, LowRank]) -> None: ...
    def remove(self, slot: int) -> bool: ...
    def shrink(self) -> int: ...


class LinearGroup:
    """Linear layers that read one input."""

    def __init__(self, layers: Mapping[str, nn.Module], dtype: mx.Dtype) -> None:
        self.paths = tuple(layers)
        self.outputs = tuple(linear_shape(layer)[1] for layer in layers.values())
        self.inputs = linear_shape(next(iter(layers.values())))[0]
        self.stacks: dict[Key, Stack] = {}
        self._dtype = dtype

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return sum(stack.num_bytes for stack in list(self.stacks.values()))

    def slot_bytes(self, slot: int) -> int:
        """Of one adapter's entries."""
        return sum(stack.entry_bytes for stack in list(self.stacks.values()) if slot in stack.entries)

    def bytes_with(self, sizes: Mapping[str, Size]) -> int:
        """Memory it would take with one adapter more."""
        stacks = {**self.stacks}
        needed = [stacks.pop(key) if key in stacks else self._make(key) for key in self._keys(sizes)]
        after = sum(stack.bytes_with(stack.shapes) for stack in needed)
        return after + sum(stack.num_bytes for stack in stacks.values())

    def moved_with(self, sizes: Mapping[str, Size]) -> int:
        """The largest that may be there twice meanwhile."""
        stacks = {**self.stacks}
        return max((stacks[key].num_bytes for key in self._keys(sizes) if key in stacks), default=0)

    def copied_with(self, sizes: Mapping[str, Size]) -> int:
        """Bytes of what has no room for one adapter more, and moves."""
        stacks = {**self.stacks}
        there = [stacks[key] for key in self._keys(sizes) if key in stacks]
        return sum(s.num_bytes for s in there if s.bytes_with(s.shapes) != s.num_bytes)

    def install(self, slot: int, updates: Mapping[str, LowRank]) -> None:
        """Write all that an adapter has for these layers. Evaluates."""
        for key in self._keys({path: update.size for path, update in updates.items()}):
            stack = self.stacks.get(key)
            if stack is None:
                stack = self._make(key)
            stack.put(slot, self._values(key, updates))
            self.stacks[key] = stack

    def remove(self, slot: int) -> bool:
        """Forget an adapter, and copy nothing. True if it was in."""
        return sum(stack.remove(slot) for stack in self.stacks.values()) > 0

    def shrink(self) -> int:
        """Give back what the adapters that are in do not need. Returns the bytes that had to be copied."""
        copied = sum(stack.shrink(stack.shapes) for stack in self.stacks.values())
        self.stacks = {key: stack for key, stack in self.stacks.items() if stack.count}
        return copied

    def _keys(self, sizes: Mapping[str, Size]) -> list[Key]:
        """The stacks that updates of these sizes go to."""
        every = [sizes.get(path, NO_SIZE) for path in self.paths]
        ranks = tuple(-(-size.rank // LANES) * LANES for size in every)
        keys = [Key("low", ranks)] if any(ranks) else []
        for index, size in enumerate(every):
            keys += [Key("dense", (index,))] if size.is_dense else []
            keys += [Key("gain", (index,))] if size.has_gain else []
            keys += [Key("bias", (index,))] if size.has_bias else []
        return keys

    def _make(self, key: Key) -> Stack:
        if key.kind == "low":
            b = tuple((rank, outputs) for rank, outputs in zip(key.of, self.outputs, strict=True) if rank)
            return Stack(((self.inputs, sum(key.of)), *b), self._dtype)
        outputs = self.outputs[key.of[0]]
        if key.kind == "dense":
            return Stack(((self.inputs, outputs),), self._dtype, has_zero=False)
        return Stack(((outputs,),), self._dtype)

    def _values(self, key: Key, updates: Mapping[str, LowRank]) -> list[mx.array | None]:
        if key.kind != "low":
            update = updates[self.paths[key.of[0]]]
            return [{"dense": update.b, "gain": update.gain, "bias": update.bias}[key.kind]]
        parts: list[mx.array] = []
        b: list[mx.array | None] = []
        for path, rank in zip(self.paths, key.of, strict=True):
            if rank:
                a = updates[path].a
                assert a is not None, "of a rank"
                parts.append(mx.pad(a.astype(self._dtype), [(0, 0), (0, rank - a.shape[-1])]))
                b.append(updates[path].b)
        return [parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1), *b]


class ExpertGroup:
    """All stacks of experts of one MoE block, whose entries are the same: an index is one expert's and one entry's.

    Each is as wide as its widest update.
    """

    def __init__(self, layers: Mapping[str, nn.Module], dtype: mx.Dtype) -> None:
        self.paths = tuple(layers)
        self._widths = tuple(linear_shape(layer) for layer in layers.values())
        num_experts = next(iter(layers.values())).weight.shape[0]
        self._ranks: dict[int, tuple[int, ...]] = {}  # by slot, of all layers, 0 where there is no update
        self.stack = Stack(self._shapes(self._needed()), dtype, num_experts=num_experts)

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self.stack.num_bytes

    def slot_bytes(self, slot: int) -> int:
        """Of one adapter's entry."""
        return self.stack.entry_bytes if slot in self.stack.entries else 0

    def bytes_with(self, sizes: Mapping[str, Size]) -> int:
        """Memory it would take with one adapter more."""
        return self.stack.bytes_with(self._shapes(self._needed(self._ranks_of(sizes))))

    def moved_with(self, sizes: Mapping[str, Size]) -> int:
        """The largest that may be there twice meanwhile."""
        return self.stack.num_bytes

    def copied_with(self, sizes: Mapping[str, Size]) -> int:
        """Bytes of what has no room for one adapter more, and moves."""
        return self.stack.num_bytes if self.bytes_with(sizes) != self.stack.num_bytes else 0

    def install(self, slot: int, updates: Mapping[str, LowRank]) -> None:
        """Write all that an adapter has for these layers; grow where there is no room. Evaluates."""
        ranks = self._ranks_of({path: update.size for path, update in updates.items()})
        shapes = self._shapes(self._needed(ranks))
        values: list[mx.array | None] = []
        for path in self.paths:
            update = updates.get(path)
            values += [update.a, update.b] if update is not None else [None, None]
        self.stack.put(slot, values, shapes)
        self._ranks[slot] = ranks

    def remove(self, slot: int) -> bool:
        """Forget an adapter, and copy nothing. True if it was in."""
        self._ranks.pop(slot, None)
        return self.stack.remove(slot)

    def shrink(self) -> int:
        """Give back what the adapters that are in do not need. Returns the bytes that had to be copied."""
        return self.stack.shrink(self._shapes(self._needed()))

    def is_used_by(self, slots: frozenset[int], index: int | None = None) -> bool:
        """Whether any of these slots has an update of one of the layers, or of that one."""
        used = (self._ranks[slot] for slot in slots & self._ranks.keys())
        return any(any(ranks) if index is None else ranks[index] for ranks in used)

    def factors(self, index: int) -> tuple[mx.array, mx.array]:
        """One layer's a [E, S, D, R] and b [E, S, R, O]."""
        return self.stack.arrays[2 * index], self.stack.arrays[2 * index + 1]

    def _ranks_of(self, sizes: Mapping[str, Size]) -> tuple[int, ...]:
        return tuple(sizes.get(path, NO_SIZE).rank for path in self.paths)

    def _needed(self, more: Sequence[int] | None = None) -> tuple[int, ...]:
        """Whole lanes, which gathered_update would otherwise make of them anew in each step."""
        every = [*list(self._ranks.values()), *([] if more is None else [tuple(more)])]
        widest = [max(ranks, default=0) for ranks in zip(*every, strict=True)] or [0] * len(self.paths)
        return tuple(-(-rank // LANES) * LANES for rank in widest)

    def _shapes(self, ranks: Sequence[int]) -> Shapes:
        both = zip(self._widths, ranks, strict=True)
        return tuple(shape for (inputs, outputs), rank in both for shape in ((inputs, rank), (rank, outputs)))


def input_groups(layers: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """All linear layers of a model, those that read one input together."""
    groups: list[dict[str, nn.Module]] = []
    done: set[str] = set()
    for path in layers:
        parent, _, name = path.rpartition(".")
        names = next((names for names in SHARING if name in names), (name,))
        together = [f"{parent}.{other}" if parent else other for other in names]
        inputs = linear_shape(layers[path])[0]
        inside = {p: layers[p] for p in together if p in layers and linear_shape(layers[p])[0] == inputs}
        if path not in done:
            groups.append(inside)
            done.update(inside)
    return groups
