"""How vectors are stored: keys or values of one layer in, the arrays of a buffer out, and back.

A codec turns [..., T, D] into parts [..., T, width] and back; what it makes of a position depends on that position
alone, so a row is stored the same in any company and in any chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx
import numpy as np

from serve.cache.precision import SCALE_BYTES, KvPrecision, turbo_split

Parts = Sequence[mx.array]


class Codec(Protocol):
    """One form of storage."""

    widths: tuple[int, ...]
    """Last axis of each part."""
    dtypes: tuple[mx.Dtype, ...]

    def encode(self, vectors: mx.array) -> tuple[mx.array, ...]:
        """[..., T, D] → parts [..., T, width]."""

    def decode(self, parts: Parts) -> mx.array:
        """parts [..., T, width] → [..., T, D], in the model's dtype."""


@runtime_checkable
class TurnedCodec(Protocol):
    """A codec that stores vectors turned, all by the same rotation: lengths and angles are as they were."""

    def decode_turned(self, parts: Parts) -> mx.array:
        """parts → [..., T, D] float32, turned."""

    def turn(self, vectors: mx.array) -> mx.array:
        """[..., D] → float32, turned."""

    def turn_back(self, vectors: mx.array) -> mx.array:
        """The inverse."""


class PlainCodec:
    """As the model computes it."""

    def __init__(self, dim: int, dtype: mx.Dtype) -> None:
        self.widths: tuple[int, ...] = (dim,)
        self.dtypes: tuple[mx.Dtype, ...] = (dtype,)

    def encode(self, vectors: mx.array) -> tuple[mx.array, ...]:
        return (vectors,)

    def decode(self, parts: Parts) -> mx.array:
        return parts[0]


class AffineCodec:
    """q · scale + bias by group of channels, as `mx.quantize` makes it; scales and biases are in half precision."""

    def __init__(self, dim: int, dtype: mx.Dtype, bits: int, group_size: int) -> None:
        self.bits = bits
        self.group_size = group_size
        self.dtype = dtype
        scale_dtype = mx.float16 if dtype.size > SCALE_BYTES else dtype
        self.widths: tuple[int, ...] = (dim * bits // 32, dim // group_size, dim // group_size)
        self.dtypes: tuple[mx.Dtype, ...] = (mx.uint32, scale_dtype, scale_dtype)

    def encode(self, vectors: mx.array) -> tuple[mx.array, ...]:
        packed, scales, biases = mx.quantize(vectors, group_size=self.group_size, bits=self.bits)
        return packed, scales.astype(self.dtypes[1]), biases.astype(self.dtypes[1])

    def decode(self, parts: Parts) -> mx.array:
        packed, scales, biases = parts
        # Given half precision, mlx would multiply in it.
        return mx.dequantize(
            packed,
            scales.astype(self.dtype),
            biases.astype(self.dtype),
            group_size=self.group_size,
            bits=self.bits,
        )


@dataclass(frozen=True)
class Form:
    """How one layer's rows of one precision are stored: parts of keys, then parts of values."""

    keys: Codec
    values: Codec

    @property
    def widths(self) -> tuple[int, ...]:
        return self.keys.widths + self.values.widths

    @property
    def dtypes(self) -> tuple[mx.Dtype, ...]:
        return self.keys.dtypes + self.values.dtypes

    def encode(self, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        """[B, H, T, D] each → all parts."""
        return self.keys.encode(keys) + self.values.encode(values)

    def split(self, parts: Parts) -> tuple[Parts, Parts]:
        """Parts of keys, parts of values."""
        number = len(self.keys.widths)
        return parts[:number], parts[number:]

    def decode(self, parts: Parts) -> tuple[mx.array, mx.array]:
        """All parts → keys and values."""
        keys, values = self.split(parts)
        return self.keys.decode(keys), self.values.decode(values)


def outliers(sizes: np.ndarray) -> np.ndarray:
    """[D] mean sizes of channels → the larger half of them, in order: those that half a bit goes to."""
    (_, (_, number)) = turbo_split(1.5, len(sizes))
    return np.sort(np.argsort(sizes, kind="stable")[-number:]).astype(np.int32)


def make_codec(
    precision: KvPrecision, bits: float, dim: int, dtype: mx.Dtype, sizes: np.ndarray | None, *, seed: int
) -> Codec:
    """The codec of keys or values. `sizes`: [D] of a sample, which channels are the large ones."""
    if precision.is_plain:
        return PlainCodec(dim, dtype)
    if precision.scheme == "affine":
        return AffineCodec(dim, dtype, int(bits), precision.group_size)
    from serve.cache.turbo import TurboCodec  # and with it mlx-vlm, which takes a second to import

    return TurboCodec(dim, dtype, bits, sizes, seed=seed)
