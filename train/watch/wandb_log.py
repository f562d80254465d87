"""Weights & Biases as a board: the same numbers and texts that TensorBoard gets. An optional package.

Where and as whom is wandb's own business (`wandb login`, WANDB_MODE=offline, WANDB_API_KEY).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from serve.errors import ConfigError, StorageError

DEFAULT_PROJECT = "lathe"


class WandbBoard:
    """One W&B run for one run's folder: a continuation goes on in it."""

    def __init__(
        self, folder: Path, *, project: str | None, config: Mapping[str, Any], created: str, data_hash: str
    ) -> None:
        """created, data_hash: with the folder they name the run: a continuation finds it, a new run does not."""
        self._wandb = _import()
        identity = hashlib.sha256(f"{folder.resolve()}|{created}|{data_hash}".encode()).hexdigest()[:16]
        try:
            self._run = self._wandb.init(
                project=project or DEFAULT_PROJECT,
                name=folder.resolve().name,
                dir=str(folder),
                config=dict(config),
                id=identity,
                resume="allow",
                settings=self._wandb.Settings(console="off", silent=True),
            )
        except (self._wandb.Error, OSError, ValueError) as error:
            raise ConfigError(
                f"report_to: wandb does not start: {error}\n  `wandb login` once, or set WANDB_MODE=offline and "
                f"`wandb sync` later, or leave report_to out"
            ) from error
        # The x axis is ours: W&B's own counter only grows, and a continuation goes back to its checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._log({**values, "step": step})

    def text(self, step: int, name: str, prompt: str, answer: str) -> None:
        table = self._wandb.Table(columns=["step", "prompt", "answer"], data=[[step, prompt, answer]])
        self._log({name: table, "step": step})

    def _log(self, values: Mapping[str, Any]) -> None:
        try:
            self._run.log(dict(values))
        except self._wandb.Error as error:
            raise StorageError(f"wandb: {error}") from error

    def close(self) -> None:
        self._run.finish()


def check_installed() -> None:
    """ConfigError that says how to install wandb, where it is missing. Asked before any weights are loaded."""
    try:
        metadata.version("wandb")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "report_to: wandb is not installed; `pip install 'mlx-lathe[wandb]'`, or `pip install wandb`"
        ) from None


def _import() -> Any:
    check_installed()
    import wandb

    return wandb
