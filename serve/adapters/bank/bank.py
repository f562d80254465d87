"""Many adapters stacked beside one base, so that every row of a batch uses its own. Arrays only, no names.

A slot is the number of one adapter version, never given twice; 0 is the base. A batch of base rows pays nothing; a
batch of adapter rows pays in the layers that its own adapters touch, for the ranks that they have there, and for
lengths (DoRA), whole differences and biases where it has any. Memory is of the adapters that are in, as they are.
Owned by the thread that runs the network; what may be called from any thread says so.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from serve import device
from serve.adapters.bank import fused
from serve.adapters.bank.costs import ON_CPU, ON_GPU, Costs, measure
from serve.adapters.bank.group import ExpertGroup, Group, LinearGroup, input_groups
from serve.adapters.bank.plan import LONG, GroupPlan
from serve.adapters.bank.slots import Composition, Plan, RowSlots
from serve.adapters.fitting.paths import adaptable_modules, module_at
from serve.adapters.fitting.update import LowRank, Size
from serve.adapters.layers.lora import LANES, gathered, gathered_update
from serve.errors import AdapterError
from serve.model.network import Network
from serve.model.weights import expert_modules, linear_modules, linear_shape

logger = logging.getLogger(__name__)

BYTES_AT_ONCE = 16 << 20
"""Some milliseconds of a CPU's memory, less than the shortest step there."""


class Banked(nn.Module):
    """A base layer, the group that has its updates, and its number there."""

    wraps_linear = True

    def __init__(self, linear: nn.Module, rows: RowSlots, group: Group, index: int) -> None:
        super().__init__()
        self.linear = linear
        self._rows = rows
        self._group = group
        self._index = index


class BankedLinear(Banked):
    """A linear layer."""

    def __call__(self, x: mx.array) -> mx.array:
        """[B, ..., D] → [B, ..., O]; rows may be flattened together with their tokens."""
        linear = self["linear"]
        composition = self._rows.composition
        if composition is None:
            return linear(x)
        plan = _plan(self._group, composition, x)
        if x.dtype == mx.float32 and _is_plain(linear):
            y = plan.begun(self._index, x, linear.weight, linear.get("bias"))
            if y is not None:
                return y
        return plan.changed(self._index, x, linear(x), linear.get("bias"))


def _is_plain(linear: nn.Module) -> bool:
    """Whether its product may begin with something else than zeros: measured on CPU, where it saves half of what
    updates add to mixed prompts."""
    return type(linear) is nn.Linear and linear.weight.dtype == mx.float32 and device.backend() == "cpu"


