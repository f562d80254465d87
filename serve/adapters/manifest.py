"""An adapter folder on disk: mlx-lm's two files, with lineage in the config. Reads and writes; fits nothing.

adapters.safetensors   the tensors, named as mlx-lm names them
adapter_config.json    fine_tune_type, num_layers, lora_parameters, and "lineage" (ours)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import mlx.core as mx
import numpy as np

from serve.errors import AdapterError, NotFoundError, StorageError

TENSORS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"


FineTuneType = Literal["lora", "dora", "full"]


@dataclass(frozen=True)
class Lineage:
    """Where an adapter came from. Hashes are `sha256:…`; `created` is ISO 8601, UTC."""

    base_model: str
    base_fingerprint: str
    template_hash: str
    recipe_hash: str
    data_hash: str
    created: str
    lathe_version: str
    content_hash: str = ""
    """Of the tensors; filled when the folder is written, checked when it is read."""
    metrics: dict[str, float] = field(default_factory=dict)
    parent: str = ""
    """Of a warm start: the adapter it began with, as the recipe names it."""
    parent_hash: str = ""
    """That adapter's content hash."""
    objective: str = ""
    """What was trained for: sft, dpo, …; nothing in manifests of earlier versions."""
    quantize: dict[str, Any] | None = None
    """How the base was packed as it was loaded (mode, bits, group_size). `base_fingerprint` is the packed one's."""


@dataclass(frozen=True)
class AdapterConfig:
    """`adapter_config.json`. The LoRA fields mean nothing for a full fine-tune."""

    fine_tune_type: FineTuneType
    num_layers: int
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] = ()
    """Paths inside a layer, and the head's path, as mlx-lm's `keys`; empty: all that mlx-lm adapts without them."""
    init_lora_weights: str = "default"
    """How A and B began; after pissa the folder holds an update of twice the recipe's rank."""
    lineage: Lineage | None = None


def read_config(folder: Path) -> AdapterConfig:
    """The adapter's config; AdapterError says what is wrong with it."""
    if not folder.is_dir():
        raise NotFoundError(f"no adapter folder at {folder}")
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise AdapterError(f"{folder} is not an adapter folder: it has no {CONFIG_FILE}") from error
    except ValueError as error:
        raise AdapterError(f"{path}: not JSON: {error}") from error
    return _parse_config(path, raw)


def _parse_config(path: Path, raw: Any) -> AdapterConfig:
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: holds {type(raw).__name__}, an object was expected")
    if "peft_type" in raw:
        raise AdapterError(
            f"{path}: is a PEFT adapter ({raw['peft_type']}); this version reads mlx-lm's layout"
        )
    kind = raw.get("fine_tune_type", "lora")
    if kind not in get_args(FineTuneType):
        raise AdapterError(f"{path}: fine_tune_type is {kind!r}; this version reads lora, dora and full")
    parameters = raw.get("lora_parameters") or {}
    try:
        return AdapterConfig(
            fine_tune_type=kind,
            num_layers=int(raw.get("num_layers", -1)),
            rank=int(parameters.get("rank", 8)),
            scale=float(parameters.get("scale", 20.0)),
            dropout=float(parameters.get("dropout", 0.0)),
            keys=tuple(parameters.get("keys") or ()),
            init_lora_weights=str(parameters.get("init_lora_weights", "default")),
            lineage=_parse_lineage(raw["lineage"]) if raw.get("lineage") else None,
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{path}: {error}") from error


def _parse_lineage(raw: Mapping[str, Any]) -> Lineage:
    """Keys of a later version are left out; TypeError names those that are missing."""
    known = {entry.name for entry in dataclasses.fields(Lineage)}
    return Lineage(**{name: value for name, value in raw.items() if name in known})


def read_tensors(folder: Path, config: AdapterConfig | None = None) -> dict[str, mx.array]:
    """The adapter's tensors, checked for truncation, and against the content hash in `config`, if any."""
    path = folder / TENSORS_FILE
    check_whole(path)
    try:
        tensors = cast(dict[str, mx.array], mx.load(str(path)))
        mx.eval(tensors)
    except RuntimeError as error:
        raise AdapterError(f"{path}: {error}") from error
    if not tensors:
        raise AdapterError(f"{path}: holds no tensors")
    lineage = config.lineage if config else None
    if lineage and lineage.content_hash and content_hash(tensors) != lineage.content_hash:
        raise AdapterError(
            f"{path}: its tensors are not the ones {CONFIG_FILE} was written for "
            f"(content hash {content_hash(tensors)}, expected {lineage.content_hash}); a save was "
            f"interrupted or a file was replaced"
        )
    return tensors


def check_whole(path: Path) -> None:
    """AdapterError unless the safetensors file is as long as its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if length < 0 or 8 + length > size:
                raise AdapterError(f"{path}: truncated: {size} bytes, shorter than its own header")
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise AdapterError(f"{path.parent} is not an adapter folder: it has no {path.name}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path}: not a safetensors file: {error}") from error
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise AdapterError(f"{path}: truncated: {size} bytes of {expected}")


def content_hash(tensors: dict[str, mx.array]) -> str:
    """`sha256:…` over names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(np.asarray(mx.contiguous(tensor).reshape(-1).view(mx.uint8)).data)
    return f"sha256:{digest.hexdigest()}"


def write_adapter(folder: Path, tensors: dict[str, mx.array], config: AdapterConfig) -> AdapterConfig:
    """Write both files; what was in the folder stays whole until both new ones are safely on disk.

    Returns the config with its content hash. Raises StorageError when the disk refuses.
    """
    if config.lineage is not None:
        lineage = dataclasses.replace(config.lineage, content_hash=content_hash(tensors))
        config = dataclasses.replace(config, lineage=lineage)
    new_tensors = folder / f".new-{TENSORS_FILE}"
    new_config = folder / f".new-{CONFIG_FILE}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mx.save_safetensors(str(new_tensors), tensors, metadata={"format": "mlx"})
        check_whole(new_tensors)
        new_config.write_text(json.dumps(config_json(config), indent=2) + "\n")
        for path in (new_tensors, new_config):
            _sync(path)
        # The config first: between the two, its content hash gives away the tensors that are not its own.
        os.replace(new_config, folder / CONFIG_FILE)
        os.replace(new_tensors, folder / TENSORS_FILE)
        _sync(folder)
    except (OSError, RuntimeError, AdapterError) as error:
        for path in (new_tensors, new_config):
            path.unlink(missing_ok=True)
        raise StorageError(f"{folder}: the adapter could not be saved: {error}") from error
    return config


def config_json(config: AdapterConfig) -> dict[str, Any]:
    """What `adapter_config.json` holds: mlx-lm's keys first."""
    parameters: dict[str, Any] = {"rank": config.rank, "scale": config.scale, "dropout": config.dropout}
    if config.keys:
        parameters["keys"] = list(config.keys)
    if config.init_lora_weights != "default":
        parameters["init_lora_weights"] = config.init_lora_weights
    raw: dict[str, Any] = {"fine_tune_type": config.fine_tune_type, "num_layers": config.num_layers}
    if config.fine_tune_type != "full":
        raw["lora_parameters"] = parameters
    if config.lineage is not None:
        raw["lineage"] = dataclasses.asdict(config.lineage)
    return raw


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
