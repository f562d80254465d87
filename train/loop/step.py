"""One step: batches in, moved weights and what they cost out. Knows no recipe, no files and no run.

Losses and gradients are sums over the objective's units (targets, pairs) of a step, divided once by their number over
all batches and processes, so batch 8 ≡ 4×2 ≡ 2 processes × 4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from serve.errors import TrainingError
from serve.model.network import Network, evaluating
from train.adapters.adapt import checkpointed_layers
from train.data.batches import num_parts
from train.loop.distributed import Alone, Ranks, part_of, sum_named
from train.loop.eyes import Eyes
from train.loop.objective import Objective, Prepared

MAX_ROWS_IN_MESSAGE = 8
UNITS = "units"


class Batch(Protocol):
    """What the loop needs of a batch; `train.data.batches.Batch` is the real one."""

    @property
    def tokens(self) -> np.ndarray: ...  # [B, T] int32, right-padded

    @property
    def is_target(self) -> np.ndarray: ...  # [B, T] bool

    @property
    def num_targets(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...  # without padding

    @property
    def row_ids(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed."""

    max_grad_norm: float | None = None
    """Gradients are scaled down to this global norm; None: never."""
    compiled: bool = False
    """Whether the step's functions are compiled by MLX."""
    seed: int = 0
    """Of dropout, with the iteration's number."""
    recompute: bool = False
    """Gradient checkpointing: each layer's activations are computed again in the backward pass."""
    max_positions: int = 0
    """Positions of one forward, padding included; a larger batch runs in parts, one at a time. 0: whole."""


@dataclass(frozen=True)
class StepResult:
    """One step, read back. `shares` [batches]: what each adds to the step's mean loss."""

    shares: np.ndarray
    norm: float
    num_units: int
    num_places: int
    """Tokens and padding of the batches, over all processes."""
    measures: dict[str, float]
    seconds: float
    """Of the computation: graph building, forward, backward and update."""

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.norm) and bool(np.isfinite(self.shares).all())

    @property
    def loss(self) -> float:
        """Mean over the step's units."""
        return float(self.shares.sum())


@dataclass(frozen=True)
class Evaluation:
    """Means over the units of the validation batches."""

    loss: float
    measures: dict[str, float] = field(default_factory=dict)


