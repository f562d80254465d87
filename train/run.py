"""One run: recipe → data → model → what trains → trainer → adapter folder and summary.json.

The wiring and nothing else; each step is in the file it is imported from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
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
    content_hash,
    read_config,
    read_tensors,
    write_adapter,
)
from serve.errors import AdapterError, ConfigError, StorageError
from serve.model.loading import LoadedModel, build_random, load, resolve
from serve.model.packed import packing_problem
from serve.model.vocabulary import vocabulary_hash
from serve.settings import dump
from train.adapters.adapt import Adapted, adapter_tensors, add_lora, embedding_names, set_tensors, train_all
from train.foresee import estimate, preflight
from train.foresee.preflight import Preflight
from train.loop import checkpoint
from train.loop.distributed import (
    Ranks,
    agree_to_stop,
    check_same,
    join,
    losses_named,
)
from train.loop.interrupt import caught_signals
from train.loop.optim import build_optimizer, schedule_of
from train.loop.together import Together
from train.loop.trainer import Evaluation, LoopSettings, Stepper, Trainer, TrainState
from train.loop.wired import wired
from train.objectives.build import build_objective
from train.objectives.rollouts import Rollouts, evaluation_of, rollouts_of
from train.recipe.recipe import Recipe
from train.start import choose_folder, give_up_later, look_at, put_in_place, starting_point
from train.watch import summary
from train.watch.journal import Journal, identity_of
from train.watch.metrics import MetricsLog
from train.watch.progress import RunProgress
from train.watch.record import RunRecord, home_of, running
from train.watch.summary import RunSummary
from train.watch.wandb_log import WandbBoard, check_installed

RECIPE_FILE = "recipe.yaml"


def run(
    recipe: Recipe,
    *,
    dry_run: bool = False,
    resume: Path | str | bool | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> RunSummary:
    """Train as the recipe says, or only look (`dry_run`).

    resume     a checkpoint or a run's folder to continue; True: the last checkpoint in the recipe's adapter_path
    overwrite  the run that adapter_path holds gives way when this one has ended
    SIGINT and SIGTERM end the run after the step under way, with a checkpoint; the summary says so.
    Raises from the whole error tree; whatever is raised, published checkpoints stay whole.
    """
    console = console or Console()
    with losses_named():
        ranks, folder = join(), Path(recipe.adapter_path)
        if dry_run:
            look_at(folder, console)
        elif not ranks.rank:
            folder = choose_folder(recipe, resume, overwrite=overwrite, console=console)
        placed = recipe.model_copy(update={"adapter_path": str(folder)})
        result = _run(placed, ranks, dry_run, resume, console)
        put_in_place(recipe, folder, result.status, console)
        return result


def _run(
    recipe: Recipe, ranks: Ranks, dry_run: bool, resume: Path | str | bool | None, console: Console
) -> RunSummary:
    start_s = time.perf_counter()
    console = Console(quiet=True) if ranks.rank else console
    if "wandb" in (recipe.report_to or ()):
        check_installed()
    flight = preflight.prepare(recipe, console, ranks)
    preflight.show(flight, console, with_recipe=dry_run)
    estimate.show(flight, console)
    if dry_run:
        return RunSummary("dry_run", recipe.adapter_path)
    model = _load_model(recipe)
    _check_model(recipe, model)
    # Only now: an earlier run's records give way to a run that can start.
    saved = None if ranks.rank else starting_point(recipe, resume, console)
    mx.random.seed(recipe.seed)
    is_restored = ranks.gather(saved is not None)[0]
    adapted = _adapt(recipe, model, console, is_restored=is_restored)
    return _train(flight, model, adapted, saved, console, start_s)


def _train(
    flight: Preflight,
    model: LoadedModel,
    adapted: Adapted,
    saved: checkpoint.Checkpoint | None,
    console: Console,
    start_s: float,
) -> RunSummary:
    recipe, folder, ranks = flight.recipe, Path(flight.recipe.adapter_path), flight.ranks
    lineage = _lineage(flight, model)
    optimizer = _optimizer(flight, model)
    stepper = _stepper(flight, model, optimizer)
    check_same(ranks, _facts(lineage, recipe))
    state, metrics_bytes = TrainState(), 0
    if saved is not None:
        checkpoint.check_identity(saved, identity_of(flight, lineage))
        set_tensors(model.network, saved.tensors, str(saved.folder))
        checkpoint.restore_optimizer(optimizer, saved.optimizer)
        state, metrics_bytes = saved.state, saved.metrics_bytes
        give_up_later(saved, folder, recipe.save_total_limit, console)
    state = TrainState.of(ranks.gather(dataclasses.asdict(state))[0])
    _spread(stepper)
    if ranks.rank:
        return _follow(flight, model, adapted, stepper, state, start_s)
    with (
        running(_record(flight, lineage, saved), folder) as mine,
        MetricsLog(folder, keep_bytes=metrics_bytes, next_step=state.step + 1) as metrics,
        RunProgress(console, flight.num_iterations, state.iteration) as progress,
        wired(),
        caught_signals() as caught,
        losses_named(),
    ):
        summary.clear(folder)
        _write_recipe(recipe, folder)
        if "wandb" in (recipe.report_to or ()):
            metrics.add(_wandb(recipe, folder, mine))
        lineage = dataclasses.replace(lineage, created=mine.created)
        journal = Journal(flight, model, adapted, optimizer, lineage, metrics, progress)
        if saved is not None:
            journal.recall(saved.config)
        rollouts = rollouts_of(flight, model)
        together = Together(journal, ranks, journal.measure, lambda: _spread(stepper))
        _trainer(flight, stepper, rollouts, together, state, caught).fit()
        published_step = _choose_weights(recipe, model, journal, state)
        _spread(stepper)
        test_loss = _test_loss(flight, stepper, rollouts)
    config = write_adapter(folder, adapter_tensors(model.network), journal.config(state))
    journal.curve.draw()
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
    ranks.gather(None)  # the other processes end when everything is written
    return result


def _follow(
    flight: Preflight,
    model: LoadedModel,
    adapted: Adapted,
    stepper: Stepper,
    state: TrainState,
    start_s: float,
) -> RunSummary:
    """A process that is not the first: it computes its share, writes nothing and ends as rank 0 does."""
    with wired(), caught_signals() as caught:
        rollouts = rollouts_of(flight, model)
        together = Together(None, flight.ranks, lambda step: {}, lambda: _spread(stepper))
        _trainer(flight, stepper, rollouts, together, state, caught).fit()
        _spread(stepper)
        test_loss = _test_loss(flight, stepper, rollouts)
    flight.ranks.gather(None)
    return summary.of_run(
        state,
        Path(flight.recipe.adapter_path),
        num_iterations=flight.num_iterations,
        caught=caught[0] if caught else None,
        test_loss=test_loss,
        num_trainable=adapted.num_trainable,
        seconds=time.perf_counter() - start_s,
    )


def _trainer(
    flight: Preflight,
    stepper: Stepper,
    rollouts: Rollouts | None,
    together: Together,
    state: TrainState,
    caught: list[int],
) -> Trainer:
    return Trainer(
        stepper,
        _loop_settings(flight),
        # Either is this process's share already: rollouts answer only their own prompts.
        rollouts.batch_at if rollouts else flight.batch_at,
        flight.valid_batches(),
        together,
        state=state,
        stop=lambda: agree_to_stop(flight.ranks, caught),
        evaluate=_evaluation(flight, rollouts),
        measure=together.measure,
    )


def _spread(stepper: Stepper) -> None:
    """Rank 0's weights and optimizer state, in every process."""
    ranks, module = stepper.ranks, stepper.network.module
    if ranks.size == 1:
        return
    module.update(ranks.first_tree(module.trainable_parameters()))
    checkpoint.restore_optimizer(
        stepper.optimizer, ranks.first_tree(checkpoint.flat_state(stepper.optimizer))
    )


