"""The training loop: batches in, moved weights and reports out. Knows no files, no recipe and no tokenizer.

Two clocks. An *iteration* is one batch (mlx-lm's `iters` and its cadences count these); a *step* is one optimizer
update, over `accumulation` batches. Losses and gradients are sums over the targets of a step, divided once by
their number, so batch 8 ≡ 4×2 whatever the parts hold.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from serve.errors import TrainingError
from serve.model.network import TextNetwork
from train.adapt import checkpointed_layers
from train.loss import Targets, find_targets, sum_loss
from train.optim import current_rate

MAX_ROWS_IN_MESSAGE = 8


class Batch(Protocol):
    """What the loop needs of a batch; `train.data.batches.Batch` is the real one."""

    @property
    def tokens(self) -> np.ndarray: ...  # [B, T] int32, right-padded

    @property
    def is_target(self) -> np.ndarray: ...  # [B, T] bool

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
    max_grad_norm: float | None = None
    patience: int | None = None
    """Evaluations in a row without a better loss that end the run."""
    save_best: bool = False
    """Save whenever the validation loss is the best so far."""
    clear_cache_bytes: int = 0
    """The allocator's cache is freed after a step when it holds more than this."""


@dataclass
class TrainState:
    """Where a run stands. Saved in every checkpoint; the cursor into the data is `iteration`."""

    iteration: int = 0
    step: int = 0
    num_targets: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """Spent in steps, evaluations left out."""
    train_loss: float | None = None
    first_valid_loss: float | None = None
    """Before the first step; it is no candidate for the best."""
    valid_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    num_evals_without_gain: int = 0


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
    memory_bytes: int
    eta_s: float


class Observer(Protocol):
    """Who is told. `on_save` publishes a checkpoint; the loop itself writes nothing."""

    def on_report(self, report: Report) -> None: ...

    def on_eval(self, step: int, loss: float, is_best: bool, seconds: float) -> None: ...

    def on_save(self, state: TrainState) -> None: ...


@dataclass
class _Window:
    """Steps since the last report. Losses and norms stay on the device until someone reads them."""

    unread: list[tuple[int, Sequence[Batch], mx.array, mx.array, int]] = field(default_factory=list)
    """(step, batches, loss shares, gradient norm, number of targets)."""
    loss_sum: float = 0.0
    last_norm: float = 0.0
    num_steps: int = 0
    num_targets: int = 0
    num_tokens: int = 0
    num_places: int = 0
    seconds: float = 0.0


