"""The training loop: steps, reports, validations and saves in order. Knows no files, no recipe and no tokenizer.

Two clocks. An *iteration* is one batch (mlx-lm's `iters` and its cadences count these); a *step* is one optimizer
update, over `accumulation` batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import mlx.core as mx

from serve.errors import TrainingError
from train.loop.optim import current_rate
from train.loop.step import Batch, Evaluation, Stepper, StepResult

MAX_NONFINITE_IN_A_ROW = 10
"""So many bad steps one after the other end a run whatever its policy: the weights themselves are bad."""

NonfinitePolicy = Literal["stop", "skip", "rollback"]


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
    first_measures: dict[str, float] = field(default_factory=dict)
    """What was measured beside the loss before the first step."""
    measures: dict[str, float] = field(default_factory=dict)
    """The same of the last evaluation."""
    best_measures: dict[str, float] = field(default_factory=dict)
    num_evals_without_gain: int = 0
    num_nonfinite: int = 0
    num_nonfinite_in_a_row: int = 0
    window: Window = field(default_factory=lambda: Window())
    """Of the next report; saved too, so that a continued run reports what an uninterrupted one does."""

    def forget_best(self) -> None:
        """From here on, as if no evaluation had been the best yet."""
        self.best_loss = self.best_value = self.best_step = None
        self.best_measures, self.num_evals_without_gain = {}, 0

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> TrainState:
        """The inverse of `dataclasses.asdict`. TypeError on fields of another version."""
        return cls(**{**fields, "window": Window(**fields.get("window", {}))})


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


class Trainer:
    """Runs steps to the end of the run, a signal, or the end of patience.

    batch_at  iteration → Batch. A pure function of the number (and of the weights, where an objective samples from
              them): resuming needs only the number
    observer  is told of everything, and saves
    evaluate  step → the loss of the weights as they are and whatever else is measured; None: no evaluation
    state     where the run stands; None: at its beginning
    stop      asked between steps; true ends the run after saving
    """

    def __init__(
        self,
        stepper: Stepper,
        settings: LoopSettings,
        batch_at: Callable[[int], Batch],
        observer: Observer,
        evaluate: Callable[[int], Evaluation] | None = None,
        *,
        state: TrainState | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.stepper = stepper
        self.settings = settings
        self.state = state or TrainState()
        self._batch_at = batch_at
        self._observer = observer
        self._evaluate_at = evaluate
        self._stop = stop

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
        if self._evaluate_at is None:
            return False
        state, settings = self.state, self.settings
        start_s = time.perf_counter()
        evaluation = self._evaluate_at(state.step)
        value = evaluation.loss if settings.best_by == "loss" else evaluation.measures[settings.best_by]
        is_best = state.step > 0 and math.isfinite(value) and self._is_better(value)
        state.valid_loss, state.measures = evaluation.loss, evaluation.measures
        if state.step == 0:
            state.first_valid_loss, state.first_measures = evaluation.loss, evaluation.measures
        elif is_best:
            state.best_loss, state.best_value, state.best_step = evaluation.loss, value, state.step
            state.best_measures = evaluation.measures
            state.num_evals_without_gain = 0
        else:
            state.num_evals_without_gain += 1
        self._observer.on_eval(state.step, evaluation, is_best, time.perf_counter() - start_s)
        return is_best

    def _is_better(self, value: float) -> bool:
        best = self.state.best_value
        if best is None:
            return True
        return value > best if self.settings.greater_is_better else value < best


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
