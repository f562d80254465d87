"""An adapter folder on disk: mlx-lm's two files, with lineage in the config. Reads and writes; fits nothing.

adapters.safetensors   the tensors, named as mlx-lm names them
adapter_config.json    fine_tune_type, num_layers, lora_parameters, and "lineage" (ours)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from serve.adapters.formats.config import AdapterConfig, config_json, parse_config
from serve.adapters.formats.header import check_is_file, check_whole
from serve.adapters.formats.lineage import Lineage
from serve.beside import evaluate
from serve.errors import AdapterError, NotFoundError, StorageError
from serve.synced import sync

TENSORS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"
MOST_CONFIG_BYTES = 16 << 20


def read_config(folder: Path) -> AdapterConfig:
    """The config of a folder in mlx-lm's layout; AdapterError says what is wrong with it."""
    if not os.path.isdir(folder):  # unlike Path.is_dir it says no to what is too long, or not allowed
        raise NotFoundError(f"no adapter folder at {str(folder)!a:.200}")
    path = folder / CONFIG_FILE
    return parse_config(read_text(path), path)


def read_text(path: Path) -> str:
    """A config's text. AdapterError where there is no such file, or none that a config can be."""
    check_is_file(path)
    if path.stat().st_size > MOST_CONFIG_BYTES:
        raise AdapterError(f"{path}: has {path.stat().st_size:,} bytes, which no {CONFIG_FILE} needs")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: not JSON: {error}") from error
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error


def read_tensors(folder: Path, config: AdapterConfig | None = None) -> dict[str, mx.array]:
    """The adapter's tensors, checked for truncation, and against the content hash in `config`, if any."""
    return load_tensors(folder / TENSORS_FILE, config.lineage if config else None)


def load_tensors(path: Path, lineage: Lineage | None = None) -> dict[str, mx.array]:
    """The tensors of a safetensors file, likewise checked; evaluated."""
    check_whole(path)
    try:
        tensors = cast(dict[str, mx.array], mx.load(str(path)))
        evaluate(tensors)
    except RuntimeError as error:
        raise AdapterError(f"{path}: {error}") from error
    if not tensors:
        raise AdapterError(f"{path}: holds no tensors")
    if lineage and lineage.content_hash and content_hash(tensors) != lineage.content_hash:
        raise AdapterError(
            f"{path}: its tensors are not the ones {CONFIG_FILE} was written for "
            f"(content hash {content_hash(tensors)}, expected {lineage.content_hash}); a save was "
            f"interrupted or a file was replaced"
        )
    return tensors


def content_hash(tensors: dict[str, mx.array]) -> str:
    """`sha256:…` over names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(np.asarray(mx.contiguous(tensor).reshape(-1).view(mx.uint8)).data)
    return f"sha256:{digest.hexdigest()}"


def effect_hash(tensors_hash: str, config: AdapterConfig) -> str:
    """`sha256:…` over the tensors' hash and whatever the config says of them; where they came from does not count."""
    settings = config_json(dataclasses.replace(config, lineage=None, ranks={}, scales={}))
    by_module = [by for by in (config.ranks, config.scales) if config.ranks or config.scales]
    text = json.dumps([tensors_hash, settings, *map(dict, by_module)], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def write_adapter(folder: Path, tensors: dict[str, mx.array], config: AdapterConfig) -> AdapterConfig:
    """Write both files in mlx-lm's layout. Returns the config with its content hash. StorageError: `write_files`."""
    if config.lineage is not None:
        lineage = dataclasses.replace(config.lineage, content_hash=content_hash(tensors))
        config = dataclasses.replace(config, lineage=lineage)
    write_files(folder, tensors, config_json(config))
    return config


def write_files(
    folder: Path,
    tensors: dict[str, mx.array],
    settings: Mapping[str, Any],
    *,
    tensors_file: str = TENSORS_FILE,
    framework: str = "mlx",
) -> None:
    """Write tensors and CONFIG_FILE; what was in the folder stays whole until both are safely on disk.

    framework  whose tensors they are, as safetensors' readers ask
    StorageError when the disk refuses.
    """
    new_tensors = folder / f".new-{tensors_file}"
    new_config = folder / f".new-{CONFIG_FILE}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(new_tensors), tensors, metadata={"format": framework})
        check_whole(new_tensors)
        new_config.write_text(json.dumps(settings, indent=2) + "\n")
        for path in (new_tensors, new_config):
            sync(path)
        # The config first: between the two, its content hash gives away the tensors that are not its own.
        os.replace(new_config, folder / CONFIG_FILE)
        os.replace(new_tensors, folder / tensors_file)
        sync(folder)
    except (OSError, RuntimeError, AdapterError) as error:
        for path in (new_tensors, new_config):
            path.unlink(missing_ok=True)
        raise StorageError(f"{folder}: the adapter could not be saved: {error}") from error
