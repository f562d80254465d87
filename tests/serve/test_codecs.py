"""Laws of storage: what is written of a vector depends on it alone, and is what mlx and mlx-vlm would write."""

from __future__ import annotations

import pytest

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import numpy as np
from mlx_vlm import turboquant

from serve.cache.capacity import LayerShape
from serve.cache.codecs import AffineCodec, make_codec
from serve.cache.precision import KvPrecision, stored_bytes
from serve.cache.turbo import TurboCodec, pack, unpack

HALF_BITS = [1, 1.5, 2, 3, 3.5, 4, 4.5, 6]


def sample(dim: int, *, tokens: int = 5) -> tuple[mx.array, np.ndarray]:
    """Vectors [2, 3, T, D] whose later channels are larger, and the mean sizes of the channels."""
    vectors = mx.random.normal((2, 3, tokens, dim)) * (1 + mx.arange(dim) * 7 % 5)
    return vectors, np.asarray(mx.abs(vectors).mean(axis=(0, 1, 2)))


def parts_of(state: tuple) -> list[mx.array]:
    """The arrays of mlx-vlm's state as a codec here gives them."""
    if isinstance(state, turboquant.TurboQuantSplitState):
        return parts_of(state.low) + parts_of(state.high)
    return [state.norms[..., None], state.indices]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [1, 7, 32, 80])
def test_packed_codes_come_back_and_lie_as_mlx_vlm_lays_them(bits, dim):
    codes = mx.random.randint(0, 1 << bits, (2, 3, dim)).astype(mx.uint32)
    packed = pack(codes, bits)
    assert mx.array_equal(packed, turboquant._pack_lowbit(codes, bits))
    assert mx.array_equal(unpack(packed, bits, dim), codes)


@pytest.mark.parametrize("bits", HALF_BITS)
@pytest.mark.parametrize("dim", [16, 64, 80])
def test_turbo_writes_the_bits_that_mlx_vlm_writes(bits, dim):
    vectors, sizes = sample(dim)
    codec, reference = (
        TurboCodec(dim, mx.float32, bits, sizes),
        turboquant._build_codec(vectors, bits, "mse", 0),
    )
    state = reference.quantize(vectors)
    parts = codec.encode(vectors)
    assert all(map(mx.array_equal, parts, parts_of(state)))
    assert mx.allclose(codec.decode(parts), reference.dequantize(state), atol=1e-4)
    queries = mx.random.normal((2, 3, 1, dim))
    scores = codec.turn(queries) @ codec.decode_turned(parts).swapaxes(-1, -2)
    assert mx.allclose(scores, queries @ codec.decode(parts).swapaxes(-1, -2), atol=1e-3)
    assert mx.allclose(codec.turn_back(codec.turn(vectors)), vectors, atol=1e-4)


PRECISIONS = [
    KvPrecision(),
    *(KvPrecision("affine", bits, bits, group_size=32) for bits in (2, 3, 4, 5, 6, 8)),
    *(KvPrecision("turbo", bits, bits) for bits in HALF_BITS),
]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.label)
def test_a_position_is_stored_the_same_in_any_company_and_in_the_bytes_that_are_counted(precision, dtype):
    vectors, sizes = sample(64, tokens=9)
    vectors = vectors.astype(dtype)
    codec = make_codec(precision, precision.key_bits, 64, dtype, sizes, seed=0)
    parts = codec.encode(vectors)
    assert [part.dtype for part in parts] == list(codec.dtypes)
    assert [part.shape for part in parts] == [(2, 3, 9, width) for width in codec.widths]
    alone = codec.encode(vectors[1:, 2:, 4:6])
    assert all(mx.array_equal(part[1:, 2:, 4:6], other) for part, other in zip(parts, alone, strict=True))
    assert codec.decode(parts).dtype == dtype
    counted = stored_bytes(precision, precision.key_bits, 64, dtype.size)
    assert sum(part.nbytes for part in parts) == 2 * 3 * 9 * counted


def test_zeros_are_stored_as_zeros_and_come_back():
    for precision in PRECISIONS:
        codec = make_codec(precision, precision.key_bits, 64, mx.float32, np.ones(64), seed=0)
        parts = [
            mx.zeros((1, 1, 3, width), dtype) for width, dtype in zip(codec.widths, codec.dtypes, strict=True)
        ]
        assert mx.all(codec.decode(parts) == 0), "a cleared row must be finite"


@pytest.mark.parametrize(("bits", "most"), [(8, 0.55), (4, 0.30)])
def test_quantized_keys_take_their_share_of_half_precision(bits, most):
    shape = LayerShape(8, 64, 64, itemsize=2)
    share = shape.position_bytes(KvPrecision("affine", bits, bits)) / shape.position_bytes(KvPrecision())
    assert share <= most
    wide = LayerShape(8, 64, 64, itemsize=4)
    assert wide.position_bytes(KvPrecision("affine", bits, bits)) == shape.position_bytes(
        KvPrecision("affine", bits, bits)
    ), "scales are no wider where the model computes in single precision"


def test_affine_decodes_in_the_precision_of_the_model_though_scales_are_halves():
    vectors, _ = sample(64)
    codec = AffineCodec(64, mx.float32, 8, 64)
    packed, scales, biases = codec.encode(vectors)
    codes = unpack(packed, 8, 64).reshape(2, 3, 5, 1, 64).astype(mx.float32)
    expected = codes * scales.astype(mx.float32)[..., None] + biases.astype(mx.float32)[..., None]
    assert mx.allclose(codec.decode((packed, scales, biases)), expected[..., 0, :], atol=1e-5)
