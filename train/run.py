"""One run: recipe → data → model → what trains → trainer → adapter folder and summary.json.

The wiring and nothing else; each step is in the file it is imported from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from rich.console import Console

from serve import device
from serve.adapters.manifest import (
    TENSORS_FILE,
    AdapterConfig,
    Lineage,
    read_config,
    read_tensors,
    write_adapter,
)
from serve.errors import AdapterError, ConfigError, StorageError
from serve.model.loading import LoadedModel, build_random, load, resolve
from serve.settings import dump
from train import checkpoint, preflight
from train.adapt import Adapted, add_lora, embedding_names, set_tensors, train_all, trainable_tensors
from train.evaluate import exact_match
from train.metrics import FILE as METRICS_FILE
from train.metrics import TENSORBOARD_FOLDER, MetricsLog
from train.optim import build_optimizer, build_schedule
from train.preflight import Preflight
from train.progress import RunProgress
from train.recipe import Recipe
from train.trainer import LoopSettings, Report, Stepper, Trainer, TrainState, mean_loss, peak_memory_bytes

SUMMARY_FILE = "summary.json"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class RunSummary:
    """`summary.json`: how a run ended. Losses are nats per target; `exact_match` is a share of rows."""

    status: Literal["finished", "stopped_early", "interrupted", "dry_run"]
    adapter_path: str
    steps: int = 0
    iterations: int = 0
    train_loss: float | None = None
    first_valid_loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_step: int | None = None
    published_step: int | None = None
    """The step whose weights the adapter folder holds."""
    test_loss: float | None = None
    metric: str | None = None
    metric_before: float | None = None
    metric_after: float | None = None
    num_trainable: int = 0
    num_targets: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """Wall clock of this process's part, loading and evaluations included."""
    train_seconds: float = 0.0
    tokens_per_s: float = 0.0
    peak_memory_bytes: int = 0
    content_hash: str = ""
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """0, or 130 and 143 after SIGINT and SIGTERM, as shells count."""
        return 0 if self.signal is None else 128 + self.signal


def run(
    recipe: Recipe,
    *,
    dry_run: bool = False,
    resume: Path | str | bool | None = None,
    console: Console | None = None,
) -> RunSummary:
    """Train as the recipe says, or only look (`dry_run`).

    resume  a checkpoint or a run's folder to continue; True: the last checkpoint in the recipe's adapter_path
    SIGINT and SIGTERM end the run after the step under way, with a checkpoint; the summary says so.
    Raises from the whole error tree; whatever is raised, published checkpoints stay whole.
    """
    start_s = time.perf_counter()
    console = console or Console()
    folder = Path(recipe.adapter_path)
    flight = preflight.prepare(recipe)
    preflight.show(flight, console, with_recipe=dry_run)
    if dry_run:
        return RunSummary("dry_run", str(folder))
    where = Path(recipe.adapter_path if resume is True else resume or recipe.resume_from_checkpoint or "")
    resumed = checkpoint.find(where) if resume or recipe.resume_from_checkpoint else None
    if resumed is None:
        _make_room(folder)
    model = _load_model(recipe)
    mx.random.seed(recipe.seed)
    adapted = _adapt(recipe, model, console)
    parts = _Run(recipe, flight, model, adapted, folder, console, start_s)
    return parts.go(resumed)


def _load_model(recipe: Recipe) -> LoadedModel:
    if recipe.init == "random":
        return build_random(resolve(recipe.model), recipe.seed, name=recipe.model)
    return load(recipe.model, trust_remote_code=recipe.trust_remote_code)


