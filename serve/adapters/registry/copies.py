"""Copies of adapters that others may delete or rewrite: a server reads its own, as often as it likes.

A trainer keeps its last few checkpoints, while a version that was made of an older one may be in use, or be gone back
to. Owns a temporary folder, removed at the end; what a killed server left is cleared by the next one.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from serve.adapters.formats.published import Published, signature_of
from serve.errors import StorageError

PREFIX = "lathe-watch-"
ABANDONED_S = 60.0
"""A folder that nobody has locked is not cleared before: its owner may be about to."""
PIECE_BYTES = 1 << 20


class Copies:
    """Not safe to call from several threads.

    is_known  of a name and a copy's folder: whether the version that was made of it can still be asked for
    """

    def __init__(self, is_known: Callable[[str, Path], bool]) -> None:
        """StorageError where no temporary folder can be made."""
        self._is_known = is_known
        self._numbers = itertools.count(1)
        self._made: dict[str, list[Path]] = {}
        clear_abandoned()
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        except OSError as error:
            raise StorageError(f"no temporary folder for copies of watched adapters: {error}") from error
        # A locked folder is also left alone by what cleans temporary folders up.
        self._lock = os.open(self.folder, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def take(self, name: str, found: Published) -> Path | None:
        """The folder of a new copy; None where the adapter changed, or went, meanwhile. OSError as it comes."""
        target = self.folder / name / f"{next(self._numbers):06d}-{found.folder.name}"
        is_of_one_moment = False
        try:
            target.mkdir(parents=True)
            for file, *_ in found.signature:
                _copy(found.folder / file, target / file)
            is_of_one_moment = signature_of(found.folder) == found.signature
        except FileNotFoundError:
            pass
        finally:
            if not is_of_one_moment:
                shutil.rmtree(target, ignore_errors=True)
        if not is_of_one_moment:
            return None
        self._made.setdefault(name, []).append(target)
        return target

    def has_known(self, name: str) -> bool:
        """Whether any version that was made of a copy under that name can still be asked for."""
        return any(self._is_known(name, each) for each in self._made.get(name, ()))

    def drop(self, name: str, copy: Path) -> None:
        """Remove a copy."""
        self._made[name].remove(copy)
        shutil.rmtree(copy, ignore_errors=True)

    def trim(self, name: str) -> None:
        """Remove those of a name whose versions are forgotten."""
        for copy in [each for each in self._made[name] if not self._is_known(name, each)]:
            self.drop(name, copy)

    def sweep(self) -> Iterator[None]:
        """Remove those of names that were unloaded, a name at each turn."""
        for name, made in list(self._made.items()):
            if made and not self._is_known(name, made[-1]):
                self.trim(name)
            if not self._made[name]:
                del self._made[name]
            yield

    def close(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def clear_abandoned() -> None:
    """Remove the copies of servers that were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if time.time() - folder.stat().st_mtime < ABANDONED_S:
                continue
            lock = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:  # gone, or another user's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use
            pass
        finally:
            os.close(lock)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, PIECE_BYTES)
