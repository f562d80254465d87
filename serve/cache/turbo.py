"""TurboQuant: a vector's norm, and its direction turned at random and rounded to a codebook (Zandieh et al. 2025).

Codebooks, rotations and, on Metal, kernels are mlx-vlm's, and so is the packing: what one writes the other reads.
Here the packing is a few operations on whole arrays, where mlx-vlm's plain path takes one for each channel, and
attention happens between turned vectors, so that nothing that is stored need be turned back.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
from mlx_vlm import turboquant

from serve.cache.codecs import Parts, outliers
from serve.cache.precision import turbo_split

EPS = 1e-6
NUMBERS_AT_ONCE = 1 << 20
"""So many numbers are unpacked at once."""
SEED_STEP = 97
"""Between the parts of a vector, as in mlx-vlm."""


class TurboCodec:
    """Keys or values of one layer at whole or half bits.

    Half bits give the channels that are large in a sample one bit more: `sizes` [D] is their mean size.
    """

    def __init__(
        self, dim: int, dtype: mx.Dtype, bits: float, sizes: np.ndarray | None = None, *, seed: int = 0
    ) -> None:
        self.dtype = dtype
        self._dim = dim
        split = turbo_split(bits, dim)
        self._order: mx.array | None = None
        self._inverse: mx.array | None = None
        if len(split) > 1:
            assert sizes is not None, "half bits need a sample"
            high = outliers(sizes)
            order = np.concatenate([np.setdiff1d(np.arange(dim, dtype=np.int32), high), high])
            self._order, self._inverse = mx.array(order), mx.array(np.argsort(order).astype(np.int32))
        self._codecs = [
            turboquant._TurboQuantMSECodec(size, width, seed + SEED_STEP * number)
            for number, (width, size) in enumerate(split)
        ]
        self._bounds = np.cumsum([size for _, size in split])[:-1].tolist()
        self.widths: tuple[int, ...] = tuple(
            width for bits, size in split for width in (1, -(-bits * size // 32))
        )
        self.dtypes: tuple[mx.Dtype, ...] = (mx.float16, mx.uint32) * len(split)

    def encode(self, vectors: mx.array) -> tuple[mx.array, ...]:
        """[..., T, D] → norms and packed codes of each part."""
        parts: list[mx.array] = []
        for codec, part in zip(self._codecs, self._split(vectors), strict=True):
            if mx.metal.is_available():
                state = codec.quantize(part)
                parts += (state.norms[..., None], state.indices)
                continue
            numbers = part.astype(mx.float32)
            norms = mx.linalg.norm(numbers, axis=-1, keepdims=True)
            turned = codec._rotate_forward(numbers / mx.maximum(norms, EPS))
            parts += (
                norms.astype(mx.float16),
                pack(_codes(turned, codec._midpoints, codec.bits), codec.bits),
            )
        return tuple(parts)

    def decode(self, parts: Parts) -> mx.array:
        """→ [..., T, D]."""
        return self.turn_back(self.decode_turned(parts)).astype(self.dtype)

    def decode_turned(self, parts: Parts) -> mx.array:
        """→ [..., T, D] float32 in turned channels: what `turn` makes of queries meets what this makes of keys."""
        num_vectors = parts[0].size
        tokens = parts[0].shape[-2]
        step = max(1, NUMBERS_AT_ONCE * tokens // (num_vectors * self._dim))
        if step >= tokens:
            return self._decode_turned(parts)
        # One after the other: what unpacking takes beside the result is as much again several times.
        stretches = [
            self._decode_turned([part[..., start : start + step, :] for part in parts])
            for start in range(0, tokens, step)
        ]
        return mx.concatenate(stretches, axis=-2)

    def _decode_turned(self, parts: Parts) -> mx.array:
        return _joined(
            [
                mx.take(codec.codebook, unpack(words, codec.bits, codec.dim), axis=0)
                * norms.astype(mx.float32)
                for codec, norms, words in zip(self._codecs, parts[::2], parts[1::2], strict=True)
            ]
        )

    def turn(self, vectors: mx.array) -> mx.array:
        """[..., D] → float32 in turned channels; lengths and angles stay."""
        parts = self._split(vectors.astype(mx.float32))
        return _joined([codec._rotate_forward(part) for codec, part in zip(self._codecs, parts, strict=True)])

    def turn_back(self, vectors: mx.array) -> mx.array:
        """The inverse of `turn`."""
        parts = mx.split(vectors, self._bounds, axis=-1) if self._bounds else [vectors]
        joined = _joined(
            [codec._rotate_inverse(part) for codec, part in zip(self._codecs, parts, strict=True)]
        )
        return joined if self._inverse is None else mx.take(joined, self._inverse, axis=-1)

    def _split(self, vectors: mx.array) -> list[mx.array]:
        if self._order is None:
            return [vectors]
        return list(mx.split(mx.take(vectors, self._order, axis=-1), self._bounds, axis=-1))


def _codes(turned: mx.array, bounds: mx.array, bits: int) -> mx.array:
    """How many of the 2**bits - 1 ascending bounds each number is above, uint32, by halving."""
    codes = mx.zeros(turned.shape, dtype=mx.uint32)
    for bit in reversed(range(bits)):
        above = turned > mx.take(bounds, codes + ((1 << bit) - 1))
        codes = codes + (above.astype(mx.uint32) << bit)
    return codes


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def pack(codes: mx.array, bits: int) -> mx.array:
    """[..., D] uint32 below 2**bits → [..., ceil(D · bits / 32)] uint32, the first in the lowest bits."""
    *shape, dim = codes.shape
    width = -(-dim * bits // 32)
    if 32 % bits == 0:
        each, step = 32 // bits, bits
    else:  # a code may lie across two words: bit by bit
        codes = ((codes[..., None] >> mx.arange(bits, dtype=mx.uint32)) & 1).reshape(*shape, dim * bits)
        each, step = 32, 1
    missing = width * each - codes.shape[-1]
    codes = mx.pad(codes, [(0, 0)] * len(shape) + [(0, missing)]).reshape(*shape, width, each)
    return mx.sum(codes << (mx.arange(each, dtype=mx.uint32) * step), axis=-1)


def unpack(words: mx.array, bits: int, dim: int) -> mx.array:
    """The inverse of `pack`: [..., W] → [..., dim] uint32."""
    *shape, width = words.shape
    if 32 % bits == 0:
        codes = words[..., None] >> (mx.arange(32 // bits, dtype=mx.uint32) * bits)
        return (codes.reshape(*shape, -1) & ((1 << bits) - 1))[..., :dim]
    # Every `period` words the codes begin at a word's first bit again. One may lie across two words, so each word
    # is read with the next one above it.
    period = bits // math.gcd(bits, 32)
    words = mx.pad(words, [(0, 0)] * len(shape) + [(0, -width % period + 1)])
    both = words[..., :-1].astype(mx.uint64) | (words[..., 1:].astype(mx.uint64) << 32)
    both = both.reshape(*shape, -1, period, 1)
    begun = [range(-(-32 * word // bits) * bits - 32 * word, 32, bits) for word in range(period)]
    codes = mx.concatenate(
        [both[..., word, :] >> mx.array(list(first), dtype=mx.uint64) for word, first in enumerate(begun)],
        axis=-1,
    )
    return (codes.astype(mx.uint32) & ((1 << bits) - 1)).reshape(*shape, -1)[..., :dim]