class Stepper:
    """One optimizer update from the batches of one step. Owns the compiled functions.

    After `step` returns, the module's trainable weights and the optimizer's state are the new ones, evaluated.
    A step whose loss or gradient is not finite leaves them as they were.

    ranks     the processes that share each step
    name_row  a row's number → what messages call it
    eyes      the towers, of a model that has any
    """

    def __init__(
        self,
        network: Network,
        optimizer: mlx_optim.Optimizer,
        objective: Objective,
        settings: StepSettings = StepSettings(),
        *,
        ranks: Ranks | None = None,
        name_row: Callable[[int], str] = str,
        eyes: Eyes | None = None,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.objective = objective
        self.settings = settings
        self.ranks = ranks or Alone()
        self.name_row = name_row
        self.eyes = eyes
        optimizer.init(network.module.trainable_parameters())
        self._state = [network.module.state, optimizer.state, mx.random.state]
        self._plain_gradients = nn.value_and_grad(network.module, self._loss)
        self._gradients = self._compile(self._plain_gradients)
        self._apply = self._compile(self._update)

    def _compile(self, function: Callable) -> Callable:
        return (
            mx.compile(function, inputs=self._state, outputs=self._state)
            if self.settings.compiled
            else function
        )

    def _loss(self, inputs: dict[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        return self.objective.loss(self.network, inputs)

    def _update(self, gradients: dict, norm: mx.array) -> None:
        bound = math.inf if self.settings.max_grad_norm is None else self.settings.max_grad_norm
        shrink = mx.minimum(bound / (norm + 1e-6), 1.0)
        gradients = tree_map(lambda g: g * shrink.astype(g.dtype), gradients)
        self.optimizer.update(self.network.module, gradients)

    def step(self, batches: Sequence[Batch], first_iteration: int) -> StepResult:
        """One update. TrainingError when no batch of any process has a unit to learn from.

        Dropout's randomness comes from (seed, iteration), so it is part of no saved state.
        """
        start_s = time.perf_counter()
        prepared = [[self._prepare(part) for part in self._parts(batch)] for batch in batches]
        own = [part for parts in prepared for part in parts if part.runs]
        own_units = sum(part.num_units for part in own)
        counts = self.ranks.gather_numbers([own_units, sum(batch.tokens.size for batch in batches), len(own)])
        num_units, num_places, num_running = (round(sum(column)) for column in zip(*counts, strict=True))
        if not num_running:
            raise TrainingError(f"no loss targets in {self.name_rows(batches)}: nothing to learn from")
        with checkpointed_layers(self.network) if self.settings.recompute else nullcontext():
            gradients, shares, measures = self._accumulate(prepared, max(num_units, 1), first_iteration)
        if not all(
            parts for *_, parts in counts
        ):  # a process that computes nothing does not know the measures' names
            names = self.ranks.gather(sorted(measures))
            measures = {name: measures.get(name, mx.array(0.0)) for name in sorted(set().union(*names))}
        gradients, shares, measures = self.ranks.sum_tree((gradients, shares, measures))
        norm = gradient_norm(gradients)
        mx.eval(gradients, shares, measures, norm)
        result = StepResult(
            shares=np.array(shares),
            norm=float(np.array(norm)),
            num_units=max(num_units, 1),
            num_places=num_places,
            measures={name: float(np.array(value)) for name, value in measures.items()},
            seconds=time.perf_counter() - start_s,
        )
        if not result.is_finite:
            return result
        self._apply(gradients, norm)
        mx.eval(self._state[:2])
        return replace(result, seconds=time.perf_counter() - start_s)

    def mean_loss(self, batches: Iterable[Batch]) -> Evaluation:
        """The objective over batches of all processes, by forwards no larger than a step's; see `mean_loss`."""
        bound = self.settings.max_positions
        return mean_loss(self.network, batches, self.objective, self.ranks, bound, self.eyes)

    def _parts(self, batch: Any) -> list[Any]:
        return parts_of(batch, self.objective, self.settings.max_positions)

    def _prepare(self, batch: Batch) -> Prepared:
        # A process's share of a short batch may be no row at all.
        if not len(batch.tokens):
            return Prepared({}, 0)
        return self.objective.prepare(batch, pad=self.settings.compiled).seen_by(self.eyes)

    def _accumulate(
        self, prepared: Sequence[Sequence[Prepared]], num_units: int, first_iteration: int
    ) -> tuple[dict, mx.array, dict[str, mx.array]]:
        """(gradients, shares [batches], measures) of this process's units; a part without any costs nothing."""
        gradients: dict | None = None
        shares = [mx.array(0.0)] * len(prepared)
        measures: dict[str, mx.array] = {}
        numbered = (
            (index, number, part) for index, parts in enumerate(prepared) for number, part in enumerate(parts)
        )
        for index, number, part in numbered:
            if not part.runs:
                continue
            if gradients is not None:
                mx.eval(gradients, shares, measures)  # frees the last part's activations before the next runs
            mx.random.seed(self._dropout_seed(first_iteration + index, number))
            # What rows show is no array; how a family takes it follows from its sizes, which no compiled step knows.
            gradients_of = self._plain_gradients if part.sees else self._gradients
            (part_share, new_measures), new = gradients_of(part.arrays(num_units))
            shares[index] = shares[index] + part_share
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            measures = {name: measures.get(name, 0.0) + value for name, value in new_measures.items()}
        if gradients is None:
            gradients = tree_map(mx.zeros_like, self.network.module.trainable_parameters())
        return gradients, mx.stack(shares), measures

    def _dropout_seed(self, iteration: int, part: int) -> int:
        return ((part << 56) + (self.settings.seed << 32) + (self.ranks.rank << 24) + iteration) % 2**64

    def what_is_wrong(self, batches: Sequence[Batch], result: StepResult) -> tuple[str, str]:
        """(what is not finite, the rows it stands in) of a step that is not."""
        bad = [batch for batch, share in zip(batches, result.shares, strict=True) if not np.isfinite(share)]
        shares = result.shares[~np.isfinite(result.shares)]
        what = f"the loss is {shares[0]}" if bad else f"the gradient norm is {result.norm}"
        return what, self.name_rows(bad or batches)

    def name_rows(self, batches: Sequence[Batch]) -> str:
        """The rows of some batches as a person finds them again, the first few of many."""
        row_ids = [row_id for batch in batches for row_id in batch.row_ids]
        shown = ", ".join(self.name_row(row_id) for row_id in row_ids[:MAX_ROWS_IN_MESSAGE])
        more = len(row_ids) - MAX_ROWS_IN_MESSAGE
        return f"rows {shown}" + (f" and {more} more" if more > 0 else "")


def parts_of(batch: Any, objective: Objective, max_positions: int) -> list[Any]:
    """The batch, cut where one forward of it would be too large and its objective lets it; see `StepSettings`."""
    by, (rows, width) = objective.splits_by, batch.tokens.shape
    count = num_parts(rows, width - 1, max_positions if by else 0, are_pairs=by == "pair")
    if count == 1:
        return [batch]
    return [part_of(batch, index, count, are_pairs=by == "pair") for index in range(count)]


def gradient_norm(gradients: dict) -> mx.array:
    """√ of the sum of all squares, in float32. Scalar."""
    squares = [g.astype(mx.float32).square().sum() for _, g in tree_flatten(gradients)]
    return mx.sqrt(mx.stack(squares).sum())


def mean_loss(
    network: Network,
    batches: Iterable[Batch],
    objective: Objective,
    ranks: Ranks | None = None,
    max_positions: int = 0,
    eyes: Eyes | None = None,
) -> Evaluation:
    """The objective over all batches together, without dropout. The module is left in the mode it was in.

    max_positions  of one forward, as in `StepSettings`
    eyes           as in `Stepper`
    NaN when the batches hold no unit at all.
    """
    ranks = ranks or Alone()
    sums = {UNITS: 0.0}
    with evaluating(network):
        for part in (part for batch in batches for part in parts_of(batch, objective, max_positions)):
            prepared = objective.prepare(part).seen_by(eyes) if len(part.tokens) else Prepared({}, 0)
            if not prepared.runs:
                continue
            loss, measures = objective.loss(network, prepared.arrays(1), trains=False)
            mx.eval(loss, measures)
            for name, value in {"": loss, **measures}.items():
                sums[name] = sums.get(name, 0.0) + float(np.array(value))
            sums[UNITS] += prepared.num_units
    sums = sum_named(ranks, sums)
    num_units = sums.pop(UNITS)
    means = {name: value / num_units for name, value in sums.items()} if num_units else {}
    return Evaluation(means.pop("", math.nan), objective.summarize(means) if means else {})
