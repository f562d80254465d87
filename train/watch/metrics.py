"""Numbers and texts of a run, kept twice: metrics.jsonl for programs, boards for eyes. Knows no console.

One JSON object a line: {"kind": "train" | "valid" | "metric" | "sample" | "nonfinite", "step": …, "time": …, …}.
TensorBoard files are always written; other boards (Weights & Biases) are given to it.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from serve.errors import StorageError

FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class Board(Protocol):
    """Somewhere people look at curves. Names are `kind/name`."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...

    def text(self, step: int, name: str, prompt: str, answer: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files under `folder`/tensorboard. `purge_step`: what was written from this step on is hidden."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        from tensorboardX import SummaryWriter

        # Files are named by the second; the suffix keeps a quick continuation from writing over its predecessor's.
        suffix = f".{os.getpid()}"
        where = str(folder / TENSORBOARD_FOLDER)
        self._writer = SummaryWriter(where, purge_step=purge_step, filename_suffix=suffix)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, prompt: str, answer: str) -> None:
        self._writer.add_text(name, f"{_quoted(prompt)}\n\n---\n\n{_quoted(answer)}", step)

    def close(self) -> None:
        self._writer.close()


def _quoted(text: str) -> str:
    """As TensorBoard's Markdown shows it word for word: an indented block."""
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])


class MetricsLog:
    """Appends numbers as they come. Close it, or use it in `with`."""

    def __init__(self, folder: Path, *, keep_bytes: int = 0, next_step: int = 0) -> None:
        """keep_bytes: what stays of an earlier file, from its start; a resumed run passes its checkpoint's position.

        next_step: TensorBoard hides what an abandoned continuation wrote from this step on.
        """
        self.path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("ab")
            self._stream.truncate(min(keep_bytes, self._stream.tell()))
            self._boards: list[Board] = [TensorBoard(folder, next_step if keep_bytes else None)]
        except OSError as error:
            raise StorageError(f"{folder}: metrics cannot be written: {error}") from error

    def add(self, board: Board) -> None:
        """Another board, told everything from here on and closed with the log."""
        self._boards.append(board)

    def position(self) -> int:
        """Length of metrics.jsonl in bytes, everything written so far included and on disk."""
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise StorageError(f"{self.path}: {error}") from error
        return self._stream.tell()

    def write(self, kind: str, step: int, **values: float | int | str | Sequence[str] | None) -> None:
        """One line, and one point on a curve for each number."""
        numbers = {
            f"{kind}/{name}": value for name, value in values.items() if isinstance(value, int | float)
        }
        self._append(kind, step, values)
        try:
            for board in self._boards:
                board.numbers(step, numbers)
        except OSError as error:
            raise StorageError(f"{self.path.parent}: {error}") from error

    def write_sample(self, step: int, number: int, prompt: str, answer: str) -> None:
        """One generated answer; `number` is its prompt's place among the samples."""
        self._append("sample", step, {"number": number, "prompt": prompt, "answer": answer})
        try:
            for board in self._boards:
                board.text(step, f"sample/{number}", prompt, answer)
        except OSError as error:
            raise StorageError(f"{self.path.parent}: {error}") from error

    def _append(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        # JSON has no NaN and no infinity.
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            self._stream.write(json.dumps(row).encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise StorageError(f"{self.path}: {error}") from error

    def close(self) -> None:
        """Everything is on disk afterwards."""
        self._stream.close()
        for board in self._boards:
            board.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rows_of(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. A last line cut short by a kill is left out, as are lines of no object."""
    try:
        lines = (folder / FILE).read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            yield row
