"""The gathered low-rank product, against one plain product an entry, at sizes that fill no whole lane too."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from serve.adapters.layers.lora import LANES, gathered_update, whole_lanes

SIZES = [*range(1, LANES + 2), 2 * LANES]
DTYPES = {mx.float32: 1e-5, mx.float16: 1e-2, mx.bfloat16: 5e-2}
"""With the error allowed: of rounding, relative to the largest number of the result."""


@pytest.fixture
def tolerance() -> dict[mx.Dtype, float]:
    """A GPU may multiply float32 as TF32, of 10 binary digits."""
    on_gpu = mx.default_device() != mx.Device(mx.cpu)
    return {**DTYPES, mx.float32: 2e-3 if on_gpu else DTYPES[mx.float32]}


def plain(x: mx.array, a: mx.array, b: mx.array, entries: list[int]) -> np.ndarray:
    x, a, b = (np.array(each.astype(mx.float32), np.float64) for each in (x, a, b))
    return np.stack([row @ a[entry] @ b[entry] for row, entry in zip(x, entries, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True], ids=["as stored", "experts' layout"])
def test_every_rank_and_width_gives_the_plain_product_of_each_entry(dtype, is_transposed, tolerance):
    mx.random.seed(0)
    entries = [0, 2, 2, 1]
    index = mx.array(entries, dtype=mx.uint32)
    for rank, width, num_tokens in itertools.product(SIZES, (2 * LANES, 2 * LANES + 3), (3, 150)):
        x = mx.random.normal((4, num_tokens, width)).astype(dtype)
        a = mx.random.normal((3, width, rank)).astype(dtype) / width**0.5
        b = mx.random.normal((3, rank, width)).astype(dtype)
        expected = plain(x, a, b, entries)
        if is_transposed:
            a, b = (mx.contiguous(each.swapaxes(-1, -2)).swapaxes(-1, -2) for each in (a, b))
        update = gathered_update(x, a, b, rhs_indices=index)
        assert update.shape == expected.shape
        error = np.abs(np.array(update.astype(mx.float32)) - expected).max() / np.abs(expected).max()
        assert error < tolerance[dtype], (rank, width, num_tokens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_slice_of_tokens_gives_the_product_of_its_own_tokens(dtype, tolerance):
    """Its rows do not follow one another in memory."""
    mx.random.seed(0)
    entries = [0, 2, 2, 1]
    long = mx.random.normal((4, 90, 16)).astype(dtype)
    a, b = mx.random.normal((3, 16, 8)).astype(dtype), mx.random.normal((3, 8, 24)).astype(dtype)
    for start, end in ((0, 80), (0, 40), (7, 9), (89, 90)):
        x = long[:, start:end]
        expected = plain(x, a, b, entries)
        update = gathered_update(x, a, b, rhs_indices=mx.array(entries, dtype=mx.uint32))
        error = np.abs(np.array(update.astype(mx.float32)) - expected).max() / np.abs(expected).max()
        assert error < tolerance[dtype], (start, end)


@pytest.mark.parametrize("rank", SIZES)
def test_gradients_of_every_rank_are_those_of_the_plain_products(rank, tolerance):
    mx.random.seed(0)
    entries = [1, 0, 1]
    index = mx.array(entries, dtype=mx.uint32)
    x, width = mx.random.normal((3, 1, 16)), 16
    a, b = mx.random.normal((2, width, rank)) / 4, mx.random.normal((2, rank, width))

    def gathered(*arrays: mx.array) -> mx.array:
        return gathered_update(*arrays, rhs_indices=index).square().sum()

    def one_by_one(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return sum((x[i] @ a[e] @ b[e]).square().sum() for i, e in enumerate(entries))

    argnums = [0, 1, 2]
    for ours, theirs in zip(
        mx.grad(gathered, argnums)(x, a, b), mx.grad(one_by_one, argnums)(x, a, b), strict=True
    ):
        assert ours.shape == theirs.shape
        assert mx.abs(ours - theirs).max() <= 5 * tolerance[mx.float32] * mx.abs(theirs).max()


def test_lanes_are_filled_with_zeros_and_whole_ones_are_left_alone():
    array = mx.ones((3, 5, LANES))
    assert whole_lanes(array, -1) is array
    padded = whole_lanes(array, -2, -1)
    assert padded.shape == (3, LANES, LANES)
    assert padded.sum() == array.sum()
