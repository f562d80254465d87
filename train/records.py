"""What rank 0 of a run writes into its folder while the run goes on, opened and closed in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from serve.adapters.formats.lineage import Lineage
from serve.errors import StorageError
from serve.model.loading import LoadedModel
from serve.settings import dump
from train.foresee.preflight import Preflight
from train.loop.checkpoint import Checkpoint
from train.loop.keeper import Keeper
from train.loop.optim import rates_of, schedule_of
from train.loop.trainer import TrainState
from train.loop.whole import write_whole
from train.recipe.recipe import Recipe
from train.watch import summary
from train.watch.curve import LearningCurve
from train.watch.journal import Journal
from train.watch.lineage import now
from train.watch.metrics import MetricsLog
from train.watch.progress import RunProgress
from train.watch.record import RunRecord, home_of, running
from train.watch.samples import answers_of
from train.watch.serve_to import ServeTo
from train.watch.wandb_log import WandbBoard

RECIPE_FILE = "recipe.yaml"


@contextmanager
def recording(
    flight: Preflight,
    model: LoadedModel,
    keeper: Keeper,
    saved: Checkpoint | None,
    state: TrainState,
    console: Console,
    server: ServeTo | None = None,
) -> Iterator[Journal]:
    """The run's journal; inside, the folder is this process's. run.json, recipe.yaml, metrics and the progress line.

    saved   the checkpoint that is continued, if any; what metrics say after it is cut off
    server  is told of each checkpoint
    """
    recipe, folder = flight.recipe, keeper.folder
    metrics_bytes = saved.metrics_bytes if saved else 0
    with (
        running(record_of(flight, keeper.lineage, saved), folder) as record,
        MetricsLog(folder, keep_bytes=metrics_bytes, next_step=state.step + 1) as metrics,
        RunProgress(console, flight.num_iterations, state.iteration) as progress,
    ):
        summary.clear(folder)
        _write_recipe(recipe, folder)
        if "wandb" in (recipe.report_to or ()):
            metrics.add(_wandb(recipe, folder, record))
        samples, prompts, stop_ids = recipe.samples, flight.sample_prompts, flight.stop_ids
        yield Journal(
            keeper,
            metrics,
            progress,
            LearningCurve(
                folder, title_of(recipe), rates_of(schedule_of(recipe, flight.num_steps), flight.num_steps)
            ),
            shown=recipe.entry.shown,
            samples=(lambda: answers_of(model, prompts, samples, stop_ids)) if samples else tuple,
            told=server.tell if server else lambda folder: None,
            notes=lambda: [*flight.take_notes(), *(server.take_notes() if server else ())],
        )


def tell(console: Console, lines: Sequence[str]) -> None:
    """Notes that a person should read before the first step."""
    for line in lines:
        console.print(line, style="yellow", highlight=False, soft_wrap=True)


def record_of(flight: Preflight, lineage: Lineage, saved: Checkpoint | None) -> RunRecord:
    """What run.json says of a run, but for the process."""
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
        template_day=lineage.template_day,
        resumed_from=str(saved.folder) if saved else "",
        resumed=now() if saved else "",
    )


def title_of(recipe: Recipe) -> str:
    """`runs/support   ·   Qwen3-0.6B, lora, sft`: over the learning curve."""
    model = Path(recipe.model).name
    return f"{home_of(Path(recipe.adapter_path))}   ·   {model}, {recipe.fine_tune_type}, {recipe.objective}"


def _wandb(recipe: Recipe, folder: Path, record: RunRecord) -> WandbBoard:
    return WandbBoard(
        folder,
        project=recipe.project_name,
        config=recipe.model_dump(mode="json"),
        created=record.created,
        data_hash=record.data_hash,
    )


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = recipe.model_copy(update={"adapter_path": str(home_of(folder))})
        write_whole(folder / RECIPE_FILE, dump(written))
    except OSError as error:
        raise StorageError(f"adapter_path: {folder} cannot be written: {error}") from error
