"""Numbers of a run, kept twice: metrics.jsonl for programs, TensorBoard for eyes. Knows no console.

One JSON object a line: {"kind": "train" | "valid" | "metric", "step": …, …}.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from serve.errors import StorageError

FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class MetricsLog:
    """Appends numbers as they come. Close it, or use it in `with`."""

    def __init__(self, folder: Path, *, keep_bytes: int = 0, next_step: int = 0) -> None:
        """keep_bytes: what stays of an earlier file, from its start; a resumed run passes its checkpoint's position.

        next_step: TensorBoard hides what an abandoned continuation wrote from this step on.
        """
        from tensorboardX import SummaryWriter

        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("ab")
            self._stream.truncate(min(keep_bytes, self._stream.tell()))
            self._board = SummaryWriter(
                str(folder / TENSORBOARD_FOLDER), purge_step=next_step if keep_bytes else None
            )
        except OSError as error:
            raise StorageError(f"{folder}: metrics cannot be written: {error}") from error

    @property
    def num_bytes(self) -> int:
        """Length of metrics.jsonl, everything written so far included."""
        return self._stream.tell()

    def write(self, kind: str, step: int, **values: float | int | str | None) -> None:
        """One line, and one point on a curve for each number."""
        row: dict[str, Any] = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        try:
            self._stream.write(json.dumps(row).encode() + b"\n")
            self._stream.flush()
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            raise StorageError(f"{self.path}: {error}") from error

    def close(self) -> None:
        """Everything is on disk afterwards."""
        self._stream.close()
        self._board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
