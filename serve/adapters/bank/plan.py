"""How the layers of one group are updated in one composition: made once, run in every forward.

Whatever the form, a row's output is y + x A B of its own adapter: `costs.py` says which form is taken when.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx

from serve import device
from serve.adapters.bank import fused
from serve.adapters.bank.costs import RANK
from serve.adapters.bank.group import Key, LinearGroup
from serve.adapters.bank.slots import Composition, Holding, One, Share
from serve.adapters.bank.stack import Stack
from serve.adapters.layers.lora import gathered

LONG = 64
"""Rows of more tokens than so many are all treated alike."""


class Low(NamedTuple):
    """A stack of low-rank updates that rows of the batch use."""

    share: Share | One
    a: mx.array
    """[S, D, R], or [D, R] of the one entry that all rows have; R: of all layers, one after the other."""
    cuts: list[int]
    """Where the ranks of one layer end and those of the next begin."""


class Source(NamedTuple):
    """What a layer's updates of some rows are multiplied with."""

    share: Share | One
    b: mx.array
    """[S, R, O], or [R, O] of the one entry that all rows have."""
    low: int
    """The number of the stack that has its A; -1: there is none, and b [S, D, O] takes the input itself."""
    part: int = 0
    """The layer's number among those with ranks in that stack."""


class Step(NamedTuple):
    """One stack's updates of a layer, added by one kernel. See `fused.updated`."""

    a: mx.array
    b: mx.array
    entries: mx.array
    where: mx.array


class Change(NamedTuple):
    """What is done to a layer's output."""

    sources: tuple[Source, ...]
    positions: mx.array | None
    """[B] each row's number in the sources' outputs; None where they are the batch's rows, in order."""
    has_idle: bool
    """Some rows have none of the sources: they get zeros."""
    gain: tuple[mx.array, mx.array] | None
    """[S, O], and each row's entry."""
    bias: tuple[mx.array, mx.array] | None
    reads_low: bool
    """Some source has an A."""
    steps: tuple[Step, ...] = ()
    """In place of sources, where kernels do."""

    @property
    def is_sum(self) -> bool:
        """The updates are computed by themselves, and are added to the layer's product, or it to them."""
        return bool(self.sources) and self.gain is None and not isinstance(self.sources[0].share, One)


