"""Where a run starts: at the beginning, in a folder made free for it, or at a checkpoint. Moves files, no weights.

A process may be killed at any instant in here. What it leaves is the earlier run whole, or a folder to start in.
"""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

from rich.console import Console

from serve.adapters.manifest import read_config
from serve.errors import ConfigError, StorageError
from train.loop import checkpoint
from train.loop.checkpoint import Checkpoint
from train.loop.distributed import Ranks
from train.recipe.recipe import Recipe
from train.watch import curve, metrics, record, summary


def starting_point(recipe: Recipe, resume: Path | str | bool | None, console: Console) -> Checkpoint | None:
    """The checkpoint to go on from, or None after the folder was cleared for a run from the beginning.

    resume  a checkpoint or a run's folder; True: the last checkpoint in adapter_path. Where there is none yet (the
            process was killed before its first save), the recipe's resume_from_checkpoint, or the beginning
    ConfigError if the folder holds another run that is unfinished, or that is being trained.
    """
    folder = Path(recipe.adapter_path)
    record.check_free(folder)
    if not checkpoint.is_set_aside(folder):
        checkpoint.tidy(folder)
    where = _where(recipe, resume)
    saved = checkpoint.load(checkpoint.find(where)) if where else None
    if saved is None or not _is_inside(saved.folder, folder):
        make_room(folder, resume=bool(resume))
    if saved is not None:
        _bring_metrics(saved, folder)
        console.print(
            f"continuing {saved.folder} after step {saved.state.step}", highlight=False, soft_wrap=True
        )
    elif resume:
        console.print(
            f"no checkpoint in {folder}: the run starts from the beginning", highlight=False, soft_wrap=True
        )
    return saved


def day_of_run(recipe: Recipe, resume: Path | str | bool | None, today: date, ranks: Ranks) -> date:
    """The day that all processes' chat templates print, all the run long: rank 0's, as `first_day` tells it."""
    day = today if ranks.rank else first_day(recipe, resume, today)
    return date.fromisoformat(ranks.gather(day.isoformat())[0])


def first_day(recipe: Recipe, resume: Path | str | bool | None, today: date) -> date:
    """The day on which the run began that is continued; today, for one that begins. `resume` as above."""
    where = _where(recipe, resume)
    if where is None:
        return today
    lineage = read_config(checkpoint.find(where)).lineage
    return date.fromisoformat(lineage.template_day) if lineage and lineage.template_day else today


def _where(recipe: Recipe, resume: Path | str | bool | None) -> Path | None:
    """A checkpoint, or a run's folder, that is to be continued."""
    where: Path | str | bool | None = resume or recipe.resume_from_checkpoint
    if where is True:
        folder = Path(recipe.adapter_path)
        where = folder if checkpoint.existing(folder) else recipe.resume_from_checkpoint
    return Path(str(where)) if where else None


def _is_inside(saved: Path, folder: Path) -> bool:
    return saved.resolve().parent == (folder / checkpoint.FOLDER).resolve()


def _bring_metrics(saved: Checkpoint, folder: Path) -> None:
    """A run continued in another folder takes its history along."""
    source = saved.folder.parent.parent / metrics.FILE
    if _is_inside(saved.folder, folder) or not source.is_file():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_whole(folder / metrics.FILE, source.read_bytes()[: saved.metrics_bytes])
    except OSError as error:
        raise StorageError(f"{folder / metrics.FILE}: {error}") from error


def give_up_later(saved: Checkpoint, folder: Path, limit: int | None, console: Console) -> None:
    """Remove checkpoints after the one that is continued; they belong to a continuation given up.

    And those beyond save_total_limit, if a kill came between a save and its pruning.
    """
    for later in checkpoint.existing(folder):
        if checkpoint.step_of(later) > saved.state.step:
            console.print(
                f"{later} belongs to a continuation given up, and is removed", highlight=False, soft_wrap=True
            )
            checkpoint.remove(later)
    checkpoint.prune(folder, limit, saved.state.best_step)


def make_room(folder: Path, *, resume: bool = False) -> None:
    """Clear a folder for a run that starts from the beginning.

    resume  the user asked to go on, and there is no checkpoint: refused if the folder holds a finished run
    A folder that holds an unfinished run is refused. A finished one's records give way; its adapter stays until the
    new one is published.
    """
    status = summary.status_of(folder)
    found = checkpoint.existing(folder)
    if found and status in (None, "interrupted"):
        raise ConfigError(
            f"adapter_path: {folder} holds an unfinished run, last saved at {found[-1].name}. Continue it with "
            f"--resume, delete the folder, or name another adapter_path"
        )
    is_finished = status not in (None, "interrupted") and not checkpoint.is_set_aside(folder)
    if resume and not found and is_finished:
        raise ConfigError(
            f"--resume: the run in {folder} is {status} and has no checkpoint to continue from; train without "
            f"--resume to replace it, or name another adapter_path"
        )
    try:
        if any((folder / name).exists() for name in (checkpoint.FOLDER, record.FILE, metrics.FILE)):
            checkpoint.set_aside(folder)
            shutil.rmtree(folder / metrics.TENSORBOARD_FOLDER, ignore_errors=True)
            for name in (summary.FILE, record.FILE, curve.FILE, metrics.FILE):
                (folder / name).unlink(missing_ok=True)
        checkpoint.tidy(folder)
    except OSError as error:
        raise StorageError(f"{folder}: the earlier run cannot be cleared away: {error}") from error
