"""Which adapter a folder stands for now: a run's newest checkpoint, its final one, or one that somebody put there.

Looks at names, sizes and times; reads no tensors. What `lathe train` and a server must agree on about a run's folder:

RUN/run.json                        a run is, or was, written here
RUN/checkpoints/step-000100/        a checkpoint: renamed into its place, whole; state.json says so
RUN/summary.json                    no process trains here: the adapter in RUN itself is what the run came to
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from serve.adapters.formats.files import PEFT_TENSORS_FILE
from serve.adapters.formats.manifest import CONFIG_FILE, TENSORS_FILE

CHECKPOINTS = "checkpoints"
STATE_FILE = "state.json"
SUMMARY_FILE = "summary.json"
RECORD_FILE = "run.json"
STEP = re.compile(r"step-(\d+)")
FILES = (CONFIG_FILE, TENSORS_FILE, PEFT_TENSORS_FILE)
"""Of an adapter, whichever are there."""

Signature = tuple[tuple[str, int, int, int], ...]
"""Of each of an adapter's files: name, bytes, when it was written and when it was last touched, in ns. Without inode
numbers, which some network file systems make up anew."""


@dataclass(frozen=True)
class Published:
    """An adapter as it stood when it was looked at."""

    folder: Path
    signature: Signature
    published_ns: int
    """When it was complete."""
    step: int | None = None
    """Of a checkpoint."""

    def is_newer(self, last: Published | None) -> bool:
        """Whether it came after `last`, of the same name. A run's checkpoints have an order, by step and time, and
        its adapter comes after them; where no run writes, what differs is what somebody wants now."""
        if last is None:
            return True
        if self.signature == last.signature:
            return False
        if self.step is None:
            return last.step is None or self.published_ns >= last.published_ns
        is_later = self.published_ns > last.published_ns
        return is_later or (last.step is not None and self.step > last.step)


def published_in(folder: Path) -> Published | None:
    """What the folder stands for; None where it holds neither an adapter nor a run with one. OSError as it comes."""
    checkpoint = _newest_checkpoint(folder)
    if checkpoint is None or (folder / SUMMARY_FILE).exists():
        signature = signature_of(folder)
        if signature is not None:
            return Published(folder, signature, max(written for _, _, written, _ in signature))
    return checkpoint


def stands_for_itself(folder: Path) -> bool:
    """True of a run's folder and of an adapter's; False of one that may hold such folders."""
    return any((folder / name).exists() for name in (RECORD_FILE, CHECKPOINTS, *FILES))


def signature_of(folder: Path) -> Signature | None:
    """Of the adapter's files that are there; None where none is."""
    stamps = [_stamp(folder, name) for name in FILES]
    return tuple(stamp for stamp in stamps if stamp is not None) or None


def _stamp(folder: Path, name: str) -> tuple[str, int, int, int] | None:
    try:
        found = os.stat(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        return None
    return name, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _newest_checkpoint(folder: Path) -> Published | None:
    """The one of the highest step that is whole."""
    root = folder / CHECKPOINTS
    try:
        with os.scandir(root) as entries:
            steps = {int(match[1]): entry.name for entry in entries if (match := STEP.fullmatch(entry.name))}
    except (FileNotFoundError, NotADirectoryError):
        return None
    for step in sorted(steps, reverse=True):
        place = root / steps[step]
        state, signature = _stamp(place, STATE_FILE), signature_of(place)
        if state is not None and signature is not None:
            return Published(place, signature, state[2], step)
    return None
