"""`summary.json`: how a run ended. It is there only while no process trains in the folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from serve.adapters.formats.published import SUMMARY_FILE
from serve.errors import StorageError
from train.loop.whole import write_whole
from train.watch.record import home_of

if TYPE_CHECKING:
    from train.loop.trainer import TrainState

FILE = SUMMARY_FILE
ENDED = ("finished", "stopped_early")
"""Statuses of a run that came to the end it was meant to have."""


@dataclass(frozen=True)
class RunSummary:
    """`summary.json`: how a run ended. Losses are nats per target; `exact_match` is a share of rows."""

    status: Literal["finished", "stopped_early", "interrupted", "dry_run"]
    adapter_path: str
    steps: int = 0
    iterations: int = 0
    train_loss: float | None = None
    first_valid_loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_step: int | None = None
    published_step: int | None = None
    """The step whose weights the adapter folder holds."""
    test_loss: float | None = None
    metric: str | None = None
    exact_match_before: float | None = None
    exact_match: float | None = None
    num_skipped_steps: int = 0
    """Steps whose loss or gradient was not finite; none of them moved a weight."""
    num_trainable: int = 0
    num_targets: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """Wall clock of this process's part, loading and evaluations included."""
    train_seconds: float = 0.0
    tokens_per_s: float = 0.0
    peak_memory_bytes: int = 0
    content_hash: str = ""
    signal: int | None = None

    @property
    def exit_code(self) -> int:
        """0, or 130 and 143 after SIGINT and SIGTERM, as shells count."""
        return 0 if self.signal is None else 128 + self.signal


def of_run(
    state: TrainState,
    folder: Path,
    *,
    num_iterations: int,
    caught: int | None,
    metric: str | None = None,
    **measured: Any,
) -> RunSummary:
    """The summary of a run that ended at `state`. `metric` names a measure of it, `measured` are more fields."""
    # With mlx-lm, which whoever reads a summary has no use for.
    from train.loop.trainer import peak_memory_bytes

    status: Literal["finished", "stopped_early", "interrupted"] = "finished"
    if state.iteration < num_iterations:
        status = "stopped_early" if caught is None else "interrupted"
    return RunSummary(
        status=status,
        adapter_path=str(home_of(folder)),
        steps=state.step,
        iterations=state.iteration,
        train_loss=state.train_loss,
        first_valid_loss=state.first_valid_loss,
        valid_loss=state.valid_loss,
        best_valid_loss=state.best_loss,
        best_step=state.best_step,
        num_skipped_steps=state.num_nonfinite,
        num_targets=state.num_targets,
        num_tokens=state.num_tokens,
        train_seconds=state.seconds,
        tokens_per_s=state.num_tokens / max(state.seconds, 1e-9),
        peak_memory_bytes=peak_memory_bytes(),
        metric=metric,
        exact_match_before=state.first_measures.get(metric or ""),
        exact_match=state.measures.get(metric or ""),
        signal=caught if status == "interrupted" else None,
        **measured,
    )


def write(summary: RunSummary, folder: Path) -> None:
    """Replace summary.json in one step."""
    path = folder / FILE
    try:
        write_whole(path, json.dumps(dataclasses.asdict(summary), indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"{path}: {error}") from error


def clear(folder: Path) -> None:
    """The run in a folder goes on: it has not ended."""
    try:
        (folder / FILE).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{folder / FILE}: {error}") from error


def status_of(folder: Path) -> str | None:
    """What summary.json says; None where there is none that can be read."""
    try:
        return str(json.loads((folder / FILE).read_text())["status"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
