"""What a safetensors file says of its tensors, before any of them is read; held to the file to the byte."""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from serve.adapters.formats.values import without_repeats
from serve.errors import AdapterError

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


def check_is_file(path: Path) -> None:
    """AdapterError for what is not there, and for a pipe or a device, which would be waited for, or never end."""
    if not os.path.exists(path):
        raise AdapterError(f"{path.parent} is not an adapter folder: it has no {path.name}")
    if not os.path.isfile(path):
        raise AdapterError(f"{path}: is no file")


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
