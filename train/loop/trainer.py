"""The training loop: batches in, moved weights and reports out. Knows no files, no recipe and no tokenizer.

Two clocks. An *iteration* is one batch (mlx-lm's `iters` and its cadences count these); a *step* is one optimizer
update, over `accumulation` batches. Losses and gradients are sums over the objective's units (targets, pairs) of a
step, divided once by their number over all batches and processes, so batch 8 ≡ 4×2 ≡ 2 processes × 4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from serve.errors import TrainingError
from serve.model.network import TextNetwork, evaluating
from train.adapters.adapt import checkpointed_layers
from train.data.batches import num_parts
from train.loop.distributed import Alone, Ranks, part_of, sum_named
from train.loop.optim import current_rate
from train.objectives import Objective, Prepared
from train.objectives.sft import SFT

MAX_ROWS_IN_MESSAGE = 8
UNITS = "units"
MAX_NONFINITE_IN_A_ROW = 10
"""So many bad steps one after the other end a run whatever its policy: the weights themselves are bad."""

NonfinitePolicy = Literal["stop", "skip", "rollback"]


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
class LoopSettings:
    """How long, how often, how bounded. Cadences count iterations; 0 is never."""

    num_iterations: int
    accumulation: int = 1
    iterations_per_report: int = 10
    iterations_per_eval: int = 200
    iterations_per_save: int = 100
    patience: int | None = None
    """Evaluations in a row without a better one that end the run."""
    save_best: bool = False
    """Save whenever the evaluation is the best so far."""
    best_by: str = "loss"
    """What is compared between evaluations: "loss", or the name of a measure of them."""
    greater_is_better: bool = False
    nonfinite: NonfinitePolicy = "stop"
    """After a step whose loss or gradient is not finite, which never touches the weights: end the run, go on with
    the next batches, or go on with them from the last checkpoint's weights and optimizer."""
    clear_cache_bytes: int = 0
    """The allocator's cache is freed after a step when it holds more than this."""


@dataclass
class TrainState:
    """Where a run stands. Saved in every checkpoint; the cursor into the data is `iteration`."""

    iteration: int = 0
    step: int = 0
    """Updates tried; those of non-finite steps, which changed nothing, included."""
    num_targets: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """Spent in steps, evaluations left out."""
    train_loss: float | None = None
    first_valid_loss: float | None = None
    """Before the first step; it is no candidate for the best."""
    valid_loss: float | None = None
    best_loss: float | None = None
    """The validation loss of the best step."""
    best_value: float | None = None
    """What `best_by` names, at the best step."""
    best_step: int | None = None
    num_evals_without_gain: int = 0
    num_nonfinite: int = 0
    num_nonfinite_in_a_row: int = 0
    window: Window = field(default_factory=lambda: Window())
    """Of the next report; saved too, so that a continued run reports what an uninterrupted one does."""

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> TrainState:
        """The inverse of `dataclasses.asdict`. TypeError on fields of another version."""
        return cls(**{**said, "window": Window(**said.get("window", {}))})


@dataclass(frozen=True)
class Report:
    """One line of progress, over the steps since the line before. Rates are per second."""

    step: int
    iteration: int
    loss: float
    learning_rate: float
    grad_norm: float
    targets_per_s: float
    tokens_per_s: float
    padding_frac: float
    seconds: float
    """The loop's: batches made, steps computed, counts kept. Reports, validations and saves are not in it."""
    overhead_frac: float
    """Share of those seconds outside the steps' computation."""
    memory_bytes: int
    eta_s: float
    measures: dict[str, float] = field(default_factory=dict)
    """The objective's own, means over its units."""


@dataclass(frozen=True)
class Evaluation:
    """Means over the units of the validation batches."""

    loss: float
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Nonfinite:
    """A step whose loss or gradient was not a finite number, and what was done about it."""

    step: int
    what: str
    rows: str
    action: NonfinitePolicy


class Observer(Protocol):
    """Who is told. `on_save` publishes a checkpoint; the loop itself writes nothing."""

    def on_report(self, report: Report) -> None: ...

    def on_eval(self, step: int, evaluation: Evaluation, is_best: bool, seconds: float) -> None: ...

    def on_save(self, state: TrainState) -> None: ...

    def on_nonfinite(self, event: Nonfinite) -> None: ...

    def on_rollback(self) -> None:
        """Put the last checkpoint's weights and optimizer state back in place."""
        ...


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


@dataclass
class Window:
    """Steps since the last report."""

    loss_sum: float = 0.0
    measure_sums: dict[str, float] = field(default_factory=dict)
    last_norm: float = 0.0
    num_steps: int = 0
    num_units: int = 0
    num_targets: int = 0
    num_tokens: int = 0
    num_places: int = 0
    seconds: float = 0.0
    compute_s: float = 0.0


