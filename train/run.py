"""One run: recipe → data → model → what trains → trainer → adapter folder and summary.json.

The wiring and nothing else; each step is in the file it is imported from.
"""

from __future__ import annotations

import hashlib
import json
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as mlx_optim
from rich.console import Console

from serve import device
from serve.adapters.manifest import (
    CONFIG_FILE,
    TENSORS_FILE,
    Lineage,
    read_config,
    read_tensors,
    write_adapter,
)
from serve.errors import AdapterError, ConfigError, StorageError
from serve.model.loading import LoadedModel, build_random, load, resolve
from serve.settings import dump
from train import checkpoint, preflight, summary
from train.adapt import Adapted, add_lora, embedding_names, set_tensors, train_all, trainable_tensors
from train.interrupt import caught_signals
from train.journal import Journal, identity_of
from train.metrics import MetricsLog
from train.optim import build_optimizer, build_schedule
from train.preflight import Preflight
from train.progress import RunProgress
from train.recipe import Recipe
from train.summary import RunSummary
from train.trainer import LoopSettings, Stepper, Trainer, TrainState, mean_loss

RECIPE_FILE = "recipe.yaml"


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
    flight = preflight.prepare(recipe)
    preflight.show(flight, console, with_recipe=dry_run)
    if dry_run:
        return RunSummary("dry_run", recipe.adapter_path)
    saved = _find_checkpoint(recipe, resume, console)
    if saved is None:
        summary.make_room(Path(recipe.adapter_path))
    model = _load_model(recipe)
    mx.random.seed(recipe.seed)
    adapted = _adapt(recipe, model, console)
    return _train(flight, model, adapted, saved, console, start_s)


def _train(
    flight: Preflight,
    model: LoadedModel,
    adapted: Adapted,
    saved: checkpoint.Checkpoint | None,
    console: Console,
    start_s: float,
) -> RunSummary:
    recipe, folder = flight.recipe, Path(flight.recipe.adapter_path)
    lineage = _lineage(flight, model)
    optimizer = _optimizer(flight, model)
    stepper = _stepper(flight, model, optimizer)
    state, metrics_bytes = TrainState(), 0
    if saved is not None:
        checkpoint.check_identity(saved, identity_of(flight, lineage))
        set_tensors(model.network, saved.tensors, str(saved.folder))
        checkpoint.restore_optimizer(optimizer, saved.optimizer)
        state, metrics_bytes = saved.state, saved.metrics_bytes
    _write_recipe(recipe, folder)
    with (
        MetricsLog(folder, keep_bytes=metrics_bytes, next_step=state.step + 1) as metrics,
        RunProgress(console, flight.num_iterations, state.iteration) as progress,
        caught_signals() as caught,
    ):
        journal = Journal(flight, model, adapted, optimizer, lineage, metrics, progress)
        if saved is not None:
            journal.recall(saved.config)
        trainer = Trainer(
            stepper,
            _loop_settings(flight),
            flight.batch_at,
            flight.valid_batches(),
            journal,
            state=state,
            stop=lambda: bool(caught),
        )
        trainer.fit()
        published_step = _choose_weights(recipe, model, journal, state)
        test_batches = flight.test_batches()
        test_loss = mean_loss(model.network, test_batches) if test_batches else None
    config = write_adapter(folder, trainable_tensors(model.network), journal.config(state))
    result = summary.of_run(
        state,
        folder,
        num_iterations=flight.num_iterations,
        caught=caught[0] if caught else None,
        published_step=published_step,
        test_loss=test_loss,
        metric=recipe.metric.name if recipe.metric else None,
        metric_before=journal.metric_before,
        metric_after=journal.metric_after,
        num_trainable=adapted.num_trainable,
        seconds=time.perf_counter() - start_s,
        content_hash=config.lineage.content_hash if config.lineage else "",
    )
    summary.write(result, folder)
    return result


def _find_checkpoint(
    recipe: Recipe, resume: Path | str | bool | None, console: Console
) -> checkpoint.Checkpoint | None:
    """The checkpoint to continue, if any; later ones in the same folder belong to a continuation given up."""
    where = recipe.adapter_path if resume is True else resume or recipe.resume_from_checkpoint
    if not where:
        return None
    saved = checkpoint.load(checkpoint.find(Path(where)))
    console.print(f"continuing {saved.folder} after step {saved.state.step}", highlight=False)
    for later in checkpoint.existing(Path(recipe.adapter_path)):
        if checkpoint.step_of(later) > saved.state.step:
            console.print(f"{later} belongs to a continuation given up, and is removed", highlight=False)
            checkpoint.remove(later)
    return saved


def _choose_weights(recipe: Recipe, model: LoadedModel, journal: Journal, state: TrainState) -> int:
    """Put the weights to publish in place: the last ones, or the best. Returns their step."""
    best = state.best_step
    if not recipe.load_best_model_at_end or best is None or best == state.step:
        return state.step
    saved = checkpoint.load(checkpoint.folder_of(journal.folder, best))
    set_tensors(model.network, saved.tensors, str(saved.folder))
    journal.progress.say(f"step {best} had the lowest validation loss and is the one that is published")
    journal.measure(best)
    return best


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
        config = read_config(folder) if (folder / CONFIG_FILE).exists() else None
        if config and config.fine_tune_type != adapted.fine_tune_type:
            raise AdapterError(
                f"resume_adapter_file: {path} is a {config.fine_tune_type} fine-tune, "
                f"this run is {adapted.fine_tune_type}"
            )
    else:
        tensors = checkpoint.load_tensors(path)
    set_tensors(model.network, tensors, f"resume_adapter_file {path}")


def _stepper(flight: Preflight, model: LoadedModel, optimizer: mlx_optim.Optimizer) -> Stepper:
    recipe = flight.recipe
    return Stepper(
        model.network,
        optimizer,
        max_grad_norm=recipe.max_grad_norm,
        compiled=device.backend() != "cpu",
        seed=recipe.seed,
        recompute=recipe.grad_checkpoint,
        name_row=flight.name_row,
    )


def _loop_settings(flight: Preflight) -> LoopSettings:
    recipe = flight.recipe
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


def _optimizer(flight: Preflight, model: LoadedModel) -> mlx_optim.Optimizer:
    recipe = flight.recipe
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


def _lineage(flight: Preflight, model: LoadedModel) -> Lineage:
    recipe = flight.recipe
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


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_synced(folder / RECIPE_FILE, dump(recipe))
    except OSError as error:
        raise StorageError(f"adapter_path: {folder} cannot be written: {error}") from error
