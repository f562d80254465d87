"""Logits and what changes them → the logits that tokens are drawn from. No loop over what is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from serve.engine.edits import LogitsChange
from serve.engine.penalties import TokenChanges

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")  # [256, 8]
_BARS = np.where(_BITS, np.float32(0), np.float32(-np.inf))
"""[256, 8] by a mask's byte, what is added to its tokens' logits: a choice by random bits takes a CPU four times as
long."""


def edited(logits: mx.array, changes: Mapping[int, LogitsChange]) -> mx.array:
    """Logits [N, V], those of some rows changed, in single precision; the very array where there are no changes.

    changes  by row; the others' numbers stay what they are
    """
    if not changes:
        return logits
    logits = logits.astype(mx.float32)
    of_tokens = {row: change.tokens for row, change in changes.items() if change.tokens is not None}
    masks = {row: change.allowed for row, change in changes.items() if change.allowed is not None}
    forced = {row: change.forced for row, change in changes.items() if change.forced is not None}
    if of_tokens:
        logits = _with_tokens(logits, list(of_tokens), list(of_tokens.values()))
    if masks:
        bars = _unpacked(np.stack(list(masks.values())), logits.shape[1])  # [M, V]
        logits = _with_rows(logits, list(masks), _of_rows(logits, list(masks)) + bars)
    if forced:
        is_it = mx.arange(logits.shape[1])[None] == mx.array(list(forced.values()))[:, None]  # [M, V]
        logits = _with_rows(logits, list(forced), mx.where(is_it, 0.0, -mx.inf))
    return logits


def _with_tokens(logits: mx.array, rows: Sequence[int], changes: Sequence[TokenChanges]) -> mx.array:
    size = logits.shape[1]
    places = np.concatenate(
        [change.token_ids + row * size for row, change in zip(rows, changes, strict=True)]
    )
    biases, factors, offsets = (
        mx.array(np.concatenate(part)) for part in list(zip(*changes, strict=True))[1:]
    )  # [K] each
    flat, at = logits.reshape(-1), mx.array(places.astype(np.int32 if logits.size < 2**31 else np.int64))
    values = flat[at] + biases
    values = mx.where(values > 0, values / factors, values * factors) - offsets
    return mx.put_along_axis(flat, at, values, axis=0).reshape(logits.shape)


def _of_rows(logits: mx.array, rows: Sequence[int]) -> mx.array:
    return logits if _are_all(logits, rows) else logits[mx.array(list(rows))]


def _with_rows(logits: mx.array, rows: Sequence[int], values: mx.array) -> mx.array:
    """Logits whose rows `rows` are `values` [M, V]; a gather of whole rows, ten times as fast as writing them."""
    if _are_all(logits, rows):
        return values
    index = np.arange(len(logits), dtype=np.int32)
    index[list(rows)] = len(logits) + np.arange(len(rows))
    return mx.concatenate([logits, values])[mx.array(index)]


def _are_all(logits: mx.array, rows: Sequence[int]) -> bool:
    return list(rows) == list(range(len(logits)))


def _unpacked(packed: np.ndarray, size: int) -> mx.array:
    """[M, V] float32 of words [M, ceil(V / 32)]: 0 where a token may come, and -inf elsewhere."""
    words = mx.array(np.ascontiguousarray(packed, dtype="<u4").view(np.uint8))  # [M, 4 · ceil(V / 32)]
    bars = mx.array(_BARS)[words]  # [M, 4 · ceil(V / 32), 8]
    return bars.reshape(len(packed), -1)[:, :size]