def _facts(lineage: Lineage, recipe: Recipe) -> dict[str, str]:
    """What all processes must have alike; paths may differ from machine to machine."""
    here = {
        "model",
        "data",
        "datasets",
        "hf_dataset",
        "adapter_path",
        "dataset_prepared_path",
        "dataset_processes",
    }
    said = recipe.model_dump(mode="json", exclude=here | {"resume_adapter_file", "resume_from_checkpoint"})
    return {
        **{f"recipe key {name}": json.dumps(value) for name, value in said.items()},
        "the base": lineage.base_fingerprint,
        "the chat template": lineage.template_hash or "",
        "the training data": lineage.data_hash or "",
        "mlx-lathe": lineage.lathe_version or "",
        "mlx": metadata.version("mlx"),
    }


def _record(flight: Preflight, lineage: Lineage, saved: checkpoint.Checkpoint | None) -> RunRecord:
    recipe = flight.recipe
    return RunRecord(
        name=home_of(Path(recipe.adapter_path)).resolve().name,
        created=lineage.created,
        base_model=lineage.base_model,
        base_fingerprint=lineage.base_fingerprint,
        data_hash=lineage.data_hash,
        recipe_hash=lineage.recipe_hash,
        objective=recipe.objective,
        fine_tune_type=recipe.fine_tune_type,
        num_iterations=flight.num_iterations,
        parent=lineage.parent,
        parent_hash=lineage.parent_hash,
        resumed_from=str(saved.folder) if saved else "",
        resumed=_now() if saved else "",
    )


