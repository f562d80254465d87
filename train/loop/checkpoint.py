"""Checkpoints of a run: folders that are whole or not there. Writes and reads; decides nothing about when.

checkpoints/step-000100/
    adapters.safetensors  adapter_config.json   the adapter, as mlx-lm would load it
    optimizer.safetensors                       the optimizer's state, flattened
    state.json                                  TrainState, what it may be resumed with, position in metrics.jsonl
A folder is written beside its place under a dotted name, synced, and renamed: one atomic step. What a killed
process leaves under a dotted name is cleared by `tidy`, which every run calls before it reads.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as mlx_optim
from mlx.utils import tree_flatten, tree_unflatten

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.header import check_whole
from serve.adapters.formats.manifest import load_tensors, read_config, read_tensors, write_adapter
from serve.adapters.formats.published import CHECKPOINTS
from serve.adapters.formats.published import STATE_FILE as STATE_FILE
from serve.errors import AdapterError, NotFoundError, StorageError, TrainingError
from serve.synced import sync
from train.loop.trainer import TrainState
from train.loop.whole import NEW, OLD, publish, write_synced

FOLDER = CHECKPOINTS
OPTIMIZER_FILE = "optimizer.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds. `identity` says whose it is; see `train.loop.identity`."""

    folder: Path
    tensors: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    config: AdapterConfig
    state: TrainState
    identity: dict[str, Any]
    metrics_bytes: int


def save(
    adapter_path: Path,
    tensors: dict[str, mx.array],
    optimizer: mlx_optim.Optimizer,
    config: AdapterConfig,
    state: TrainState,
    identity: Mapping[str, Any],
    metrics_bytes: int,
) -> Path:
    """Publish one checkpoint. StorageError leaves every earlier one whole and nothing of the new one."""
    final = folder_of(adapter_path, state.step)
    root = final.parent
    partial = root / f"{NEW}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        write_adapter(partial, tensors, config)
        _save_tensors(partial / OPTIMIZER_FILE, flat_state(optimizer))
        body = {
            "format": FORMAT,
            "state": dataclasses.asdict(state),
            "identity": dict(identity),
            "metrics_bytes": metrics_bytes,
        }
        write_synced(partial / STATE_FILE, json.dumps(body, indent=2) + "\n")
        sync(partial)
        publish(partial, final)
    except (OSError, RuntimeError, AdapterError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(
            f"{final}: the checkpoint could not be saved, earlier ones are whole: {error}"
        ) from error
    return final


def load(folder: Path) -> Checkpoint:
    """Read a checkpoint. NotFoundError, AdapterError or TrainingError say what is missing or cut short."""
    if not (folder / STATE_FILE).is_file():
        raise NotFoundError(f"no checkpoint at {folder}: it has no {STATE_FILE}")
    try:
        body = json.loads((folder / STATE_FILE).read_text())
        state = TrainState.of(body["state"])
        identity, metrics_bytes = dict(body["identity"]), int(body["metrics_bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{folder / STATE_FILE}: not a state of this version: {error}") from error
    config = read_config(folder)
    return Checkpoint(
        folder=folder,
        tensors=read_tensors(folder, config),
        optimizer=load_tensors(folder / OPTIMIZER_FILE),
        config=config,
        state=state,
        identity=identity,
        metrics_bytes=metrics_bytes,
    )


def find(where: Path) -> Path:
    """A checkpoint by its own folder, or the last one of a run's folder. NotFoundError if there is none."""
    if (where / STATE_FILE).is_file():
        return where
    folders = existing(where)
    if not folders:
        raise NotFoundError(f"no checkpoint at {where}: neither {STATE_FILE} nor {FOLDER}/step-… is there")
    return folders[-1]


def existing(adapter_path: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    folders = [p for p in (adapter_path / FOLDER).glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted((p for p in folders if (p / STATE_FILE).is_file()), key=step_of)


def folder_of(adapter_path: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return adapter_path / FOLDER / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The step a checkpoint's folder is named for."""
    return int(folder.name.removeprefix("step-"))


def sibling(folder: Path, step: int) -> Path:
    """Where the checkpoint of another step of the same run stands."""
    return folder.with_name(f"step-{step:06d}")


def bring(source: Path, adapter_path: Path, step: int) -> bool:
    """Have a checkpoint of another folder in this run's too, as `step`'s. False where there is none to copy.

    StorageError where it cannot be written.
    """
    final = folder_of(adapter_path, step)
    if (final / STATE_FILE).is_file():
        return True
    if not (source / STATE_FILE).is_file():
        return False
    partial = final.with_name(f"{NEW}{final.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        for path in (*partial.iterdir(), partial):
            sync(path)
        publish(partial, final)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"{final}: {source} could not be copied: {error}") from error
    return True


def prune(adapter_path: Path, limit: int | None, best_step: int | None) -> None:
    """Remove the oldest checkpoints beyond `limit`; the one of the best step is kept besides."""
    for folder in existing(adapter_path)[:-limit] if limit else []:
        if step_of(folder) != best_step:
            remove(folder)


def remove(folder: Path) -> None:
    """Renamed first, so that what `existing` finds is always whole."""
    doomed = folder.with_name(f"{OLD}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def tidy(adapter_path: Path) -> None:
    """Clear what a killed process left half done in a run's folder. Not while another process trains there.

    A checkpoint that was whole and about to replace another of the same step is put in its place.
    """
    root = adapter_path / FOLDER
    for partial in root.glob(f"{NEW}step-*"):
        final = root / partial.name.removeprefix(NEW)
        # `publish` moves an older folder away only once the new one is whole.
        if not final.exists() and (root / f"{OLD}{final.name}").exists() and (partial / STATE_FILE).is_file():
            os.replace(partial, final)
    folders = [*root.glob(f"{NEW}step-*"), *root.glob(f"{OLD}step-*"), adapter_path / f"{OLD}{FOLDER}"]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for file in adapter_path.glob(f"{NEW}*"):
        if file.is_file():
            file.unlink(missing_ok=True)


def flat_state(optimizer: mlx_optim.Optimizer) -> dict[str, mx.array]:
    """The optimizer's state by dotted path."""
    return {name: value for name, value in tree_flatten(optimizer.state) if isinstance(value, mx.array)}


def restore_optimizer(optimizer: mlx_optim.Optimizer, saved: Mapping[str, mx.array]) -> None:
    """Put a saved state in place of that of an optimizer initialised for the same parameters."""
    wanted = flat_state(optimizer)
    missing, extra = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or extra:
        raise TrainingError(
            f"the saved optimizer state is of another optimizer or other layers: "
            f"{len(missing)} tensors missing, {len(extra)} unknown, first {(missing + extra)[0]}"
        )
    _fill(optimizer.state, tree_unflatten(list(saved.items())))


def _fill(target: Any, source: Any) -> None:
    """Copy leaves in place: compiled functions and MultiOptimizer hold on to the containers."""
    items = source.items() if isinstance(source, dict) else enumerate(source)
    for key, value in items:
        if isinstance(value, mx.array):
            target[key] = value
        else:
            _fill(target[key], value)


def _save_tensors(path: Path, tensors: dict[str, mx.array]) -> None:
    mx.save_safetensors(str(path), tensors, metadata={"format": "mlx"})
    check_whole(path)
    sync(path)