def _adapt(recipe: Recipe, model: LoadedModel, console: Console) -> Adapted:
    if recipe.fine_tune_type == "full":
        if "quantization" in model.config:
            raise ConfigError(
                f"fine_tune_type: full needs a base in full precision; {recipe.model} is quantized. Use "
                f"fine_tune_type: lora, or the model it was quantized from"
            )
        # Random weights are all new; leaving some of them frozen would train on noise.
        adapted = train_all(model.network, num_layers=-1 if recipe.init == "random" else recipe.num_layers)
    else:
        lora = recipe.lora_parameters
        assert lora is not None, "the recipe fills lora_parameters for fine_tune_type: lora"
        adapted = add_lora(
            model.network,
            rank=lora.rank,
            scale=lora.effective_scale,
            dropout=lora.dropout,
            keys=lora.keys,
            num_layers=recipe.num_layers,
        )
    if recipe.resume_adapter_file:
        _warm_start(Path(recipe.resume_adapter_file), model, adapted)
    share = adapted.num_trainable / adapted.num_parameters
    console.print(
        f"trainable: {adapted.num_trainable:,} of {adapted.num_parameters:,} parameters ({share:.2%})"
    )
    for note in adapted.notes:
        console.print(note, style="yellow", highlight=False)
    return adapted