class Stepper:
    """One optimizer update from the batches of one step. Owns the compiled functions.

    After `step` returns, the module's trainable weights and the optimizer's state are the new ones, evaluated.
    """

    def __init__(
        self,
        network: TextNetwork,
        optimizer: mlx_optim.Optimizer,
        *,
        max_grad_norm: float | None = None,
        compiled: bool = False,
        seed: int = 0,
        recompute: bool = False,
        name_row: Callable[[int], str] = str,
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.recompute = recompute
        self.name_row = name_row
        self.compiled = compiled
        self.seed = seed
        self._max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        optimizer.init(network.module.trainable_parameters())
        self._state = [network.module.state, optimizer.state, mx.random.state]
        self._gradients = self._compile(nn.value_and_grad(network.module, self._loss))
        self._apply = self._compile(self._update)

    def _compile(self, function: Callable) -> Callable:
        return mx.compile(function, inputs=self._state, outputs=self._state) if self.compiled else function

    def _loss(self, *arrays: mx.array) -> mx.array:
        return sum_loss(self.network, *arrays)

    def _update(self, gradients: dict) -> mx.array:
        squares = [g.astype(mx.float32).square().sum() for _, g in tree_flatten(gradients)]
        norm = mx.sqrt(mx.stack(squares).sum())
        shrink = mx.minimum(self._max_grad_norm / (norm + 1e-6), 1.0)
        gradients = tree_map(lambda g: g * shrink.astype(g.dtype), gradients)
        self.optimizer.update(self.network.module, gradients)
        return norm

    def step(self, batches: Sequence[Batch], first_iteration: int) -> tuple[mx.array, mx.array, int]:
        """(each batch's share of the step's mean loss [len(batches)]; gradient norm; number of targets).

        Dropout's randomness comes from (seed, iteration), so it is part of no saved state.
        """
        found = [find_targets(batch.tokens, batch.is_target, pad=self.compiled) for batch in batches]
        num_targets = sum(targets.num_targets for targets in found)
        if not num_targets:
            raise TrainingError(f"no loss targets in {self.name_rows(batches)}: nothing to learn from")
        with checkpointed_layers(self.network) if self.recompute else nullcontext():
            gradients, losses = self._accumulate(batches, found, num_targets, first_iteration)
        norm = self._apply(gradients)
        shares = mx.stack(losses)
        mx.eval(self._state[:2], norm, shares)
        return shares, norm, num_targets

    def _accumulate(
        self, batches: Sequence[Batch], found: Sequence[Targets], num_targets: int, first_iteration: int
    ) -> tuple[dict, list[mx.array]]:
        gradients: dict = {}
        losses: list[mx.array] = []
        for offset, (batch, targets) in enumerate(zip(batches, found, strict=True)):
            if losses:
                mx.eval(gradients, losses)  # frees the last part's activations before the next part runs
            mx.random.seed((self.seed << 32) + first_iteration + offset)
            loss, new = self._gradients(
                mx.array(batch.tokens),
                mx.array(targets.positions),
                mx.array(targets.token_ids),
                # The division by the targets of the whole step sits in the weights: half floats stay in range.
                mx.array(targets.weights / np.float32(num_targets)),
            )
            gradients = tree_map(mx.add, gradients, new) if losses else new
            losses.append(loss)
        return gradients, losses

    def check_finite(self, step: int, batches: Sequence[Batch], shares: np.ndarray, norm: float) -> None:
        """TrainingError naming step and rows, if a loss or the gradient norm is not a finite number."""
        if np.isfinite(shares).all() and math.isfinite(norm):
            return
        bad = [batch for batch, share in zip(batches, shares, strict=True) if not np.isfinite(share)]
        what = f"the loss is {shares[~np.isfinite(shares)][0]}" if bad else f"the gradient norm is {norm}"
        raise TrainingError(
            f"step {step}: {what} on {self.name_rows(bad or batches)}. The last checkpoint is whole. A lower "
            f"learning_rate, max_grad_norm or float32 usually helps; look at those rows first"
        )

    def name_rows(self, batches: Sequence[Batch]) -> str:
        """The rows of some batches as a person finds them again, the first few of many."""
        row_ids = [row_id for batch in batches for row_id in batch.row_ids]
        shown = ", ".join(self.name_row(row_id) for row_id in row_ids[:MAX_ROWS_IN_MESSAGE])
        more = len(row_ids) - MAX_ROWS_IN_MESSAGE
        return f"rows {shown}" + (f" and {more} more" if more > 0 else "")


class Trainer:
    """Runs steps to the end of the run, a signal, or the end of patience.

    batch_at       iteration → Batch, a pure function: resuming needs only the number
    valid_batches  the same at each evaluation; empty means no evaluation
    stop           asked between steps; true ends the run after saving
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
    ) -> None:
        self.stepper = stepper
        self.settings = settings
        self.state = state or TrainState()
        self._batch_at = batch_at
        self._valid_batches = valid_batches
        self._observer = observer
        self._stop = stop
        self._window = _Window()

    def fit(self) -> TrainState:
        """Train. On return the weights are those of the last step, and a checkpoint of them was asked for.

        TrainingError on a non-finite loss or gradient, naming step and rows; nothing is saved after it happened.
        """
        state, settings = self.state, self.settings
        self.stepper.network.module.train()
        if state.step == 0:
            self._evaluate()
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
                self._settle()
                self._observer.on_save(state)
            if stopped:
                break
        self.stepper.network.module.eval()
        return state

    def _is_out_of_patience(self) -> bool:
        patience = self.settings.patience
        return bool(patience) and self.state.num_evals_without_gain >= (patience or 0)

    def _step(self) -> None:
        state, settings, window = self.state, self.settings, self._window
        start_s = time.perf_counter()
        end = min(state.iteration + settings.accumulation, settings.num_iterations)
        batches = [self._batch_at(i) for i in range(state.iteration, end)]
        shares, norm, num_targets = self.stepper.step(batches, state.iteration)
        if mx.get_cache_memory() > settings.clear_cache_bytes:
            mx.clear_cache()
        seconds = time.perf_counter() - start_s
        num_tokens = sum(batch.num_tokens for batch in batches)
        state.iteration, state.step = end, state.step + 1
        state.num_targets += num_targets
        state.num_tokens += num_tokens
        state.seconds += seconds
        window.unread.append((state.step, batches, shares, norm, num_targets))
        window.num_steps += 1
        window.num_targets += num_targets
        window.num_tokens += num_tokens
        window.num_places += sum(batch.tokens.size for batch in batches)
        window.seconds += seconds

    def _settle(self) -> None:
        """Read the losses and norms of the window back from the device, and check them."""
        window = self._window
        for step, batches, shares, norm, num_targets in window.unread:
            values = np.array(shares)
            window.last_norm = float(np.array(norm))
            self.stepper.check_finite(step, batches, values, window.last_norm)
            window.loss_sum += float(values.sum()) * num_targets
        window.unread = []

    def _report(self) -> None:
        """Tell the observer about the window, and start a new one."""
        if not self._window.num_steps:
            return
        self._settle()
        state, window, self._window = self.state, self._window, _Window()
        state.train_loss = window.loss_sum / window.num_targets
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
                memory_bytes=peak_memory_bytes(),
                eta_s=state.seconds * (1 / done_frac - 1),
            )
        )

    def _evaluate(self) -> bool:
        """Loss on the fixed validation batches. True when it is the best so far."""
        if not self._valid_batches:
            return False
        self._settle()
        state = self.state
        start_s = time.perf_counter()
        loss = mean_loss(self.stepper.network, self._valid_batches)
        is_best = (
            state.step > 0 and math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        )
        state.valid_loss = loss
        if state.step == 0:
            state.first_valid_loss = loss
        elif is_best:
            state.best_loss, state.best_step, state.num_evals_without_gain = loss, state.step, 0
        else:
            state.num_evals_without_gain += 1
        self._observer.on_eval(state.step, loss, is_best, time.perf_counter() - start_s)
        return is_best


def mean_loss(network: TextNetwork, batches: Iterable[Batch]) -> float:
    """Nats per target over all batches together, without dropout. The module is left in the mode it was in."""
    was_training = network.module.training
    network.module.eval()
    total, num_targets = 0.0, 0
    for batch in batches:
        found = find_targets(batch.tokens, batch.is_target)
        if not found.num_targets:
            continue
        arrays = (mx.array(a) for a in (batch.tokens, found.positions, found.token_ids, found.weights))
        total += float(np.array(sum_loss(network, *arrays)))
        num_targets += found.num_targets
    network.module.train(was_training)
    return total / num_targets if num_targets else math.nan


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
