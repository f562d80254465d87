"""`run.json`: which run a folder holds, what it came from, and the process that writes it. Knows no weights.

It is written when a run starts or is continued, before the first step; `summary.json` says how the run ended. A
folder with the one and without the other is being trained, or its process was killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from serve.adapters.formats.published import RECORD_FILE
from serve.errors import ConfigError, LatheError, StorageError
from train.loop.whole import write_whole

FILE = RECORD_FILE
NEXT = "next"
"""In a run's folder: where the run trains that is to take its place."""


@dataclass(frozen=True)
class RunRecord:
    """`run.json`. Hashes are `sha256:…`; `created` and `resumed` are ISO 8601, UTC."""

    name: str
    """The last part of the run's folder."""
    created: str
    """When the run began, its first process; a continuation keeps it."""
    base_model: str
    base_fingerprint: str
    data_hash: str
    recipe_hash: str
    objective: str
    fine_tune_type: str
    num_iterations: int
    parent: str = ""
    """Of a warm start: `resume_adapter_file` as written."""
    parent_hash: str = ""
    """Content hash of the weights it started from."""
    template_day: str = ""
    """The day that the chat template prints all the run long, YYYY-MM-DD; empty if it prints none."""
    resumed_from: str = ""
    """The checkpoint this process continued, if any."""
    resumed: str = ""
    """When it did."""
    host: str = ""
    pid: int = 0
    process_started: float = 0.0
    """Seconds since the epoch; a later process may have the same number, but not the same start."""
    error: str = ""
    """The message the run ended with, if it failed."""

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote it still runs, as far as this machine can tell."""
        if self.host != socket.gethostname():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.process_started) < 1.0
        except psutil.Error:
            return False


def home_of(folder: Path) -> Path:
    """Where a run's folder will stand in the end: its parent, if it is to take the place of the run there."""
    return folder.parent if folder.name == NEXT else folder


def read(folder: Path) -> RunRecord | None:
    """The record of a folder; None where there is none, or none of this version. Unknown keys are left out."""
    try:
        raw: Any = json.loads((folder / FILE).read_text())
        names = {field.name for field in dataclasses.fields(RunRecord)}
        return RunRecord(**{name: value for name, value in raw.items() if name in names})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def write(record: RunRecord, folder: Path) -> None:
    """Replace run.json in one step."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / FILE, json.dumps(dataclasses.asdict(record), indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"{folder / FILE}: {error}") from error


def check_free(folder: Path) -> None:
    """ConfigError while another process trains in the folder."""
    found = read(folder)
    if found is not None and found.pid != os.getpid() and not found.error and found.is_alive:
        raise ConfigError(
            f"adapter_path: {folder} is being written by another run, process {found.pid}; wait for it, end it, "
            f"or name another adapter_path"
        )


@contextmanager
def running(record: RunRecord, folder: Path) -> Iterator[RunRecord]:
    """The folder is this process's while the block runs; an error that ends it is noted before it goes on."""
    earlier = read(folder) if record.resumed_from else None
    mine = dataclasses.replace(
        record,
        created=earlier.created if earlier else record.created,
        host=socket.gethostname(),
        pid=os.getpid(),
        process_started=psutil.Process().create_time(),
    )
    write(mine, folder)
    try:
        yield mine
    except LatheError as error:
        write(dataclasses.replace(mine, error=str(error)), folder)
        raise