class GroupPlan:
    """Of one group, one composition, and one number of tokens a row."""

    def __init__(self, group: LinearGroup, composition: Composition, num_tokens: int) -> None:
        self._num_rows = composition.size
        maker = _Maker(group, composition, min(num_tokens, LONG))
        self._changes = [maker.change(index) for index in range(len(group.paths))]
        self._low = maker.low
        self._num_readers = sum(change is not None and change.reads_low for change in self._changes)
        self._num_left = 0
        self._x: mx.array | None = None
        self._inner: list[list[mx.array]] = []

    def forget(self) -> None:
        """Let go of the input and of what was made of it."""
        self._x, self._inner = None, []

    def changed(self, index: int, x: mx.array, y: mx.array, own_bias: mx.array | None) -> mx.array:
        """The output of the group's layer `index`, y [B, ..., O] of x [B, ..., D], with its rows' updates.

        Rows may be flattened together with their tokens.
        own_bias  the layer's own, which no gain lengthens
        """
        change = self._changes[index]
        if change is None:
            return y
        if change.steps:
            changed = y
            for step in change.steps:
                changed = fused.updated(changed, x, *step)
        elif change.gain is not None:
            changed = self._lengthened(change, x, y, own_bias)
        elif change.is_sum:
            changed = y + self._delta(change, x, y.shape, y.dtype)
        elif change.sources:
            changed = self._with_one(change.sources[0], x, y)
        else:
            changed = y
        return self._finished(change, changed)

    def begun(self, index: int, x: mx.array, weight: mx.array, own_bias: mx.array | None) -> mx.array | None:
        """What `changed` gives of the product x Wᵀ, which begins with the rows' updates and adds to them: there is no
        pass over the output to add them afterwards. None: this layer's are no such updates.

        weight  [O, D], of float32, as x
        """
        change = self._changes[index]
        if change is None or not change.is_sum:
            return None
        shape = (*x.shape[:-1], weight.shape[0])
        start = self._delta(change, x, shape, x.dtype).reshape(-1, shape[-1])
        if own_bias is not None:
            start = start + own_bias
        y = mx.addmm(start, x.reshape(-1, x.shape[-1]), weight.T).reshape(shape)
        return self._finished(change, y)

    def _finished(self, change: Change, y: mx.array) -> mx.array:
        """With biases; what is kept for the group's other layers is let go where this is the last of them."""
        if change.bias is not None:
            biases, entries = change.bias
            y = (self._by_row(y) + biases[entries][:, None]).reshape(y.shape)
        if change.reads_low:
            self._num_left -= 1
            if self._num_left == 0:
                self.forget()
        return y

    def _with_one(self, source: Source, x: mx.array, y: mx.array) -> mx.array:
        """y + x A B where all rows have the same entry."""
        h = self._h(source, x)
        if h.dtype == y.dtype == source.b.dtype:
            return mx.addmm(y.reshape(-1, y.shape[-1]), h, source.b).reshape(y.shape)
        return y + (h @ source.b).astype(y.dtype).reshape(y.shape)

    def _lengthened(self, change: Change, x: mx.array, y: mx.array, own_bias: mx.array | None) -> mx.array:
        assert change.gain is not None
        gains, entries = change.gain
        delta = self._delta(change, x, y.shape, y.dtype) if change.sources else mx.zeros_like(y)
        plain = y if own_bias is None else y - own_bias
        # m/‖W'‖ − 1 is stored, not m/‖W'‖: near 1 that keeps its digits in half precision, and the base's is 0.
        longer = gains[entries][:, None] * self._by_row(plain + delta)
        return y + (delta + longer.reshape(y.shape))

    def _delta(self, change: Change, x: mx.array, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """x A B of each row: of the layer's output's shape and dtype."""
        parts = [self._update(source, x) for source in change.sources]
        update = parts[0]
        if change.positions is not None:
            num_tokens = math.prod(shape[:-1]) // self._num_rows
            rows = [part.reshape(-1, num_tokens, shape[-1]) for part in parts]
            if change.has_idle:
                rows.append(mx.zeros((1, *rows[0].shape[1:]), dtype=update.dtype))
            update = mx.take(rows[0] if len(rows) == 1 else mx.concatenate(rows), change.positions, axis=0)
        update = update if update.dtype == dtype else update.astype(dtype)
        return update.reshape(shape)

    def _update(self, source: Source, x: mx.array) -> mx.array:
        """x A B of a source's rows, in its own order: [M, …, O]."""
        share = source.share
        if isinstance(share, One):
            return self._h(source, x) @ source.b
        if source.low < 0:
            return gathered(_taken(share, self._by_row(x)), source.b, share.lhs, share.rhs)
        return gathered(self._h(source, x), source.b, share.every, share.rhs)

    def _h(self, source: Source, x: mx.array) -> mx.array:
        """x A of a source's rows, for all layers at the first of them that reads x; x, where there is no A."""
        if source.low < 0:
            return _flat(x, source.b)
        if self._x is not x:
            self._inner = [self._times_a(low, x) for low in self._low]
            self._x, self._num_left = x, self._num_readers
        return self._inner[source.low][source.part]

    def _times_a(self, low: Low, x: mx.array) -> list[mx.array]:
        share = low.share
        if isinstance(share, One):
            h = _flat(x, low.a) @ low.a
        else:
            h = gathered(_taken(share, self._by_row(x)), low.a, share.lhs, share.rhs)
        return list(mx.split(h, low.cuts, axis=-1)) if low.cuts else [h]

    def _by_row(self, x: mx.array) -> mx.array:
        """[B, T, …], tokens not flattened together with rows."""
        is_so = x.ndim == 3 and x.shape[0] == self._num_rows
        return x if is_so else x.reshape(self._num_rows, -1, x.shape[-1])


class _Maker:
    """What a plan is made of."""

    def __init__(self, group: LinearGroup, composition: Composition, num_tokens: int) -> None:
        self._group = group
        self._composition = composition
        self._num_tokens = num_tokens
        present = composition.present
        stacks = list(group.stacks.items())
        self._used = {key: stack for key, stack in stacks if not present.isdisjoint(stack.entries)}
        self._low_keys = [key for key in self._used if key.kind == "low"]
        has_dense = any(key.kind == "dense" for key in self._used)
        self._is_alone = len(self._low_keys) == 1 and not has_dense
        self.low: list[Low] = []
        """Of all stacks, once a layer needs them."""

    def change(self, index: int) -> Change | None:
        """What is done to the output of the group's layer `index`; None: nothing."""
        gain, bias = (self._by_entry(Key(kind, (index,))) for kind in ("gain", "bias"))
        dense = Key("dense", (index,))
        if gain is None and dense not in self._used and (steps := self._steps(index)):
            return Change((), None, False, None, bias, False, steps)
        sources = [
            self._low_source(number, key, index) for number, key in enumerate(self._low_keys) if key.of[index]
        ]
        if dense in self._used:
            share = self._share(self._used[dense], self._dense_weight(index), is_alone=False)
            sources.append(Source(share, _for_rows(share, self._used[dense].arrays[0]), -1))
        if not sources and gain is None and bias is None:
            return None
        shares = [source.share for source in sources if isinstance(source.share, Share)]
        is_placed = any(share.where for share in shares)
        has_idle = is_placed and sum(share.num_rows for share in shares) < self._composition.size
        return Change(
            tuple(sources),
            self._composition.positions(shares) if is_placed else None,
            has_idle,
            gain,
            bias,
            any(source.low >= 0 for source in sources),
        )

    def _steps(self, index: int) -> tuple[Step, ...]:
        """The layer's low-rank updates as kernels' work; () where it is not theirs."""
        keys = [key for key in self._low_keys if key.of[index]]
        outputs = self._group.outputs[index]
        if not all(fused.takes(self._num_tokens, key.of[index], outputs) for key in keys):
            return ()
        steps = []
        for key in keys:
            stack, before = self._used[key], key.of[:index]
            b = stack.arrays[1 + sum(rank > 0 for rank in before)]
            where = fused.layout(sum(before), self._num_tokens)
            steps.append(Step(stack.arrays[0], b, self._composition.index(stack.entries), where))
        return tuple(steps)

    def _make_low(self, key: Key) -> Low:
        stack, ranks = self._used[key], [rank for rank in key.of if rank]
        share = self._share(stack, sum(ranks) / len(ranks) / RANK, is_alone=self._is_alone)
        return Low(share, _for_rows(share, stack.arrays[0]), list(accumulate(ranks))[:-1])

    def _low_source(self, number: int, key: Key, index: int) -> Source:
        part = sum(rank > 0 for rank in key.of[:index])
        if not self.low:
            self.low = [self._make_low(each) for each in self._low_keys]
        share = self.low[number].share
        return Source(share, _for_rows(share, self._used[key].arrays[1 + part]), number, part)

    def _dense_weight(self, index: int) -> float:
        inputs, outputs = self._group.inputs, self._group.outputs[index]
        return inputs * outputs / (inputs + outputs) / RANK

    def _share(self, stack: Stack, weight: float, *, is_alone: bool) -> Share | One:
        holding = Holding(stack.entries, stack.first, weight, is_alone)
        return self._composition.share(holding, self._num_tokens)

    def _by_entry(self, key: Key) -> tuple[mx.array, mx.array] | None:
        if key not in self._used:
            return None
        stack = self._used[key]
        return stack.arrays[0], self._composition.index(stack.entries)


def _for_rows(share: Share | One, stacked: mx.array) -> mx.array:
    """What a share's rows are multiplied with: the stack, or the one entry that all have."""
    if isinstance(share, Share):
        return stacked
    one = stacked[share.entry]
    return one.astype(mx.float32) if device.backend() == "cpu" else one  # as `gathered` has it


def _taken(share: Share, by_row: mx.array) -> mx.array:
    """A share's rows together, [M, tile · T, D], or the batch's where they are multiplied in place."""
    if share.order is None:
        return by_row
    return mx.take(by_row, share.order, axis=0).reshape(share.rhs.size, -1, by_row.shape[-1])


def _flat(x: mx.array, factor: mx.array) -> mx.array:
    """All tokens one after the other, [B · T, D], in the factor's dtype where that is wider."""
    flat = x.reshape(-1, x.shape[-1])
    return flat.astype(mx.float32) if factor.dtype == mx.float32 and x.dtype != mx.float32 else flat
