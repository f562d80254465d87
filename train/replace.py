"""A new run over an earlier one: it trains in a folder of its own, and takes the other's place once it has ended.

runs/support                 the earlier run, whole until then
runs/support/next            the new one
runs/support/.next-ended     the new one when it has ended, while its files move out
runs/support/.replaced       what gave way, until it is deleted
A process may be killed at any instant in here; `settle` goes on where it stopped. Files of other names stay.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from serve.adapters.formats.manifest import CONFIG_FILE, TENSORS_FILE
from serve.errors import StorageError
from serve.synced import sync
from train.loop import checkpoint
from train.watch import curve, metrics, record, summary
from train.watch.record import NEXT

ENDED_FOLDER, REPLACED_FOLDER = ".next-ended", ".replaced"
ADAPTER = (CONFIG_FILE, TENSORS_FILE)
RECORDS = (
    checkpoint.FOLDER,
    metrics.FILE,
    metrics.TENSORBOARD_FOLDER,
    curve.FILE,
    record.FILE,
    summary.FILE,
    "recipe.yaml",
    "stream.json",
    "chat_template.jinja",
    "wandb",
)
"""What a run leaves in its folder beside the adapter."""


def next_folder(folder: Path) -> Path:
    """Where a run trains that is to replace the one in `folder`."""
    return folder / NEXT


def is_begun(folder: Path) -> bool:
    """Whether a run that is to replace the one in `folder` stands there."""
    new = next_folder(folder)
    return (new / record.FILE).exists() or bool(checkpoint.existing(new))


def settle(folder: Path) -> bool:
    """Put a new run that has ended in the earlier one's place, or go on with that; False if there is none.

    Until each of the adapter's two files is replaced, in one step, the earlier adapter's stands there.
    """
    new, ended = next_folder(folder), folder / ENDED_FOLDER
    try:
        if not ended.exists():
            if summary.status_of(new) not in summary.ENDED:
                _remove(folder / REPLACED_FOLDER)
                return False
            for name in RECORDS:
                _set_aside(folder, name)
            os.replace(new, ended)
        _move_out(ended, folder)
        _remove(folder / REPLACED_FOLDER)
    except OSError as error:
        raise StorageError(
            f"{folder}: the new run is whole in {new if new.exists() else ended}, and could not be put in the "
            f"earlier one's place: {error}"
        ) from error
    return True


def _set_aside(folder: Path, name: str) -> None:
    if not (folder / name).exists():
        return
    doomed = folder / REPLACED_FOLDER
    doomed.mkdir(exist_ok=True)
    _remove(doomed / name)
    os.replace(folder / name, doomed / name)


def _move_out(ended: Path, folder: Path) -> None:
    """The summary comes last: a folder that has one is complete."""
    late = (*ADAPTER, summary.FILE)
    names = [path.name for path in ended.iterdir() if path.name not in late]
    for name in (*sorted(names), *late):
        if (ended / name).exists():
            os.replace(ended / name, folder / name)
    ended.rmdir()
    sync(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
