"""Attention over rows in buckets: the family's own code calls `scaled_dot_product_attention`, and here it lands.

The name stands in the family's modules as a global, which `install` replaces by a function that takes held rows a
bucket at a time and everything else as before: given arrays, it is the family's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from serve import device
from serve.cache.codecs import AffineCodec, Codec, Form, Parts, PlainCodec, TurnedCodec
from serve.cache.spans import Run

NAME = "scaled_dot_product_attention"
FEW_TOKENS = 8
"""Up to so many tokens a row, quantized keys are multiplied as they are; for more, they are decoded first."""
DECODED_NUMBERS = 1 << 24
"""So many numbers of keys are decoded at once, or one row's."""


class Mask:
    """What a family's code holds while it asks for a mask: the window it wants. Each bucket makes its own."""

    def __init__(self, window: int | None) -> None:
        self.window = window


class Held(Protocol):
    """Keys and values that stay in their buffers (rows.HeldRows): what a family's code passes on unseen."""

    def attend(
        self, queries: mx.array, scale: float, window: int | None, sinks: mx.array | None
    ) -> mx.array: ...


def install(network_module: nn.Module) -> None:
    """Let the family's attention take held rows. Holds for the process; plain arrays never notice."""
    names = {kind.__module__ for _, module in network_module.named_modules() for kind in type(module).__mro__}
    for name in names:
        module = sys.modules.get(name)
        original = getattr(module, NAME, None)
        if original is not None and not hasattr(original, "takes_held_rows"):
            setattr(module, NAME, _dispatching(original))


def _dispatching(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    @wraps(original)
    def scaled_dot_product_attention(
        queries: mx.array, keys: Any, values: Any, *args: Any, **kwargs: Any
    ) -> mx.array:
        if hasattr(keys, "attend"):
            if values is not keys:
                raise TypeError("the values are not those that were stored with the keys")
            return _attend(queries, keys, *args, **kwargs)
        return original(queries, keys, values, *args, **kwargs)

    scaled_dot_product_attention.takes_held_rows = True  # type: ignore[attr-defined]
    return scaled_dot_product_attention


def _attend(
    queries: mx.array,
    held: Held,
    cache: object = None,
    scale: float = 1.0,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    if mask is not None and not isinstance(mask, Mask):
        raise TypeError(f"a mask of its own, {type(mask).__name__}")
    return held.attend(queries, scale, None if mask is None else mask.window, sinks)


def attend(
    run: Run,
    queries: mx.array,
    form: Form,
    stored: Parts,
    capacity: int,
    *,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
    decoded_numbers: int = DECODED_NUMBERS,
) -> mx.array:
    """Queries [b, H, T, D] of a run over what is stored, [b, K, extent, width] a part → [b, H, T, D]."""
    num_tokens = queries.shape[2]
    is_packed = isinstance(form.keys, AffineCodec) and num_tokens <= FEW_TOKENS and _has_packed_product()
    mask: mx.array | str | None
    if run.sees_all(window, capacity) and (num_tokens == 1 or not is_packed):
        mask = None if num_tokens == 1 else "causal"
    else:
        mask = run.mask(window, capacity)
    if is_packed:
        return _multiplied(queries, form, stored, scale=scale, mask=mask, sinks=sinks)
    if isinstance(form.keys, PlainCodec) and num_tokens == 1 and not _has_fused_kernel():
        return _multiplied(queries, form, stored, scale=scale, mask=mask, sinks=sinks)
    if isinstance(form.keys, PlainCodec):
        return mx.fast.scaled_dot_product_attention(
            queries, stored[0], stored[1], scale=scale, mask=mask, sinks=sinks
        )
    outputs = []
    step = max(1, decoded_numbers // (stored[0].shape[1] * stored[0].shape[2] * queries.shape[3]))
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        part = mask[block] if isinstance(mask, mx.array) else mask
        outputs.append(
            _decoded(
                queries[block], form, [each[block] for each in stored], scale=scale, mask=part, sinks=sinks
            )
        )
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


@cache
def _has_fused_kernel() -> bool:
    """MLX's own attention takes grouped queries apart on CPU and reads keys and values once for each."""
    return device.backend() != "cpu"


@cache
def _has_packed_product() -> bool:
    """MLX's CUDA kernels multiply packed weights only, of whole tiles: keys and values of some length are refused."""
    return device.backend() != "cuda"


def _decoded(
    queries: mx.array,
    form: Form,
    stored: Parts,
    *,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention by the fused kernel, over keys and values that are decoded for it."""
    if isinstance(form.keys, AffineCodec):
        return mx.fast.scaled_dot_product_attention(
            queries, *form.decode(stored), scale=scale, mask=mask, sinks=sinks
        )
    # Turned vectors have the angles they had, so neither keys nor values are turned back: their sum is.
    keys, values = form.split(stored)
    assert isinstance(form.keys, TurnedCodec)
    assert isinstance(form.values, TurnedCodec)
    out = mx.fast.scaled_dot_product_attention(
        form.keys.turn(queries),
        form.keys.decode_turned(keys),
        form.values.decode_turned(values),
        scale=scale,
        mask=mask,
        sinks=None if sinks is None else sinks.astype(mx.float32),
    )
    return form.values.turn_back(out).astype(queries.dtype)


def _multiplied(
    queries: mx.array,
    form: Form,
    stored: Parts,
    *,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None,
) -> mx.array:
    """Attention by products with keys and values as they are stored. Grouped queries are rows of one product, so
    nothing is broadcast or read twice, and no mask can meet the wrong axis."""
    keys, values = form.split(stored)
    rows, heads, num_tokens, _ = queries.shape
    kv_heads, extent = keys[0].shape[1], keys[0].shape[2]
    repeats = heads // kv_heads
    folded = (queries * scale).reshape(rows, kv_heads, repeats * num_tokens, -1)
    scores = _product(folded, form.keys, keys, transpose=True)
    scores = scores.reshape(rows, kv_heads, repeats, num_tokens, extent)
    if isinstance(mask, mx.array):
        scores = mx.where(mask[:, :, None], scores, mx.finfo(scores.dtype).min)
    if sinks is not None:
        column = mx.broadcast_to(
            sinks.astype(scores.dtype).reshape(1, kv_heads, repeats, 1, 1), (*scores.shape[:-1], 1)
        )
        weights = mx.softmax(mx.concatenate([column, scores], axis=-1), axis=-1, precise=True)[..., 1:]
    else:
        weights = mx.softmax(scores, axis=-1, precise=True)
    weights = weights.reshape(rows, kv_heads, repeats * num_tokens, extent)
    out = _product(weights, form.values, values, transpose=False)
    return out.reshape(rows, heads, num_tokens, -1)


def _product(left: mx.array, codec: Codec, parts: Parts, *, transpose: bool) -> mx.array:
    """left @ what is stored, or its transpose."""
    if isinstance(codec, AffineCodec):
        return mx.quantized_matmul(
            left,
            parts[0],
            parts[1],
            parts[2],
            transpose=transpose,
            group_size=codec.group_size,
            bits=codec.bits,
        )
    return left @ (parts[0].swapaxes(-1, -2) if transpose else parts[0])
