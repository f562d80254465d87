"""A segment's arrays as bytes for a file, and back, bit for bit; whatever they are made of."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from serve.cache.segment import Segment
from serve.cache.segment_file import DTYPES, HostArray

MLX_TYPES = {name: getattr(mx, name) for name in DTYPES.values()}
NUMPY_TYPES = {mx.bfloat16: np.uint16}
"""What carries the bits of a type that numpy lacks."""


class SegmentCodec:
    """What `Disk` is given for segments of keys and values."""

    def dump(self, segment: Segment) -> tuple[dict[str, HostArray], dict[str, str]]:
        """No array is computed: those of a segment are evaluated, and lie row after row."""
        return {name: to_host(array) for name, array in segment.arrays().items()}, segment.meta()

    def load(self, arrays: Mapping[str, HostArray], meta: Mapping[str, str]) -> Segment:
        """The arrays are copies, made on the caller's thread."""
        return Segment.from_arrays({name: from_host(array) for name, array in arrays.items()}, meta)


def to_host(array: mx.array) -> HostArray:
    """Its bytes as they are, without a copy; it is evaluated, and lies row after row."""
    return HostArray(str(array.dtype).removeprefix("mlx.core."), tuple(array.shape), array)


def from_host(array: HostArray) -> mx.array:
    """A copy."""
    dtype = MLX_TYPES[array.dtype]
    plain = NUMPY_TYPES.get(dtype) or np.dtype(array.dtype)
    values = np.frombuffer(array.data, plain).reshape(array.shape)
    return mx.array(values).view(dtype)
