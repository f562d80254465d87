"""`summary.json`: how a run ended, and whether its folder may take another run."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from serve.errors import ConfigError, StorageError
from train import checkpoint
from train.metrics import FILE as METRICS_FILE
from train.metrics import TENSORBOARD_FOLDER
from train.trainer import TrainState, peak_memory_bytes

FILE = "summary.json"


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
    metric_before: float | None = None
    metric_after: float | None = None
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
    state: TrainState, folder: Path, *, num_iterations: int, caught: int | None, **measured: Any
) -> RunSummary:
    """The summary of a run that ended at `state`; `measured` are further fields of it."""
    status: Literal["finished", "stopped_early", "interrupted"] = "finished"
    if state.iteration < num_iterations:
        status = "stopped_early" if caught is None else "interrupted"
    return RunSummary(
        status=status,
        adapter_path=str(folder),
        steps=state.step,
        iterations=state.iteration,
        train_loss=state.train_loss,
        first_valid_loss=state.first_valid_loss,
        valid_loss=state.valid_loss,
        best_valid_loss=state.best_loss,
        best_step=state.best_step,
        num_targets=state.num_targets,
        num_tokens=state.num_tokens,
        train_seconds=state.seconds,
        tokens_per_s=state.num_tokens / max(state.seconds, 1e-9),
        peak_memory_bytes=peak_memory_bytes(),
        signal=caught if status == "interrupted" else None,
        **measured,
    )


def write(summary: RunSummary, folder: Path) -> None:
    """Replace summary.json in one step."""
    path = folder / FILE
    partial = path.with_name(f".new-{FILE}")
    try:
        checkpoint.write_synced(partial, json.dumps(dataclasses.asdict(summary), indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{path}: {error}") from error


def make_room(folder: Path) -> None:
    """A new run in a folder that holds an unfinished one is refused; a finished one's records give way."""
    if not checkpoint.existing(folder):
        return
    try:
        status = json.loads((folder / FILE).read_text())["status"]
    except (OSError, ValueError, KeyError):
        status = "interrupted"
    if status == "interrupted":
        last = checkpoint.existing(folder)[-1]
        raise ConfigError(
            f"adapter_path: {folder} holds an unfinished run, last saved at {last.name}. Continue it with --resume, "
            f"delete the folder, or name another adapter_path"
        )
    for name in (checkpoint.FOLDER, TENSORBOARD_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (FILE, METRICS_FILE):
        (folder / name).unlink(missing_ok=True)
