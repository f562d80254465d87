"""SiLU by powers of two is MLX's SiLU: values, gradients, and in the families' own code."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.layers import activations as own
from mlx_lm.models.activations import swiglu

from serve import device
from serve.model import activations

NUMBERS = mx.concatenate(
    [
        mx.linspace(-300, 300, 60_001),
        mx.random.normal((10_000,), key=mx.random.key(0)),
        mx.array([0.0, 1e-30, -1e30]),
    ]
)


def relative_error(values: mx.array) -> float:
    x = np.asarray(NUMBERS).astype(np.float64)
    exact = x / (1 + np.exp(-np.clip(x, -700, None)))
    counts = np.abs(exact) > 1e-35
    return float((np.abs(np.asarray(values) - exact)[counts] / np.abs(exact)[counts]).max())


def test_it_is_as_exact_as_mlxs_own():
    assert relative_error(activations.silu(NUMBERS)) <= 2 * relative_error(NUMBERS * mx.sigmoid(NUMBERS))


def test_what_is_no_number_stays_none_and_the_ends_are_mlxs():
    ends = mx.array([np.inf, np.nan, 0.0, -0.0])
    ours, theirs = activations.silu(ends), ends * mx.sigmoid(ends)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def test_gradients_are_mlxs_also_where_the_power_overflows():
    def of(function):
        return mx.grad(lambda x: (function(x) * mx.cos(x)).sum())(NUMBERS)

    ours, theirs = of(activations.silu), of(lambda x: x * mx.sigmoid(x))
    assert mx.all(mx.isfinite(ours))
    assert mx.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_left_to_mlx(dtype):
    x = NUMBERS[::100].astype(dtype)
    assert mx.array_equal(activations.silu(x), x * mx.sigmoid(x))


@pytest.mark.skipif(device.backend() != "cpu", reason="only CPU's sigmoid is slow")
def test_the_families_code_uses_it():
    assert nn.silu is own.silu is activations.silu
    gate, x = NUMBERS[:100], NUMBERS[100:200]
    assert mx.array_equal(swiglu(gate, x), activations.silu(gate) * x)
    assert mx.array_equal(nn.SiLU()(gate), activations.silu(gate))