def _wandb(recipe: Recipe, folder: Path, mine: RunRecord) -> WandbBoard:
    said = recipe.model_dump(mode="json")
    project, created = recipe.project_name, mine.created
    return WandbBoard(folder, project=project, config=said, created=created, data_hash=mine.data_hash)


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
    return load(recipe.model, quantize=recipe.quantize, trust_remote_code=recipe.trust_remote_code)


def _check_model(recipe: Recipe, model: LoadedModel) -> None:
    """ConfigError where this model cannot be trained as the recipe asks."""
    if recipe.fine_tune_type == "full" and "quantization" in model.config:
        raise ConfigError(
            f"fine_tune_type: full needs a base in full precision; {recipe.model} is quantized. Use "
            f"fine_tune_type: lora, or the model it was quantized from"
        )
    problem = packing_problem(model.network, recipe.max_seq_length) if recipe.sample_packing else None
    if problem:
        raise ConfigError(
            f"sample_packing: {recipe.model} cannot be packed: {problem}. Write sample_packing: false; batches "
            f"then go by length, which leaves about 5 % padding"
        )


def _adapt(recipe: Recipe, model: LoadedModel, console: Console, *, is_restored: bool) -> Adapted:
    if recipe.fine_tune_type == "full":
        # Random weights are all new; leaving some of them frozen would train on noise.
        adapted = train_all(model.network, num_layers=-1 if recipe.init == "random" else recipe.num_layers)
    else:
        lora = recipe.lora_parameters
        assert lora is not None, "the recipe fills lora_parameters unless fine_tune_type is full"
        adapted = add_lora(
            model.network,
            rank=lora.rank,
            scale=lora.effective_scale,
            dropout=lora.dropout,
            keys=lora.keys,
            num_layers=recipe.num_layers,
            fine_tune_type=recipe.fine_tune_type,
            init=lora.init_lora_weights,
            is_restored=is_restored or recipe.resume_adapter_file is not None,
        )
    if recipe.resume_adapter_file:
        _warm_start(Path(recipe.resume_adapter_file), model, adapted)
    share = adapted.num_trainable / adapted.num_parameters
    console.print(
        f"trainable: {adapted.num_trainable:,} of {adapted.num_parameters:,} parameters ({share:.2%})"
    )
    for note in (*model.notes, *adapted.notes):
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
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


