"""SiLU where MLX's own is slow: on CPU its sigmoid calls a function for each multiplication of each number.

A sixth of a small model's forward went there. The same function by powers of two takes a third of that time.
Families' code finds it under MLX's name, for training and serving alike.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import activations

from serve import device

_LOG2_E = math.log2(math.e)
_LARGEST = 126.0


def silu(x: mx.array) -> mx.array:
    """x σ(x) with σ(x) = 1 / (1 + e⁻ˣ), of any shape.

    As exact as MLX's: within 6·10⁻⁷ of the value up to |x| = 10, within 4·10⁻⁶ up to 80; below −87 it is x · 2⁻¹²⁶,
    where the value is nearer to 0.
    """
    if x.dtype != mx.float32:
        return x * mx.sigmoid(x)
    # Not up to infinity, whose gradient would be 0 · ∞. A custom gradient cannot be exported, and estimates export.
    return x * mx.reciprocal(1 + mx.power(2.0, mx.minimum(x * -_LOG2_E, _LARGEST)))


if device.backend() == "cpu":
    # On import, so that a process has one function from its first model to its last.
    for _module in (nn, nn.layers, activations):
        _module.silu = silu
    nn.SiLU.__call__ = lambda _self, x: silu(x)
