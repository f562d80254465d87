"""A temporary folder of this process: locked while it is in use, and removed at the end. What a process has left that
was killed is cleared by the next one that makes such a folder."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

ABANDONED_S = 60.0
"""A folder that nobody has locked is not cleared before: its owner may be about to."""


class OwnFolder:
    """`path`, until `close`."""

    def __init__(self, prefix: str) -> None:
        """OSError as it comes."""
        self.path = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
        # A locked folder is also left alone by what cleans temporary folders up.
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Remove it, and what is in it. Once."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def clear_abandoned(prefix: str) -> None:
    """Remove the folders of that prefix whose processes were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
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
