"""States of a text's tokens in, its vector out: sentence-transformers' arithmetic, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn

from serve.embed.config import PoolingMode

SMALLEST_LENGTH = 1e-12
ACTIVATIONS: Mapping[str, Callable[[mx.array], mx.array]] = {
    "Identity": lambda x: x,
    "Tanh": mx.tanh,
    "ReLU": nn.relu,
    "GELU": nn.gelu,
    "SiLU": nn.silu,
    "Sigmoid": mx.sigmoid,
}


def pool(states: mx.array, lengths: mx.array, skipped: mx.array, modes: Sequence[PoolingMode]) -> mx.array:
    """One vector a row, those of several modes joined.

    states   [B, T, D]    padded on the right
    lengths  [B] int32    tokens of a row
    skipped  [B] int32    tokens at a row's beginning that do not count; fewer than all
    Returns [B, len(modes) · D] float32.
    """
    states = states.astype(mx.float32)
    positions = mx.arange(states.shape[1])[None]  # [1, T]
    counts = (positions >= skipped[:, None]) & (positions < lengths[:, None])  # [B, T]
    return mx.concatenate([_pooled(states, lengths, skipped, counts, mode) for mode in modes], axis=-1)


def _pooled(
    states: mx.array, lengths: mx.array, skipped: mx.array, counts: mx.array, mode: PoolingMode
) -> mx.array:
    if mode == "cls":
        return _at(states, skipped)
    if mode == "last":
        return _at(states, lengths - 1)
    if mode == "max":
        return mx.where(counts[..., None], states, -mx.inf).max(axis=1)
    weights = counts.astype(mx.float32)
    if mode == "weighted_mean":
        weights = weights * mx.arange(1, states.shape[1] + 1)[None]
    # Where a row has no token the state is not multiplied: padding may hold anything, and 0 · NaN is NaN.
    summed = (mx.where(counts[..., None], states, 0) * weights[..., None]).sum(axis=1)  # [B, D]
    total = weights.sum(axis=1, keepdims=True)
    return summed / (mx.sqrt(total) if mode == "mean_sqrt_len" else total)


def _at(states: mx.array, positions: mx.array) -> mx.array:
    """[B, D]: of each row the state at its position."""
    return mx.take_along_axis(states, positions[:, None, None], axis=1)[:, 0]


def normalized(vectors: mx.array) -> mx.array:
    """[..., D], of length 1."""
    lengths = mx.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / mx.maximum(lengths, SMALLEST_LENGTH)
