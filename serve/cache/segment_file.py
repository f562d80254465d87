"""A segment's file: safetensors, arrays as they are in memory and what they do not tell. Bytes out, bytes in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, TensorSpec, serialize

DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "U8": "uint8",
    "U32": "uint32",
    "I32": "int32",
}
"""Names in a file, and those that its writer takes."""


class HostArray(NamedTuple):
    """An array's bytes, as they are in memory: row after row."""

    dtype: str
    """One of DTYPES' values."""
    shape: tuple[int, ...]
    data: Any
    """A buffer."""


def to_bytes(arrays: Mapping[str, HostArray], meta: Mapping[str, str]) -> bytes:
    """A safetensors file."""
    buffers = {name: np.frombuffer(array.data, np.uint8) for name, array in arrays.items()}
    specs = {
        name: TensorSpec(
            dtype=array.dtype,
            shape=array.shape,
            data_ptr=buffers[name].ctypes.data,
            data_len=buffers[name].nbytes,
        )
        for name, array in arrays.items()
    }
    try:
        return bytes(serialize(specs, metadata=dict(meta)))
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def from_bytes(data: bytearray) -> tuple[dict[str, HostArray], dict[str, str]]:
    """What `to_bytes` was given; nothing is copied."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    meta = header.pop("__metadata__", {})
    body = memoryview(data)[8 + size :]
    arrays = {
        name: HostArray(DTYPES[said["dtype"]], tuple(said["shape"]), body[slice(*said["data_offsets"])])
        for name, said in header.items()
    }
    return arrays, meta


def read_whole(path: Path, num_bytes: int) -> bytearray:
    """The file's bytes. OSError where it cannot be read, ValueError where it has not so many."""
    data = bytearray(num_bytes)
    with path.open("rb", buffering=0) as stream:
        length = os.fstat(stream.fileno()).st_size
        if length != num_bytes:
            raise ValueError(f"it has {length} bytes, expected {num_bytes}")
        view, position = memoryview(data), 0
        while position < num_bytes:
            count = stream.readinto(view[position:])
            if not count:
                raise ValueError(f"it ends after {position} of {num_bytes} bytes")
            position += count
    return data
