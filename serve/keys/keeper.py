"""The keys that hold now: a file of them, followed as it changes, and the one from the command line."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from serve.errors import ConfigError
from serve.keys.file import read_keys, the_one_key
from serve.keys.key import Key
from serve.keys.ring import KeyRing

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
Stamp = tuple[int, int, int] | None
"""By which a file is known to be another: inode, time, size. None: it is not there."""


class Keeper:
    """Holds a KeyRing and makes a new one when the file changes.

    A file that cannot be read leaves the keys as they were, and is told in the log; one that is wrong at start is a
    ConfigError. Thread-safe; looking at the file happens beside the event loop.
    """

    def __init__(
        self, path: Path | None, one: str | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """path: the file; one: the text of a key that holds beside it."""
        self._path = path
        self._one = one
        self._clock = clock
        self._lock = threading.Lock()
        self._looking: asyncio.Future[None] | None = None
        self._stamp = self._stamp_now()
        self._ring = self._read(None)
        self._looked_s = clock()
        if path is not None:
            _warn_of_readers(path)

    @property
    def num_keys(self) -> int:
        """How many are known now."""
        return len(self._ring.by_name)

    async def find(self, text: str) -> Key | None:
        """The key of that text, by a file that was looked at a second ago at most."""
        if self._path is not None and self._clock() - self._looked_s >= LOOK_EVERY_S:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.get_running_loop().run_in_executor(None, self.look)
            await asyncio.shield(self._looking)
        return self._ring.find(text)

    def look(self, *, is_asked: bool = False) -> None:
        """Read the file, if it has changed or somebody asks for it (SIGHUP)."""
        if self._path is None:
            return
        with self._lock:
            stamp = self._stamp_now()
            if is_asked or stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._ring = self._read(self._ring)
                    logger.info("api_keys: %s has been read again: %d keys", self._path, self.num_keys)
                except ConfigError as error:
                    logger.error("api_keys: the keys stay as they were: %s", error)
            self._looked_s = self._clock()

    def _read(self, before: KeyRing | None) -> KeyRing:
        keys = [] if self._path is None else read_keys(self._path)
        if self._one is not None:
            keys.append(the_one_key(self._one))
        return KeyRing(keys, before)

    def _stamp_now(self) -> Stamp:
        if self._path is None:
            return None
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def _warn_of_readers(path: Path) -> None:
    """Others of this machine can read keys that stand there in plain text."""
    if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH) and "key:" in path.read_text(errors="replace"):
        logger.warning(
            "api_keys: others can read %s, which has keys in plain text; chmod 600, or write key_sha256", path
        )