def _plan(group: Group, composition: Composition, x: mx.array) -> Plan:
    num_tokens = min(x.size // (composition.size * x.shape[-1]), LONG)
    plans = composition.plans.get(group)
    if plans is None:
        plans = composition.plans[group] = {}
    plan = plans.get(num_tokens)
    if plan is None:
        assert isinstance(group, LinearGroup), "experts have none"
        plan = plans[num_tokens] = GroupPlan(group, composition, num_tokens)
    return plan


class BankedHead(Banked):
    """Embeddings that are the head too: the updates are the head's, and no embedding's."""

    def __call__(self, tokens: mx.array) -> mx.array:
        """As the embeddings."""
        return self["linear"](tokens)

    def as_linear(self, x: mx.array) -> mx.array:
        """[B, ..., D] → [B, ..., V]; rows may be flattened together with their tokens."""
        y = self["linear"].as_linear(x)
        composition = self._rows.composition
        if composition is None:
            return y
        return _plan(self._group, composition, x).changed(self._index, x, y, None)


class Coding:
    """Whether the expert indices in flight carry entries too: index = expert · S + entry. Shared by one MoE block."""

    def __init__(self) -> None:
        self.num_entries = 0
        """S while they do, else 0."""


class BankedExperts(Banked):
    """A stack of experts."""

    def __init__(
        self, linear: nn.Module, rows: RowSlots, group: ExpertGroup, index: int, coding: Coding
    ) -> None:
        super().__init__(linear, rows, group, index)
        self._coding = coding

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """As SwitchLinear: x [..., 1, D] and the expert of each entry → [..., 1, O]."""
        num_entries = self._coding.num_entries
        if not num_entries:
            return self.linear(x, indices, sorted_indices=sorted_indices)
        # Sorted by expert · S + entry is sorted by expert as well.
        y = self.linear(x, indices // num_entries, sorted_indices=sorted_indices)
        composition, group = self._rows.composition, self._group
        assert isinstance(group, ExpertGroup)
        if composition is None or not group.is_used_by(composition.present, self._index):
            return y
        a, b = (factor.flatten(0, 1) for factor in group.factors(self._index))
        update = gathered_update(x, a, b, rhs_indices=indices, sorted_indices=sorted_indices)
        return y + update.astype(y.dtype)


class Bank:
    """All adapter weights on the device. A module is wrapped at first use, and memory taken as it is needed."""

    def __init__(self, network: Network, costs: Costs | None = None) -> None:
        """`costs`: by which forms are chosen; those of this backend until `measure`, if left out."""
        self.rows = RowSlots(costs or (ON_CPU if device.backend() == "cpu" else ON_GPU))
        self.num_changes = 0
        """Grows whenever `num_bytes` may be another: for the thread that owns the bank."""
        self.bytes_at_once = BYTES_AT_ONCE
        """Copied between two steps, in install or tidy: the longest a running stream is held up. One group of layers
        more at most."""
        self._network = network
        self._dtype = network.parameters_dtype()
        self._groups: dict[str, Group] = {}  # by module path
        self._slots: set[int] = set()
        self._leaving: deque[int] = deque()  # from any thread: slots that nobody uses any more
        self._loose: dict[Group, None] = {}  # groups that may have more than they need

    def measure(self) -> None:
        """Choose forms by what they take on this machine: some ten milliseconds on a CPU.

        Before it, and where nobody calls it, they are chosen by what was measured elsewhere, always alike.
        """
        self.rows.costs = measure(*self._common_shape(), self._dtype)
        self.rows.forget()
        logger.debug("what adapters' updates take here: %s", self.rows.costs)

    def warm_up(self, num_tokens: int) -> None:
        """Run an update of one row once, of one token and of `num_tokens`.

        Where kernels are compiled at first use (seconds on CUDA), a running stream then does not wait for them.
        """
        inputs, outputs = self._common_shape()
        a = mx.zeros((2, inputs, LANES), dtype=self._dtype)
        b = mx.zeros((2, LANES, outputs), dtype=self._dtype)
        one = mx.ones(1, dtype=mx.uint32)
        for length in (1, num_tokens):
            x = mx.zeros((1, length, inputs), dtype=self._dtype)
            mx.eval(gathered(gathered(x, a, one - 1, one), b, one - 1, one))
            if fused.takes(length, LANES, outputs):
                y = mx.zeros((1, length, outputs), dtype=self._dtype)
                mx.eval(fused.updated(y, x, a, b, one, fused.layout(0, length)))

    @property
    def slots(self) -> frozenset[int]:
        """Slots that adapters are in. From any thread."""
        return frozenset(self._slots.copy()) - set(self._leaving.copy())

    @property
    def num_bytes(self) -> int:
        """Memory of the whole bank. From any thread."""
        return sum(group.num_bytes for group in self._distinct())

    def peak_bytes(self, sizes: Mapping[str, Size]) -> int:
        """Memory of the bank with an adapter of these sizes added, and of the largest copy that is made meanwhile.

        From any thread but while another adapter is installed.
        """
        groups = self._distinct()
        known = {path for group in groups for path in group.paths}
        groups += self._unwrapped(sizes.keys() - known)
        total, largest = 0, 0
        for group in groups:
            added = {path: sizes[path] for path in group.paths if path in sizes}
            total += group.bytes_with(added) if added else group.num_bytes
            largest = max(largest, group.moved_with(added) if added else 0)
        return total + largest

    def slot_bytes(self, slot: int) -> int:
        """Memory of one adapter's own updates. From any thread."""
        return sum(group.slot_bytes(slot) for group in self._distinct())

    def parts(self, updates: Mapping[str, LowRank]) -> Iterator[dict[str, LowRank]]:
        """The updates in parts for `install`, each of as many layers as may be copied at once; from any thread.

        A group's come together.
        """
        part: dict[str, LowRank] = {}
        num_bytes = 0
        new = self._unwrapped(updates.keys() - self._groups.keys())
        for group in [*{self._groups[path]: None for path in updates if path in self._groups}, *new]:
            inside = {path: updates[path] for path in group.paths if path in updates}
            own = sum(array.nbytes for update in inside.values() for array in update.arrays().values())
            # What has no room for one more moves.
            own += group.copied_with({path: update.size for path, update in inside.items()})
            if part and num_bytes + own > self.bytes_at_once:
                yield part
                part, num_bytes = {}, 0
            part |= inside
            num_bytes += own
        yield part

    def install(self, slot: int, updates: Mapping[str, LowRank]) -> None:
        """Write updates of an adapter. A group's come together. Evaluates before it returns."""
        assert slot >= 1, "slot 0 is the base"
        self.num_changes += 1
        self._slots.add(slot)
        self._wrap_new(updates)
        for group in {self._groups[path]: None for path in updates}:
            self.rows.drop(group)
            group.install(slot, {path: updates[path] for path in group.paths if path in updates})

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
            self.rows.drop(group)
            try:
                num_bytes += group.shrink()
            except (RuntimeError, MemoryError) as error:
                logger.warning(
                    "memory of adapters that left is kept: there is none to move the others: %s", error
                )
        return bool(self._loose)

    def _common_shape(self) -> tuple[int, int]:
        """Inputs and outputs that most linear layers have."""
        shapes = Counter(linear_shape(linear) for linear in linear_modules(self._network.module).values())
        return shapes.most_common(1)[0][0]

    def _distinct(self) -> list[Group]:
        return list(dict.fromkeys(list(self._groups.values())))

    def _unwrapped(self, paths: Collection[str]) -> list[Group]:
        """Groups as they would be made for modules that are not wrapped yet."""
        if not paths:
            return []
        made: list[Group] = [
            LinearGroup(layers, self._dtype) for layers in self._inputs if not layers.keys().isdisjoint(paths)
        ]
        blocks = {path.rpartition(".")[0]: None for path in self._experts if path in paths}
        for block in blocks:
            inside = {p: layer for p, layer in self._experts.items() if p.rpartition(".")[0] == block}
            made.append(ExpertGroup(inside, self._dtype))
        return made

    @cached_property
    def _inputs(self) -> list[dict[str, nn.Module]]:
        """Linear layers as the model was loaded with, those that read one input together; and a tied head."""
        every = adaptable_modules(self._network)
        return input_groups({path: layer for path, layer in every.items() if path not in self._experts})

    @cached_property
    def _experts(self) -> dict[str, nn.Module]:
        return expert_modules(self._network.module)

    def _wrap_new(self, updates: Mapping[str, LowRank]) -> None:
        for group in self._unwrapped(updates.keys() - self._groups.keys()):
            if isinstance(group, ExpertGroup):
                self._wrap_experts(group)
                continue
            [layers] = [layers for layers in self._inputs if group.paths[0] in layers]
            for index, path in enumerate(group.paths):
                if path in self._network.tied_head:
                    self._wrap_head(path, BankedHead(layers[path], self.rows, group, index))
                else:
                    self._wrap(path, BankedLinear(layers[path], self.rows, group, index))

    def _wrap_head(self, path: str, head: BankedHead) -> None:
        """Raises AdapterError where the family multiplies by its embeddings' weight without asking them."""
        self._wrap(path, head)
        inputs = linear_shape(head.linear)[0]
        self.rows.set([])
        try:
            self._network.logits(mx.zeros((1, 1, inputs), dtype=self._dtype))
        except AttributeError:
            del self._groups[path]
            place = self._network.tied_head[path]
            self._network.module.update_modules(tree_unflatten([(place, head.linear)]))
            raise AdapterError(
                f"{path}: {type(self._network.text).__module__} multiplies by its embeddings where other families "
                f"have a head, and an update cannot stand beside that; leave the head out of the adapter"
            ) from None

    def _wrap_experts(self, group: ExpertGroup) -> None:
        """All expert stacks of a MoE block at once: those without an update must read coded indices too."""
        coding = Coding()
        for index, path in enumerate(group.paths):
            self._wrap(path, BankedExperts(self._experts[path], self.rows, group, index, coding))
        block = group.paths[0].rpartition(".")[0]
        _code_entries(module_at(self._network.module, block), group, self.rows, coding)

    def _wrap(self, path: str, layer: Banked) -> None:
        # Also where the parent is a list of layers.
        place = self._network.tied_head.get(path, path)
        self._network.module.update_modules(tree_unflatten([(place, layer)]))
        self._groups[path] = layer._group


def _code_entries(switch: nn.Module, group: ExpertGroup, rows: RowSlots, coding: Coding) -> None:
    """Make a SwitchGLU send each token's entry in the stacks along with its expert, so that its own sort keeps them
    together.

    This one instance gets a subclass of its class; the class itself is never touched.
    """
    kind = type(switch)

    def call(self: nn.Module, x: mx.array, indices: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        composition = rows.composition
        # mlx-vlm's blocks call themselves for each of a few tokens: the indices are coded then.
        is_coded = coding.num_entries > 0
        if is_coded or composition is None or not group.is_used_by(composition.present):
            return kind.__call__(self, x, indices, *args, **kwargs)
        own_entries = composition.index(group.stack.entries)
        own = mx.broadcast_to(own_entries[:, None], (own_entries.size, indices.size // own_entries.size))
        coding.num_entries = group.stack.num_entries
        try:
            coded = indices * group.stack.num_entries + own.reshape(indices.shape)
            return kind.__call__(self, x, coded, *args, **kwargs)
        finally:
            coding.num_entries = 0

    switch.__class__ = type(kind.__name__, (kind,), {"__call__": call})