def _evaluation(flight: Preflight, rollouts: Rollouts | None) -> Callable[[], Evaluation] | None:
    """In place of a loss over validation rows, where those are prompts to answer."""
    valid, recipe = flight.valid, flight.recipe
    if rollouts is None or valid is None:
        return None
    return lambda: evaluation_of(rollouts, valid, recipe.batch_size * flight.ranks.size, recipe.val_batches)


def _test_loss(flight: Preflight, stepper: Stepper, rollouts: Rollouts | None) -> float | None:
    recipe = flight.recipe
    if flight.test is None:
        return None
    if rollouts is not None:
        size = recipe.batch_size * flight.ranks.size
        return evaluation_of(rollouts, flight.test, size, recipe.test_batches).loss
    return stepper.mean_loss(flight.test_batches()).loss


def _stepper(flight: Preflight, model: LoadedModel, optimizer: mlx_optim.Optimizer) -> Stepper:
    recipe = flight.recipe
    return Stepper(
        model.network,
        optimizer,
        build_objective(recipe, model.network),
        max_grad_norm=recipe.max_grad_norm,
        compiled=device.backend() != "cpu",
        seed=recipe.seed,
        recompute=recipe.grad_checkpoint,
        name_row=flight.name_row,
        ranks=flight.ranks,
        max_places=recipe.micro_batch_tokens,
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
        best_by=recipe.metric_for_best_model,
        greater_is_better=recipe.metric_for_best_model != "loss",
        nonfinite=recipe.nonfinite_policy,
        clear_cache_bytes=recipe.clear_cache_threshold,
    )


def _optimizer(flight: Preflight, model: LoadedModel) -> mlx_optim.Optimizer:
    recipe = flight.recipe
    schedule = schedule_of(recipe, flight.num_steps)
    return build_optimizer(
        recipe.optimizer,
        recipe.optimizer_config.model_dump(exclude_unset=True),
        schedule,
        learning_rate=recipe.learning_rate,
        embedding_names=embedding_names(model.network),
        loraplus_ratio=recipe.loraplus_lr_ratio,
    )


def _lineage(flight: Preflight, model: LoadedModel) -> Lineage:
    recipe = flight.recipe
    said = recipe.model_dump(mode="json", exclude={"adapter_path", "resume_from_checkpoint"})
    return Lineage(
        base_model=recipe.model,
        base_fingerprint=model.fingerprint,
        quantize=recipe.quantize.model_dump() if recipe.quantize else None,
        template_hash=flight.template.hash,
        vocabulary_hash=vocabulary_hash(model.tokenizer),
        recipe_hash=f"sha256:{hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}",
        data_hash=flight.data_hash,
        created=_now(),
        lathe_version=metadata.version("mlx-lathe"),
        parent=recipe.resume_adapter_file or "",
        parent_hash=_hash_of(Path(recipe.resume_adapter_file)) if recipe.resume_adapter_file else "",
        objective=recipe.objective,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _hash_of(parent: Path) -> str:
    """The content hash of an adapter folder, as its manifest says, or of a file's tensors."""
    folder = parent if parent.is_dir() else parent.parent
    if (parent.is_dir() or parent.name == TENSORS_FILE) and (folder / CONFIG_FILE).exists():
        lineage = read_config(folder).lineage
        if lineage is not None and lineage.content_hash:
            return lineage.content_hash
    return content_hash(checkpoint.load_tensors(folder / TENSORS_FILE if parent.is_dir() else parent))


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = recipe.model_copy(update={"adapter_path": str(home_of(folder))})
        checkpoint.write_whole(folder / RECIPE_FILE, dump(written))
    except OSError as error:
        raise StorageError(f"adapter_path: {folder} cannot be written: {error}") from error
