"""What a trainer tells, written down: to the console, to metrics, into checkpoints. Decides nothing about when."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.optimizers as mlx_optim

from serve.adapters.manifest import AdapterConfig, Lineage
from serve.model.loading import LoadedModel
from train.adapters.adapt import Adapted, adapter_tensors, set_tensors
from train.after.evaluate import exact_match
from train.foresee.preflight import Preflight
from train.loop import checkpoint
from train.loop.optim import rates_of, schedule_of
from train.loop.trainer import Evaluation, Nonfinite, Report, TrainState
from train.watch.curve import LearningCurve
from train.watch.metrics import MetricsLog
from train.watch.progress import RunProgress
from train.watch.record import home_of
from train.watch.samples import answers_of

PROMPT_WIDTH, ANSWER_WIDTH = 40, 100
"""Characters of a sample on the console."""
METRIC_BEFORE = "exact_match_before"
METRIC = "exact_match"
DONE = {
    "stop": "the run ends",
    "skip": "the step is skipped",
    "rollback": "going on from the last checkpoint's weights",
}


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
        rates = rates_of(schedule_of(self.recipe, flight.num_steps), flight.num_steps)
        self.curve = LearningCurve(self.folder, title_of(flight, self.folder), rates)

    def on_report(self, report: Report) -> None:
        """A line of progress, and what a stream left out since the last one."""
        self.progress.report(report)
        for note in self._flight.take_notes():
            self.progress.say(note, style="yellow")
        values = dataclasses.asdict(report)
        self._metrics.write("train", values.pop("step"), **values.pop("measures"), **values)

    def on_eval(self, step: int, evaluation: Evaluation, is_best: bool, seconds: float) -> None:
        """A validation loss, and what was measured beside it; samples; the learning curve."""
        best = " (best)" if is_best else ""
        measures = "".join(f"  {name} {value:.4g}" for name, value in evaluation.measures.items())
        self.progress.say(
            f"step {step}: validation loss {evaluation.loss:.4f}{measures}{best}, {seconds:.1f} s"
        )
        self._metrics.write("valid", step, loss=evaluation.loss, seconds=seconds, **evaluation.measures)
        self._show_samples(step)
        self.curve.refresh()

    def on_nonfinite(self, event: Nonfinite) -> None:
        """A step that was not applied, with the rows to look at."""
        said = f"step {event.step}: {event.what} on {event.rows}; {DONE[event.action]}"
        self.progress.say(said, style="yellow")
        self._metrics.write("nonfinite", **dataclasses.asdict(event))

    def on_rollback(self) -> None:
        """The last checkpoint's weights and optimizer, in place of those at hand."""
        saved = checkpoint.load(checkpoint.find(self.folder))
        set_tensors(self._model.network, saved.tensors, str(saved.folder))
        checkpoint.restore_optimizer(self._optimizer, saved.optimizer)

    def on_save(self, state: TrainState) -> None:
        """Publish a checkpoint."""
        tensors = adapter_tensors(self._model.network)
        position = self._metrics.position()
        identity = identity_of(self._flight, self._lineage)
        checkpoint.save(self.folder, tensors, self._optimizer, self.config(state), state, identity, position)
        checkpoint.prune(self.folder, self.recipe.save_total_limit, state.best_step)

    def measure(self, step: int) -> dict[str, float]:
        """The task's metric of the weights as they are, on the first validation rows; {} where there is none."""
        metric, valid = self.recipe.metric, self._flight.valid
        if metric is None or valid is None:
            return {}
        template = self._flight.template
        answers = exact_match(
            self._model, template, valid.examples, max_tokens=metric.max_tokens, rows=metric.rows
        )
        value = answers.exact_match
        count = f"{answers.num_exact} of {len(answers.texts)}"
        self.progress.say(f"step {step}: exact match {value:.1%} ({count})")
        if step == 0:
            self.metric_before = value
        self.metric_after = value
        return {METRIC: value}

    def _show_samples(self, step: int) -> None:
        """Answers of the weights as they are: the beginning of each to the console, the whole to metrics."""
        samples, prompts = self.recipe.samples, self._flight.sample_prompts
        if samples is None:
            return
        answers = answers_of(self._model, prompts, samples)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            self._metrics.write_sample(step, number, prompt.text, answer)
            line = f"  {brief(prompt.text, PROMPT_WIDTH)} → {brief(answer, ANSWER_WIDTH)}"
            self.progress.say(line, style="dim")

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
            fine_tune_type=self._adapted.fine_tune_type,
            num_layers=self._adapted.num_layers,
            rank=self._adapted.rank,
            scale=lora.effective_scale,
            dropout=lora.dropout,
            keys=self._adapted.keys,
            init_lora_weights=lora.init_lora_weights,
            lineage=lineage,
        )


def title_of(flight: Preflight, folder: Path) -> str:
    """`runs/support · Qwen3-0.6B, lora, sft`: over the learning curve."""
    recipe = flight.recipe
    return f"{home_of(folder)}   ·   {Path(recipe.model).name}, {recipe.fine_tune_type}, {recipe.objective}"


def brief(text: str, width: int) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"


def identity_of(flight: Preflight, lineage: Lineage) -> dict[str, Any]:
    """What a checkpoint must share with the run that continues it: else its cursor and state mean nothing."""
    names = ("fine_tune_type", "objective", "optimizer", "grad_accumulation_steps", "seed")
    recipe = flight.recipe
    reference = {"reference": recipe.resume_adapter_file or "base"} if recipe.has_reference else {}
    return {
        **reference,
        "base_fingerprint": lineage.base_fingerprint,
        "data_hash": lineage.data_hash,
        "template_hash": lineage.template_hash,
        **{name: getattr(flight.recipe, name) for name in names},
        "batch_size": recipe.batch_size * flight.ranks.size,
    }
