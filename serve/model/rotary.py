"""Rotary embeddings where MLX's own are slow: on CPU each call works out the cosines and sines of its positions anew.

A model's layers turn queries and keys by the same angles, two calls a layer: an eighth of a small model's step went
there. The same numbers, bit for bit, from angles that a forward's first call works out for all of them.
Families' code finds it under MLX's name, for training and serving alike, as it does `activations.silu`.
"""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import mlx.core as mx

from serve import device

_own = mx.fast.rope
MAX_KINDS = 16
"""Sets of angles kept of one forward; a family has one or two, one a base."""


class Angles(NamedTuple):
    """Cosines and sines as they are multiplied: [..., T, dims], each number of a pair with its own sign."""

    cosines: mx.array
    sines: mx.array


class _Known(threading.local):
    """The last forward's angles. A thread's own, since its streams are."""

    def __init__(self) -> None:
        self.shared: mx.array | None = None
        self.key: object = None
        """Which positions `found` is of."""
        self.found: dict[tuple[object, ...], tuple[mx.array | None, Angles]] = {}
        """With the frequencies that a key names by their identity."""


_known = _Known()


def share(offset: mx.array | None) -> None:
    """Angles at this offset are kept from here on, until the next call: the caller does not change the array, as an
    assignment to its items would. None gives the memory back."""
    _known.shared, _known.key = offset, None
    _known.found.clear()


def rope(
    a: mx.array,
    dims: int,
    *,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None = None,
    stream: Any = None,
) -> mx.array:
    """`mx.fast.rope`: [B, ..., T, D] with the first `dims` of each D turned by its position times their frequencies.

    offset  of the first token; an array [B] has one a row
    freqs   [dims / 2] wavelengths over 2π, in place of `base`
    Raises what MLX raises.
    """
    is_plain = a.dtype == mx.float32 and a.ndim >= 3 and stream is None and 0 < dims <= a.shape[-1]
    if not is_plain or dims % 2 or (base is None) == (freqs is None) or not _is_offset(offset, a.shape[0]):
        return _own(
            a,
            dims,
            traditional=traditional,
            base=base,
            scale=scale,
            offset=offset,
            freqs=freqs,
            stream=stream,
        )
    cosines, sines = _angles(a, dims, traditional, base, scale, offset, freqs)
    turned = a if dims == a.shape[-1] else a[..., :dims]
    turned = turned * cosines + _swapped(turned, traditional=traditional) * sines
    return turned if dims == a.shape[-1] else mx.concatenate([turned, a[..., dims:]], axis=-1)


def _is_offset(offset: object, num_rows: int) -> bool:
    if isinstance(offset, mx.array):
        return offset.ndim == 0 or (offset.ndim == 1 and offset.size in (1, num_rows))
    return isinstance(offset, int)


def _swapped(a: mx.array, *, traditional: bool) -> mx.array:
    """Each number of a pair in the other's place: neighbours, or a half of them apart."""
    if traditional:
        return a.reshape(*a.shape[:-1], -1, 2)[..., ::-1].reshape(a.shape)
    first, second = mx.split(a, 2, axis=-1)
    return mx.concatenate([second, first], axis=-1)


def _angles(
    a: mx.array,
    dims: int,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None,
) -> Angles:
    """Known ones, or those that this call works out. Of an offset that is a number they are computed at once: what
    is traced around them finds constants."""
    is_array = isinstance(offset, mx.array)
    if is_array and offset is not _known.shared:
        return _computed(a, dims, traditional, base, scale, offset, freqs)
    where = (id(offset) if is_array else offset, is_array, a.shape[-2])
    if _known.key != where or len(_known.found) >= MAX_KINDS:
        _known.key = where
        _known.found.clear()
    kind = (a.ndim, dims, traditional, base, scale, id(freqs))
    if kind not in _known.found:
        angles = _computed(a, dims, traditional, base, scale, offset, freqs)
        if not is_array:
            mx.eval(angles)
        _known.found[kind] = freqs, angles
    return _known.found[kind][1]


def _computed(
    a: mx.array,
    dims: int,
    traditional: bool,
    base: float | None,
    scale: float,
    offset: int | mx.array,
    freqs: mx.array | None,
) -> Angles:
    """By MLX's operations in MLX's order: mlx/fast.cpp, rope's fallback."""
    half = dims // 2
    positions = mx.arange(a.shape[-2], dtype=mx.float32)
    positions = (positions + (offset[..., None] if isinstance(offset, mx.array) else offset)) * scale
    if freqs is not None:
        inverse = mx.reciprocal(freqs.astype(mx.float32))
    else:
        assert base is not None
        inverse = mx.exp(mx.arange(0, -half, -1, dtype=mx.float32) * (math.log(base) / half))
    theta = positions[..., None] * inverse  # [T, half], or [B, T, half]
    if theta.ndim == 3:
        theta = theta.reshape(theta.shape[0], *[1] * (a.ndim - 3), *theta.shape[1:])
    cosines, sines = mx.cos(theta), mx.sin(theta)
    if traditional:
        shape = (*theta.shape[:-1], dims)
        return Angles(mx.repeat(cosines, 2, axis=-1), mx.stack([-sines, sines], axis=-1).reshape(shape))
    return Angles(mx.concatenate([cosines, cosines], axis=-1), mx.concatenate([-sines, sines], axis=-1))


if device.backend() == "cpu":
    # On import, so that a process has one function from its first model to its last.
    mx.fast.rope = rope