class Stepper:
    """One optimizer update from the batches of one step. Owns the compiled functions.

    After `step` returns, the module's trainable weights and the optimizer's state are the new ones, evaluated.
    A step whose loss or gradient is not finite leaves them as they were.

    max_places  positions of one forward, padding included; a larger batch runs in parts, one at a time. 0: whole
    """

    def __init__(
        self,
        network: TextNetwork,
        optimizer: mlx_optim.Optimizer,
        objective: Objective | None = None,
        *,
        max_grad_norm: float | None = None,
        compiled: bool = False,
        seed: int = 0,
        recompute: bool = False,
        name_row: Callable[[int], str] = str,
        ranks: Ranks | None = None,
        max_places: int = 0,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.objective = objective or SFT()
        self.recompute = recompute
        self.name_row = name_row
        self.compiled = compiled
        self.seed = seed
        self.ranks = ranks or Alone()
        self.max_places = max_places
        self._max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        optimizer.init(network.module.trainable_parameters())
        self._state = [network.module.state, optimizer.state, mx.random.state]
        self._gradients = self._compile(nn.value_and_grad(network.module, self._loss))
        self._apply = self._compile(self._update)

    def _compile(self, function: Callable) -> Callable:
        return mx.compile(function, inputs=self._state, outputs=self._state) if self.compiled else function

    def _loss(self, inputs: dict[str, mx.array]) -> tuple[mx.array, dict[str, mx.array]]:
        return self.objective.loss(self.network, inputs)

    def _update(self, gradients: dict, norm: mx.array) -> None:
        shrink = mx.minimum(self._max_grad_norm / (norm + 1e-6), 1.0)
        gradients = tree_map(lambda g: g * shrink.astype(g.dtype), gradients)
        self.optimizer.update(self.network.module, gradients)

    def step(self, batches: Sequence[Batch], first_iteration: int) -> StepResult:
        """One update. TrainingError when no batch of any process has a unit to learn from.

        Dropout's randomness comes from (seed, iteration), so it is part of no saved state.
        """
        start_s = time.perf_counter()
        found = [[self._prepare(part) for part in self._parts(batch)] for batch in batches]
        mine = sum(part.num_units for parts in found for part in parts)
        counts = self.ranks.gather_numbers([mine, sum(batch.tokens.size for batch in batches)])
        num_units, num_places = (round(sum(column)) for column in zip(*counts, strict=True))
        if not num_units:
            raise TrainingError(f"no loss targets in {self.name_rows(batches)}: nothing to learn from")
        with checkpointed_layers(self.network) if self.recompute else nullcontext():
            gradients, shares, measures = self._accumulate(found, num_units, first_iteration)
        if not all(units for units, _ in counts):  # a process without units does not know the measures' names
            names = self.ranks.gather(sorted(measures))
            measures = {name: measures.get(name, mx.array(0.0)) for name in sorted(set().union(*names))}
        gradients, shares, measures = self.ranks.sum_tree((gradients, shares, measures))
        norm = gradient_norm(gradients)
        mx.eval(gradients, shares, measures, norm)
        result = StepResult(
            shares=np.array(shares),
            norm=float(np.array(norm)),
            num_units=num_units,
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
        return mean_loss(self.network, batches, self.objective, self.ranks, self.max_places)

    def _parts(self, batch: Any) -> list[Any]:
        return parts_of(batch, self.objective, self.max_places)

    def _prepare(self, batch: Batch) -> Prepared:
        # A process's share of a short batch may be no row at all.
        return self.objective.prepare(batch, pad=self.compiled) if len(batch.tokens) else Prepared({}, 0)

    def _accumulate(
        self, found: Sequence[Sequence[Prepared]], num_units: int, first_iteration: int
    ) -> tuple[dict, mx.array, dict[str, mx.array]]:
        """(gradients, shares [batches], measures) of this process's units; a part without any costs nothing."""
        gradients: dict | None = None
        shares = [mx.array(0.0)] * len(found)
        measures: dict[str, mx.array] = {}
        numbered = (
            (place, number, part) for place, parts in enumerate(found) for number, part in enumerate(parts)
        )
        for place, number, part in numbered:
            if not part.num_units:
                continue
            if gradients is not None:
                mx.eval(gradients, shares, measures)  # frees the last part's activations before the next runs
            mx.random.seed(self._dropout_seed(first_iteration + place, number))
            (part_share, new_measures), new = self._gradients(part.arrays(num_units))
            shares[place] = shares[place] + part_share
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            measures = {name: measures.get(name, 0.0) + value for name, value in new_measures.items()}
        if gradients is None:
            gradients = tree_map(mx.zeros_like, self.network.module.trainable_parameters())
        return gradients, mx.stack(shares), measures

    def _dropout_seed(self, iteration: int, part: int) -> int:
        return ((part << 56) + (self.seed << 32) + (self.ranks.rank << 24) + iteration) % 2**64

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


def parts_of(batch: Any, objective: Objective, max_places: int) -> list[Any]:
    """The batch, cut where one forward of it would be too large and its objective lets it; see `Stepper`."""
    by, (rows, width) = objective.splits_by, batch.tokens.shape
    count = num_parts(rows, width - 1, max_places if by else 0, are_pairs=by == "pair")
    if count == 1:
        return [batch]
    return [part_of(batch, index, count, are_pairs=by == "pair") for index in range(count)]


def gradient_norm(gradients: dict) -> mx.array:
    """√ of the sum of all squares, in float32. Scalar."""
    squares = [g.astype(mx.float32).square().sum() for _, g in tree_flatten(gradients)]
    return mx.sqrt(mx.stack(squares).sum())


class Trainer:
    """Runs steps to the end of the run, a signal, or the end of patience.

    batch_at       iteration → Batch. A pure function of the number (and of the weights, where an objective samples
                   from them): resuming needs only the number
    valid_batches  the same at each evaluation; empty means no evaluation
    stop           asked between steps; true ends the run after saving
    evaluate       in place of the loss over valid_batches
    measure        step → further measures of the weights as they are, taken at each evaluation
    """

    def __init__(
        self,
        stepper: Stepper,
        settings: LoopSettings,
        batch_at: Callable[[int], Batch],
        valid_batches: Sequence[Batch],
        observer: Observer,
        *,
        state: TrainState | None = None,
        stop: Callable[[], bool] = lambda: False,
        evaluate: Callable[[], Evaluation] | None = None,
        measure: Callable[[int], Mapping[str, float]] = lambda step: {},
    ) -> None:
        self.stepper = stepper
        self.settings = settings
        self.state = state or TrainState()
        self._batch_at = batch_at
        self._observer = observer
        self._stop = stop
        self._measure = measure
        self._evaluation = evaluate
        if evaluate is None and valid_batches:
            self._evaluation = lambda: stepper.mean_loss(valid_batches)

    def fit(self) -> TrainState:
        """Train. On return the weights are those of the last step, and a checkpoint of them was asked for.

        TrainingError on a non-finite loss or gradient under the policy `stop`, naming step and rows.
        """
        state, settings = self.state, self.settings
        self.stepper.network.module.train()
        if state.iteration == 0:
            if state.first_valid_loss is None:  # not continued from the checkpoint saved here
                self._evaluate()
            if settings.nonfinite == "rollback":
                self._observer.on_save(state)  # what there is to roll back to, before the first save
        while state.iteration < settings.num_iterations and not self._is_out_of_patience():
            before = state.iteration
            self._step()
            is_end = state.iteration >= settings.num_iterations
            stopped = self._stop()
            if is_end or stopped or _crossed(settings.iterations_per_report, before, state.iteration):
                self._report()
            is_best = False
            if is_end or _crossed(settings.iterations_per_eval, before, state.iteration):
                is_best = self._evaluate()
            due = _crossed(settings.iterations_per_save, before, state.iteration)
            ends = is_end or stopped or self._is_out_of_patience()
            if ends or due or (is_best and settings.save_best):
                self._observer.on_save(state)
            if stopped:
                break
        self.stepper.network.module.eval()
        return state

    def _is_out_of_patience(self) -> bool:
        patience = self.settings.patience
        return bool(patience) and self.state.num_evals_without_gain >= (patience or 0)

    def _step(self) -> None:
        state, settings, window = self.state, self.settings, self.state.window
        start_s = time.perf_counter()
        end = min(state.iteration + settings.accumulation, settings.num_iterations)
        batches = [self._batch_at(i) for i in range(state.iteration, end)]
        result = self.stepper.step(batches, state.iteration)
        if mx.get_cache_memory() > settings.clear_cache_bytes:
            mx.clear_cache()
        state.iteration, state.step = end, state.step + 1
        if not result.is_finite:
            self._on_nonfinite(batches, result)
            return
        state.num_nonfinite_in_a_row = 0
        num_tokens = sum(batch.num_tokens for batch in batches)
        num_targets = sum(batch.num_targets for batch in batches)
        seconds = time.perf_counter() - start_s
        state.num_targets += num_targets
        state.num_tokens += num_tokens
        state.seconds += seconds
        window.loss_sum += result.loss * result.num_units
        for name, value in result.measures.items():
            window.measure_sums[name] = window.measure_sums.get(name, 0.0) + value * result.num_units
        window.last_norm = result.norm
        window.num_steps += 1
        window.num_units += result.num_units
        window.num_targets += num_targets
        window.num_tokens += num_tokens
        window.num_places += result.num_places
        window.seconds += seconds
        window.compute_s += result.seconds

    def _on_nonfinite(self, batches: Sequence[Batch], result: StepResult) -> None:
        state, policy = self.state, self.settings.nonfinite
        state.num_nonfinite += 1
        state.num_nonfinite_in_a_row += 1
        what, rows = self.stepper.what_is_wrong(batches, result)
        ends = policy == "stop" or state.num_nonfinite_in_a_row >= MAX_NONFINITE_IN_A_ROW
        self._observer.on_nonfinite(Nonfinite(state.step, what, rows, "stop" if ends else policy))
        if ends:
            again = "" if policy == "stop" else f", {state.num_nonfinite_in_a_row} steps in a row"
            raise TrainingError(
                f"step {state.step}: {what} on {rows}{again}. The last checkpoint is whole. A lower learning_rate, "
                f"max_grad_norm or float32 usually helps; look at those rows first"
            )
        if policy == "rollback":
            self._observer.on_rollback()

    def _report(self) -> None:
        """Tell the observer about the window, and start a new one."""
        if not self.state.window.num_steps:
            return
        state, window = self.state, self.state.window
        state.window = Window()
        state.train_loss = window.loss_sum / window.num_units
        seconds = max(window.seconds, 1e-9)
        done_frac = state.iteration / self.settings.num_iterations
        self._observer.on_report(
            Report(
                step=state.step,
                iteration=state.iteration,
                loss=state.train_loss,
                learning_rate=current_rate(self.stepper.optimizer),
                grad_norm=window.last_norm,
                targets_per_s=window.num_targets / seconds,
                tokens_per_s=window.num_tokens / seconds,
                padding_frac=1 - window.num_tokens / window.num_places,
                seconds=seconds,
                overhead_frac=1 - window.compute_s / seconds,
                memory_bytes=peak_memory_bytes(),
                eta_s=state.seconds * (1 / done_frac - 1),
                measures=self.stepper.objective.summarize(
                    {name: total / window.num_units for name, total in window.measure_sums.items()}
                ),
            )
        )

    def _evaluate(self) -> bool:
        """Measure the weights as they are. True when they are the best so far."""
        if self._evaluation is None:
            return False
        state, settings = self.state, self.settings
        start_s = time.perf_counter()
        found = self._evaluation()
        found = replace(found, measures={**found.measures, **self._measure(state.step)})
        value = found.loss if settings.best_by == "loss" else found.measures[settings.best_by]
        is_best = state.step > 0 and math.isfinite(value) and self._is_better(value)
        state.valid_loss = found.loss
        if state.step == 0:
            state.first_valid_loss = found.loss
        elif is_best:
            state.best_loss, state.best_value, state.best_step = found.loss, value, state.step
            state.num_evals_without_gain = 0
        else:
            state.num_evals_without_gain += 1
        self._observer.on_eval(state.step, found, is_best, time.perf_counter() - start_s)
        return is_best

    def _is_better(self, value: float) -> bool:
        best = self.state.best_value
        if best is None:
            return True
        return value > best if self.settings.greater_is_better else value < best


def mean_loss(
    network: TextNetwork,
    batches: Iterable[Batch],
    objective: Objective | None = None,
    ranks: Ranks | None = None,
    max_places: int = 0,
) -> Evaluation:
    """The objective over all batches together, without dropout. The module is left in the mode it was in.

    max_places  of one forward, as in a `Stepper`
    NaN when the batches hold no unit at all.
    """
    objective, ranks = objective or SFT(), ranks or Alone()
    sums = {UNITS: 0.0}
    with evaluating(network):
        for part in (part for batch in batches for part in parts_of(batch, objective, max_places)):
            found = objective.prepare(part) if len(part.tokens) else Prepared({}, 0)
            if not found.num_units:
                continue
            loss, measures = objective.loss(network, found.arrays(1), trains=False)
            mx.eval(loss, measures)
            for name, value in {"": loss, **measures}.items():
                sums[name] = sums.get(name, 0.0) + float(np.array(value))
            sums[UNITS] += found.num_units
    sums = sum_named(ranks, sums)
    num_units = sums.pop(UNITS)
    means = {name: value / num_units for name, value in sums.items()} if num_units else {}
    return Evaluation(means.pop("", math.nan), objective.summarize(means) if means else {})


def peak_memory_bytes() -> int:
    """The most this process has held: MLX's own count on a GPU, the resident set on CPU."""
    peak = mx.get_peak_memory()
    if mx.default_device() != mx.Device(mx.cpu):
        return int(peak)
    import resource
    import sys

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(resident if sys.platform == "darwin" else resident * 1024)


def _crossed(every: int, before: int, after: int) -> bool:
    return every > 0 and before // every != after // every
