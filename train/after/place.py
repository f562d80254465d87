"""Where an export is written until it is whole: a folder beside its place, held by one process. Knows no weights.

exports/.lathe-export-NAME     what is being written; locked by the process that writes it, and so free once that ends
exports/.lathe-replaced-NAME   an earlier export, for the instant in which the new one takes its place
What a killed process left of either is cleared, or put back, by the next export into the same folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.errors import ConfigError, StorageError
from serve.synced import sync

PARTIAL, REPLACED = ".lathe-export-", ".lathe-replaced-"


@contextmanager
def writing(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, this process's alone until the block ends; removed then, unless published.

    ConfigError while another process writes an export of that name; StorageError where nothing can be written.
    """
    partial = out.with_name(f"{PARTIAL}{out.name}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(out.parent)
        partial.mkdir(exist_ok=True)
        descriptor = _lock(partial)
    except OSError as error:
        raise StorageError(f"{out}: the export cannot be written: {error}") from error
    if descriptor is None:
        raise ConfigError(f"{out} is being written by another export; wait for it, or name another folder")
    try:
        yield partial
    finally:
        if _is_at(partial, descriptor):
            shutil.rmtree(partial, ignore_errors=True)
        os.close(descriptor)


def publish(partial: Path, out: Path) -> None:
    """Rename a finished folder into its place; an earlier one there gives way only then."""
    old = out.with_name(f"{REPLACED}{out.name}")
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed exports into a folder left, and put back an export that was about to be replaced."""
    for partial in folder.glob(f"{PARTIAL}*"):
        descriptor = _lock(partial) if partial.is_dir() else None
        if descriptor is not None:
            _put_back(partial.with_name(partial.name.removeprefix(PARTIAL)))
            shutil.rmtree(partial)
            os.close(descriptor)
    for old in folder.glob(f"{REPLACED}*"):
        out = old.with_name(old.name.removeprefix(REPLACED))
        if not out.with_name(f"{PARTIAL}{out.name}").exists():  # else its process is at work
            _put_back(out)


def _put_back(out: Path) -> None:
    old = out.with_name(f"{REPLACED}{out.name}")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        os.replace(old, out)


def _lock(folder: Path) -> int | None:
    """An open descriptor that holds the folder until it is closed, or its process ends; None if another holds it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    if not _is_at(folder, descriptor):  # published, or cleared, between the two calls
        os.close(descriptor)
        return None
    return descriptor


def _is_at(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(descriptor))
    except OSError:
        return False
