"""Where a run starts: in which folder, and there at the beginning or at a checkpoint. Moves files, no weights.

A process may be killed at any instant in here. What it leaves is the earlier run whole, or a folder to start in.
"""

from __future__ import annotations

import shutil
import tempfile
from datetime import date
from pathlib import Path

from rich.console import Console

from serve.adapters.formats.manifest import TENSORS_FILE, read_config
from serve.errors import ConfigError, StorageError
from train import replace
from train.loop import checkpoint
from train.loop.checkpoint import Checkpoint
from train.loop.distributed import Ranks
from train.loop.whole import write_whole
from train.recipe.recipe import Recipe
from train.watch import curve, metrics, record, summary

ELSEWHERE = "name another adapter_path"


def folder_of_run(
    recipe: Recipe,
    resume: Path | str | bool | None,
    ranks: Ranks,
    *,
    dry_run: bool,
    overwrite: bool,
    console: Console,
) -> Path:
    """Where a process of the run writes: as `choose_folder` says on rank 0; the others write nothing.

    ConfigError as `choose_folder`; a dry run as `look_at`.
    """
    folder = Path(recipe.adapter_path)
    if dry_run:
        look_at(folder, console)
    elif not ranks.rank:
        folder = choose_folder(recipe, resume, overwrite=overwrite, console=console)
    return folder


def choose_folder(
    recipe: Recipe, resume: Path | str | bool | None, *, overwrite: bool, console: Console
) -> Path:
    """The folder that the run writes: adapter_path; or one inside it, where the run there stays until this one ends.

    resume     as in `starting_point`
    overwrite  what the folder holds may give way to this run
    ConfigError where the folder holds something and neither was said, where another process trains in it, and where
    it cannot be written. All before anything is read.
    """
    folder = Path(recipe.adapter_path)
    new = replace.next_folder(folder)
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite begins another; expected one of them")
    for place in (folder, new):
        _check_free(place)
    check_writable(folder)
    replace.settle(folder)
    if resume is True and replace.is_begun(folder):
        return new
    content = content_of(folder)
    if content is None or (not overwrite and _goes_on_with(folder, recipe, resume)):
        return folder
    if not overwrite:
        raise ConfigError(_refusal(folder, content, resume))
    console.print(
        f"{folder} holds {content}, which stays until this run has ended; until then this one is in {new}",
        highlight=False,
        soft_wrap=True,
    )
    return new


def look_at(folder: Path, console: Console) -> None:
    """What a dry run says of the folder: a note where a run would be refused. ConfigError where none can write."""
    check_writable(folder)
    content = content_of(folder)
    if content is not None:
        said = f"{folder} holds {content}; a run takes --resume or --overwrite"
        console.print(said, style="yellow", highlight=False, soft_wrap=True)


def _check_free(folder: Path) -> None:
    """ConfigError while another process trains in the folder. Where a summary stands, none does."""
    if summary.status_of(folder) is None:
        record.check_free(folder)


def content_of(folder: Path) -> str | None:
    """What would be lost if a run began in a folder, in words; None where that is nothing."""
    status, saved = summary.status_of(folder), checkpoint.existing(folder)
    if status in summary.ENDED:
        return f"a run that is {str(status).replace('_', ' ')}"
    if saved:
        return f"an unfinished run, last saved at {saved[-1].name}"
    return "an adapter" if (folder / TENSORS_FILE).exists() else None


def _goes_on_with(folder: Path, recipe: Recipe, resume: Path | str | bool | None) -> bool:
    """Whether the run continues the one in the folder, and gives up nothing that has ended."""
    saved, where = checkpoint.existing(folder), resume or recipe.resume_from_checkpoint
    if where is True:
        return bool(saved)
    if not where:
        return False
    wanted = checkpoint.find(Path(where)).resolve()
    has_ended = summary.status_of(folder) in summary.ENDED
    return wanted in [each.resolve() for each in (saved[-1:] if has_ended else saved)]


def _refusal(folder: Path, content: str, resume: Path | str | bool | None) -> str:
    found = f"adapter_path: {folder} holds {content}"
    replacing = "--overwrite trains a new one, which takes its place once it has ended"
    if resume is True:
        what = f"{folder} holds {content} and has no checkpoint to continue from"
        return f"--resume: {what}; {replacing}, or {ELSEWHERE}"
    if summary.status_of(folder) in summary.ENDED:
        return f"{found}. {replacing[0].upper()}{replacing[1:]}; or {ELSEWHERE}"
    if checkpoint.existing(folder):
        return f"{found}. Continue it with --resume, or {ELSEWHERE}; {replacing}"
    return f"{found}; {replacing}, or {ELSEWHERE}"


def check_writable(folder: Path) -> None:
    """ConfigError unless files can be made in a folder, which need not be there. Nothing is left behind."""
    made: list[Path] = []
    try:
        missing = [each for each in (folder, *folder.absolute().parents) if not each.exists()]
        for each in reversed(missing):
            each.mkdir()
            made.append(each)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"adapter_path: {folder} cannot be written: {error}; {ELSEWHERE}") from error
    finally:
        for each in reversed(made):
            each.rmdir()


def starting_point(recipe: Recipe, resume: Path | str | bool | None, console: Console) -> Checkpoint | None:
    """The checkpoint to go on from, or None after the folder was cleared for a run from the beginning.

    recipe  its adapter_path is what `choose_folder` chose
    resume  a checkpoint or a run's folder; True: the last checkpoint in adapter_path. Where there is none yet (the
            process was killed before its first save), the recipe's resume_from_checkpoint, or the beginning
    ConfigError if the folder holds another run that is unfinished, or that is being trained.
    """
    folder = Path(recipe.adapter_path)
    _check_free(folder)
    checkpoint.tidy(folder)
    where = _where(recipe, resume)
    saved = checkpoint.load(checkpoint.find(where)) if where else None
    if saved is None or not _is_inside(saved.folder, folder):
        make_room(folder)
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
        write_whole(folder / metrics.FILE, source.read_bytes()[: saved.metrics_bytes])
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


def make_room(folder: Path) -> None:
    """Clear what a run left that was killed before its first save. ConfigError if the folder holds more than that."""
    content, home = content_of(folder), record.home_of(folder)
    if content is not None and home != folder:
        raise ConfigError(
            f"adapter_path: {folder} holds {content}, which is to replace {home}. Continue it with --resume, or "
            f"delete {folder}"
        )
    if content is not None:
        raise ConfigError(_refusal(folder, content, None))
    try:
        shutil.rmtree(folder / metrics.TENSORBOARD_FOLDER, ignore_errors=True)
        for name in (summary.FILE, record.FILE, curve.FILE, metrics.FILE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: the earlier run cannot be cleared away: {error}") from error


def put_in_place(recipe: Recipe, folder: Path, status: str, console: Console) -> None:
    """A run that trained in `folder` is over: if it has ended, the earlier one, if any, gives way to it."""
    home = Path(recipe.adapter_path)
    if folder == home:
        return
    if status in summary.ENDED:
        replace.settle(home)
        said = f"{home} holds the new run; the earlier one gave way"
    else:
        said = f"{home} is as it was; --resume goes on with the run in {folder}"
    console.print(said, highlight=False, soft_wrap=True)
