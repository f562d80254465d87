"""An adapter folder on disk: mlx-lm's two files, with lineage in the config. Reads and writes; fits nothing.

adapters.safetensors   the tensors, named as mlx-lm names them
adapter_config.json    fine_tune_type, num_layers, lora_parameters, and "lineage" (ours)
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from serve.adapters.formats.config import AdapterConfig as AdapterConfig
from serve.adapters.formats.config import FineTuneType as FineTuneType
from serve.adapters.formats.config import Lineage as Lineage
from serve.adapters.formats.config import config_json, parse_config, without_repeats
from serve.errors import AdapterError, NotFoundError, StorageError

TENSORS_FILE = "adapters.safetensors"
CONFIG_FILE = "adapter_config.json"


MOST_CONFIG_BYTES = 16 << 20
MOST_HEADER_BYTES = 100_000_000
"""As the format has it."""
FLOATS = {"F16": 2, "BF16": 2, "F32": 4}
"""What an update is made of. MLX reads no F64."""
OTHERS = {"F64": 8, "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8}
ITEM_BYTES = {**FLOATS, **OTHERS, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8}
"""Of the dtypes in safetensors headers."""

LONGEST_AXIS = 2**31 - 1

DTYPE_WORDS = {mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32", mx.float64: "F64"}


@dataclass(frozen=True)
class TensorSpec:
    """What a safetensors header says of one tensor; `dtype` in its words (F32, BF16, I64, …)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        """Whether it holds numbers that an update can be made of."""
        return self.dtype in FLOATS


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


def check_is_file(path: Path) -> None:
    """AdapterError for what is not there, and for a pipe or a device, which would be waited for, or never end."""
    if not os.path.exists(path):
        raise AdapterError(f"{path.parent} is not an adapter folder: it has no {path.name}")
    if not os.path.isfile(path):
        raise AdapterError(f"{path}: is no file")


def read_tensors(folder: Path, config: AdapterConfig | None = None) -> dict[str, mx.array]:
    """The adapter's tensors, checked for truncation, and against the content hash in `config`, if any."""
    return load_tensors(folder / TENSORS_FILE, config.lineage if config else None)


def load_tensors(path: Path, lineage: Lineage | None = None) -> dict[str, mx.array]:
    """The tensors of a safetensors file, likewise checked; evaluated."""
    check_whole(path)
    try:
        tensors = cast(dict[str, mx.array], mx.load(str(path)))
        mx.eval(tensors)
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


def check_whole(path: Path) -> None:
    """AdapterError unless the safetensors file is as long as its header says."""
    read_specs(path)


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """What the file's header says it holds, by name. AdapterError unless header and file agree to the byte."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The same, and the file's metadata."""
    check_is_file(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if length < 0 or 8 + length > size:
                raise AdapterError(f"{path}: truncated: {size} bytes, shorter than its own header")
            if length > MOST_HEADER_BYTES:
                raise AdapterError(
                    f"{path}: not a safetensors file: its header has {length:,} bytes, one has at most "
                    f"{MOST_HEADER_BYTES:,}"
                )
            header = json.loads(stream.read(length), object_pairs_hook=without_repeats)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error}") from error
    except AdapterError:
        raise
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not a safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise AdapterError(f"{path}: not a safetensors file: its header is no object")
    metadata = header.pop("__metadata__", None) or {}  # MLX writes null where there is none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(f"{path}: not a safetensors file: its __metadata__ is no object of texts")
    entries = header
    ends = [_span(path, name, entry) for name, entry in entries.items()]
    expected = 8 + length + max((stop for _, stop in ends), default=0)
    if size != expected:
        raise AdapterError(f"{path}: truncated: {size} bytes of {expected}")
    if any(start != stop for (_, stop), (start, _) in itertools.pairwise([(0, 0), *sorted(ends)])):
        raise AdapterError(f"{path}: not a safetensors file: its tensors overlap or leave gaps")
    specs = {name: TensorSpec(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
    return specs, metadata


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes are, checked against its shape: MLX reads what the shape says."""
    try:
        shape, item_bytes = entry["shape"], ITEM_BYTES[entry["dtype"]]
        start, stop = entry["data_offsets"]
        numbers = (*shape, start, stop)
        is_fine = all(type(n) is int and n >= 0 for n in numbers) and max(shape, default=0) <= LONGEST_AXIS
        is_fine = is_fine and stop - start == item_bytes * math.prod(shape)
    except (TypeError, KeyError, ValueError):
        is_fine = False
    if not is_fine:
        raise AdapterError(
            f"{path}: not a safetensors file: its header says of {name!a} what cannot be: {entry!a:.200}"
        )
    return start, stop


def specs_of(tensors: Mapping[str, mx.array]) -> dict[str, TensorSpec]:
    """What a header would say of tensors in memory."""
    return {
        name: TensorSpec(tuple(value.shape), DTYPE_WORDS.get(value.dtype, str(value.dtype)))
        for name, value in tensors.items()
    }


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
            _sync(path)
        # The config first: between the two, its content hash gives away the tensors that are not its own.
        os.replace(new_config, folder / CONFIG_FILE)
        os.replace(new_tensors, folder / tensors_file)
        _sync(folder)
    except (OSError, RuntimeError, AdapterError) as error:
        for path in (new_tensors, new_config):
            path.unlink(missing_ok=True)
        raise StorageError(f"{folder}: the adapter could not be saved: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