def _warm_start(path: Path, model: LoadedModel, adapted: Adapted) -> None:
    """Weights of an adapter file, or of a folder that has one; the rest of the run starts afresh."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir() or path.name == TENSORS_FILE:
        tensors = read_tensors(folder)
        config = read_config(folder) if (folder / "adapter_config.json").exists() else None
        if config and config.fine_tune_type != adapted.fine_tune_type:
            raise AdapterError(
                f"resume_adapter_file: {path} is a {config.fine_tune_type} fine-tune, "
                f"this run is {adapted.fine_tune_type}"
            )
    else:
        tensors = checkpoint.load_tensors(path)
    set_tensors(model.network, tensors, f"resume_adapter_file {path}")


def _make_room(folder: Path) -> None:
    """A new run in a folder that holds an unfinished one is refused; a finished one's records give way."""
    if not checkpoint.existing(folder):
        return
    try:
        status = json.loads((folder / SUMMARY_FILE).read_text())["status"]
    except (OSError, ValueError, KeyError):
        status = "interrupted"
    if status == "interrupted":
        last = checkpoint.existing(folder)[-1]
        raise ConfigError(
            f"adapter_path: {folder} holds an unfinished run, last saved at {last.name}. Continue it with --resume, "
            f"delete the folder, or name another adapter_path"
        )
    for name in (checkpoint.FOLDER, TENSORBOARD_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (SUMMARY_FILE, METRICS_FILE):
        (folder / name).unlink(missing_ok=True)


class _Run:
    """The observer of one Trainer: what it reports goes to console, metrics and checkpoints."""

    def __init__(
        self,
        recipe: Recipe,
        flight: Preflight,
        model: LoadedModel,
        adapted: Adapted,
        folder: Path,
        console: Console,
        start_s: float,
    ) -> None:
        self.recipe, self.flight, self.model, self.adapted = recipe, flight, model, adapted
        self.folder, self.console, self.start_s = folder, console, start_s
        self.optimizer = _optimizer(recipe, flight, model)
        self.lineage = _lineage(recipe, flight, model)
        self.metric_before: float | None = None
        self.metric_after: float | None = None

    def go(self, resumed: Path | None) -> RunSummary:
        """Train to the end, publish, write summary.json."""
        recipe, flight = self.recipe, self.flight
        stepper = Stepper(
            self.model.network,
            self.optimizer,
            max_grad_norm=recipe.max_grad_norm,
            compiled=device.backend() != "cpu",
            seed=recipe.seed,
            recompute=recipe.grad_checkpoint,
            name_row=flight.name_row,
        )
        state, metrics_bytes = self._restore(resumed) if resumed else (TrainState(), 0)
        self._write_recipe()
        with (
            MetricsLog(self.folder, keep_bytes=metrics_bytes, next_step=state.step + 1) as self.metrics,
            RunProgress(self.console, flight.num_iterations, state.iteration) as self.progress,
            _signals() as caught,
        ):
            settings = _loop_settings(recipe, flight)
            trainer = Trainer(
                stepper,
                settings,
                flight.batch_at,
                flight.valid_batches(),
                self,
                state=state,
                stop=lambda: bool(caught),
            )
            state = trainer.fit()
            published_step = self._publish_weights(state)
            test_loss = mean_loss(self.model.network, batches) if (batches := flight.test_batches()) else None
        config = write_adapter(self.folder, trainable_tensors(self.model.network), self._config(state))
        summary = self._summary(state, published_step, test_loss, config, caught[0] if caught else None)
        _write_json(self.folder / SUMMARY_FILE, dataclasses.asdict(summary))
        return summary

    # What the trainer tells.

    def on_report(self, report: Report) -> None:
        """A line of progress."""
        self.progress.report(report)
        self.metrics.write("train", **dataclasses.asdict(report))

    def on_eval(self, step: int, loss: float, is_best: bool, seconds: float) -> None:
        """A validation loss, and the task's metric where the recipe has one."""
        self.progress.say(
            f"step {step}: validation loss {loss:.4f}{' (best)' if is_best else ''}, {seconds:.1f} s"
        )
        self.metrics.write("valid", step, loss=loss, seconds=seconds)
        self._measure(step)

    def on_save(self, state: TrainState) -> None:
        """Publish a checkpoint."""
        tensors = trainable_tensors(self.model.network)
        checkpoint.save(
            self.folder,
            tensors,
            self.optimizer,
            self._config(state),
            state,
            self._identity(),
            self.metrics.num_bytes,
        )
        checkpoint.prune(self.folder, self.recipe.save_total_limit, state.best_step)

    def _measure(self, step: int) -> None:
        metric, valid = self.recipe.metric, self.flight.valid
        if metric is None or valid is None:
            return
        answers = exact_match(
            self.model, self.flight.template, valid.examples, max_tokens=metric.max_tokens, rows=metric.rows
        )
        value = answers.exact_match
        self.progress.say(
            f"step {step}: exact match {value:.1%} ({answers.num_exact} of {len(answers.texts)})"
        )
        self.metrics.write("metric", step, exact_match=value)
        if step == 0:
            self.metric_before = value
        self.metric_after = value

    # Beginning and end.

    def _restore(self, folder: Path) -> tuple[TrainState, int]:
        saved = checkpoint.load(folder)
        checkpoint.check_identity(saved, self._identity(), folder)
        set_tensors(self.model.network, saved.tensors, str(folder))
        checkpoint.restore_optimizer(self.optimizer, saved.optimizer)
        self.metric_before = (
            saved.config.lineage.metrics.get("exact_match_before") if saved.config.lineage else None
        )
        self.console.print(f"continuing {folder} after step {saved.state.step}", highlight=False)
        for later in checkpoint.existing(self.folder):
            if checkpoint.step_of(later) > saved.state.step:
                self.console.print(f"{later} is of an abandoned continuation and is removed", highlight=False)
                checkpoint.remove(later)
        return saved.state, saved.metrics_bytes

    def _publish_weights(self, state: TrainState) -> int:
        """Put the weights to publish in place; returns their step."""
        best = state.best_step
        if not self.recipe.load_best_model_at_end or best is None or best == state.step:
            return state.step
        saved = checkpoint.load(checkpoint.folder_of(self.folder, best))
        set_tensors(self.model.network, saved.tensors, f"step {best}")
        self.progress.say(f"step {best} had the lowest validation loss and is the one that is published")
        self._measure(best)
        return best

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that continues it."""
        recipe = self.recipe
        names = ("fine_tune_type", "optimizer", "batch_size", "grad_accumulation_steps", "seed")
        return {
            "base_fingerprint": self.lineage.base_fingerprint,
            "data_hash": self.lineage.data_hash,
            "template_hash": self.lineage.template_hash,
            **{name: getattr(recipe, name) for name in names},
        }

    def _config(self, state: TrainState) -> AdapterConfig:
        metrics = {
            "train_loss": state.train_loss,
            "valid_loss": state.valid_loss,
            "best_valid_loss": state.best_loss,
            "exact_match_before": self.metric_before,
            "exact_match": self.metric_after,
        }
        lineage = dataclasses.replace(
            self.lineage, metrics={name: value for name, value in metrics.items() if value is not None}
        )
        lora = self.recipe.lora_parameters
        if self.adapted.fine_tune_type == "full" or lora is None:
            return AdapterConfig("full", self.adapted.num_layers, lineage=lineage)
        return AdapterConfig(
            fine_tune_type="lora",
            num_layers=self.adapted.num_layers,
            rank=lora.rank,
            scale=lora.effective_scale,
            dropout=lora.dropout,
            keys=self.adapted.keys,
            lineage=lineage,
        )

    def _write_recipe(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_synced(self.folder / RECIPE_FILE, dump(self.recipe))
        except OSError as error:
            raise StorageError(f"adapter_path: {self.folder} cannot be written: {error}") from error

    def _summary(
        self,
        state: TrainState,
        published_step: int,
        test_loss: float | None,
        config: AdapterConfig,
        caught: int | None,
    ) -> RunSummary:
        is_short = state.iteration < self.flight.num_iterations
        status: Literal["finished", "stopped_early", "interrupted"] = (
            "interrupted" if is_short and caught else "stopped_early" if is_short else "finished"
        )
        return RunSummary(
            status=status,
            adapter_path=str(self.folder),
            steps=state.step,
            iterations=state.iteration,
            train_loss=state.train_loss,
            first_valid_loss=state.first_valid_loss,
            valid_loss=state.valid_loss,
            best_valid_loss=state.best_loss,
            best_step=state.best_step,
            published_step=published_step,
            test_loss=test_loss,
            metric=self.recipe.metric.name if self.recipe.metric else None,
            metric_before=self.metric_before,
            metric_after=self.metric_after,
            num_trainable=self.adapted.num_trainable,
            num_targets=state.num_targets,
            num_tokens=state.num_tokens,
            seconds=time.perf_counter() - self.start_s,
            train_seconds=state.seconds,
            tokens_per_s=state.num_tokens / max(state.seconds, 1e-9),
            peak_memory_bytes=peak_memory_bytes(),
            content_hash=config.lineage.content_hash if config.lineage else "",
            signal=caught if status == "interrupted" else None,
        )


def _loop_settings(recipe: Recipe, flight: Preflight) -> LoopSettings:
    return LoopSettings(
        num_iterations=flight.num_iterations,
        accumulation=recipe.grad_accumulation_steps,
        iterations_per_report=recipe.steps_per_report,
        iterations_per_eval=recipe.steps_per_eval,
        iterations_per_save=recipe.save_every,
        patience=recipe.early_stopping_patience,
        save_best=recipe.load_best_model_at_end,
        clear_cache_bytes=recipe.clear_cache_threshold,
    )


def _optimizer(recipe: Recipe, flight: Preflight, model: LoadedModel) -> Any:
    schedule = build_schedule(
        recipe.lr_schedule.model_dump() if recipe.lr_schedule else None,
        learning_rate=recipe.learning_rate,
        num_steps=flight.num_steps,
        warmup_ratio=recipe.warmup_ratio,
    )
    return build_optimizer(
        recipe.optimizer,
        recipe.optimizer_config.model_dump(exclude_unset=True),
        schedule,
        learning_rate=recipe.learning_rate,
        embedding_names=embedding_names(model.network),
    )


def _lineage(recipe: Recipe, flight: Preflight, model: LoadedModel) -> Lineage:
    said = recipe.model_dump(mode="json", exclude={"adapter_path", "resume_from_checkpoint"})
    return Lineage(
        base_model=recipe.model,
        base_fingerprint=model.fingerprint,
        template_hash=flight.template.hash,
        recipe_hash=f"sha256:{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}",
        data_hash=flight.data_hash,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        lathe_version=metadata.version("mlx-lathe"),
    )


def _write_json(path: Path, body: dict[str, Any]) -> None:
    partial = path.with_name(f".new-{path.name}")
    try:
        checkpoint.write_synced(partial, json.dumps(body, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path}: {error}") from error


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals caught so far; the first asks the run to end, a second SIGINT breaks it off at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    earlier: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, earlier[number])

    handler: Callable[[int, Any], None] = note
    for number in (signal.SIGINT, signal.SIGTERM):
        earlier[number] = signal.signal(number, handler)
    try:
        yield caught
    finally:
        for restored, before in earlier.items():
            signal.signal(restored, before)
