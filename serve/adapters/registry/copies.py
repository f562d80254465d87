"""Copies of adapters that others may delete or rewrite: a server reads its own, as often as it likes.

A trainer keeps its last few checkpoints, while a version that was made of an older one may be in use, or be gone back
to. Owns a temporary folder.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from serve.adapters.formats.own_tokens import ADDED_FILE, added_tokens
from serve.adapters.formats.published import Published, signature_of
from serve.errors import StorageError
from serve.own_folder import OwnFolder, clear_abandoned

PREFIX = "lathe-watch-"
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
        clear_abandoned(PREFIX)
        try:
            self._own = OwnFolder(PREFIX)
        except OSError as error:
            raise StorageError(f"no temporary folder for copies of watched adapters: {error}") from error
        self.folder = self._own.path

    def take(self, name: str, found: Published) -> Path | None:
        """The folder of a new copy; None where the adapter changed, or went, meanwhile. OSError as it comes."""
        target = self.folder / name / f"{next(self._numbers):06d}-{found.folder.name}"
        is_of_one_moment = False
        try:
            target.mkdir(parents=True)
            for file, *_ in found.signature:
                _copy(found.folder / file, target / file)
            if tokens := added_tokens(found.folder):  # and not the whole tokenizer
                (target / ADDED_FILE).write_text(json.dumps(tokens))
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
        self._own.close()


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, PIECE_BYTES)
