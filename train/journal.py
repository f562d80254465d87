"""What a trainer tells, written down: to the console, to metrics, into checkpoints. Decides nothing about when."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.optimizers as mlx_optim

from serve.adapters.manifest import AdapterConfig, Lineage
from serve.model.loading import LoadedModel
from train import checkpoint
from train.adapt import Adapted, trainable_tensors
from train.evaluate import exact_match
from train.metrics import MetricsLog
from train.preflight import Preflight
from train.progress import RunProgress
from train.trainer import Report, TrainState

METRIC_BEFORE = "exact_match_before"
METRIC = "exact_match"


class Journal:
    """The observer of one Trainer. Owns no arrays; reads the weights where they are when it saves them."""

    def __init__(
        self,
        flight: Preflight,
        model: LoadedModel,
        adapted: Adapted,
        optimizer: mlx_optim.Optimizer,
        lineage: Lineage,
        metrics: MetricsLog,
        progress: RunProgress,
    ) -> None:
        self.recipe = flight.recipe
        self.folder = Path(flight.recipe.adapter_path)
        self.progress = progress
        self.metric_before: float | None = None
        self.metric_after: float | None = None
        self._flight = flight
        self._model = model
        self._adapted = adapted
        self._optimizer = optimizer
        self._lineage = lineage
        self._metrics = metrics

    def on_report(self, report: Report) -> None:
        """A line of progress."""
        self.progress.report(report)
        self._metrics.write("train", **dataclasses.asdict(report))

    def on_eval(self, step: int, loss: float, is_best: bool, seconds: float) -> None:
        """A validation loss, and the task's metric where the recipe has one."""
        best = " (best)" if is_best else ""
        self.progress.say(f"step {step}: validation loss {loss:.4f}{best}, {seconds:.1f} s")
        self._metrics.write("valid", step, loss=loss, seconds=seconds)
        self.measure(step)

    def on_save(self, state: TrainState) -> None:
        """Publish a checkpoint."""
        tensors = trainable_tensors(self._model.network)
        position = self._metrics.num_bytes
        identity = identity_of(self._flight, self._lineage)
        checkpoint.save(self.folder, tensors, self._optimizer, self.config(state), state, identity, position)
        checkpoint.prune(self.folder, self.recipe.save_total_limit, state.best_step)

    def measure(self, step: int) -> None:
        """The task's metric of the weights as they are, on the first validation rows."""
        metric, valid = self.recipe.metric, self._flight.valid
        if metric is None or valid is None:
            return
        template = self._flight.template
        answers = exact_match(
            self._model, template, valid.examples, max_tokens=metric.max_tokens, rows=metric.rows
        )
        value = answers.exact_match
        self.progress.say(
            f"step {step}: exact match {value:.1%} ({answers.num_exact} of {len(answers.texts)})"
        )
        self._metrics.write("metric", step, exact_match=value)
        if step == 0:
            self.metric_before = value
        self.metric_after = value

    def recall(self, config: AdapterConfig) -> None:
        """Take up the measurements of the run that is continued."""
        earlier = config.lineage.metrics if config.lineage else {}
        self.metric_before = earlier.get(METRIC_BEFORE)
        self.metric_after = earlier.get(METRIC)

    def config(self, state: TrainState) -> AdapterConfig:
        """The manifest of the weights as they are."""
        known = {
            "train_loss": state.train_loss,
            "valid_loss": state.valid_loss,
            "best_valid_loss": state.best_loss,
            METRIC_BEFORE: self.metric_before,
            METRIC: self.metric_after,
        }
        metrics = {name: value for name, value in known.items() if value is not None}
        lineage = dataclasses.replace(self._lineage, metrics=metrics)
        lora = self.recipe.lora_parameters
        if self._adapted.fine_tune_type == "full" or lora is None:
            return AdapterConfig("full", self._adapted.num_layers, lineage=lineage)
        return AdapterConfig(
            fine_tune_type="lora",
            num_layers=self._adapted.num_layers,
            rank=lora.rank,
            scale=lora.effective_scale,
            dropout=lora.dropout,
            keys=self._adapted.keys,
            lineage=lineage,
        )


def identity_of(flight: Preflight, lineage: Lineage) -> dict[str, Any]:
    """What a checkpoint must share with the run that continues it: else its cursor and state mean nothing."""
    names = ("fine_tune_type", "optimizer", "batch_size", "grad_accumulation_steps", "seed")
    return {
        "base_fingerprint": lineage.base_fingerprint,
        "data_hash": lineage.data_hash,
        "template_hash": lineage.template_hash,
        **{name: getattr(flight.recipe, name) for name in names},
    }
