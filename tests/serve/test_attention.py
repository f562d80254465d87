"""Attention over stored rows against plain softmax of plain arrays: masks, grouped queries, sinks, every form."""

from __future__ import annotations

from itertools import product

import pytest

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import numpy as np

from serve.cache.attention import attend
from serve.cache.capacity import Bucket
from serve.cache.codecs import Form, make_codec
from serve.cache.precision import PLAIN, KvPrecision
from serve.cache.spans import Span, SpanPart

DIM = 32
PRECISIONS = {
    "plain": PLAIN,
    "q8": KvPrecision("affine", 8, 8, group_size=32),
    "q4:8": KvPrecision("affine", 4, 8, group_size=32),
    "t3:4": KvPrecision("turbo", 3, 4),
    "t3.5": KvPrecision("turbo", 3.5, 3.5),
}


def softmax_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    positions: np.ndarray,
    *,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
) -> mx.array:
    """One row in the words of the definition: queries [H, T, D] at positions [T], keys [K, P, D]."""
    repeats = queries.shape[0] // keys.shape[0]
    out = []
    for head in range(queries.shape[0]):
        for query, position in zip(queries[head], positions.tolist(), strict=True):
            first = 0 if window is None else max(0, position - window + 1)
            seen = slice(first, position + 1)
            scores = (keys[head // repeats, seen] @ query) * scale  # [P]
            if sinks is not None:
                scores = mx.concatenate([scores, sinks[head : head + 1]])
            weights = mx.softmax(scores)[: position + 1 - first]
            out.append(weights @ values[head // repeats, seen])
    return mx.stack(out).reshape(queries.shape[0], len(positions), -1)


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize(
    ("num_rows", "num_heads", "kv_heads"),
    [(1, 4, 4), (2, 4, 2), (4, 4, 1), (3, 4, 2), (4, 8, 2)],
    ids=str,
)
def test_each_row_is_attended_as_if_alone(name, num_rows, num_heads, kv_heads):
    precision = PRECISIONS[name]
    sizes = np.arange(DIM, dtype=np.float32)
    form = Form(
        make_codec(precision, precision.key_bits, DIM, mx.float32, sizes, seed=0),
        make_codec(precision, precision.value_bits, DIM, mx.float32, sizes, seed=1),
    )
    bucket = Bucket(precision, 32)
    keys, values = (mx.random.normal((num_rows, kv_heads, 32, DIM)) for _ in range(2))
    stored = form.encode(keys, values)
    held_keys, held_values = form.decode(stored)
    for num_tokens, window, is_even, has_sinks in product(
        (1, 3, 12), (None, 5), (False, True), (False, True)
    ):
        starts = [7] * num_rows if is_even else [7 + 2 * row for row in range(num_rows)]
        span = Span([SpanPart(bucket, range(num_rows), starts, [False] * num_rows)], num_tokens)
        (run,) = span.runs
        queries = mx.random.normal((num_rows, num_heads, num_tokens, DIM))
        sinks = mx.random.normal((num_heads,)) if has_sinks else None
        found = attend(
            run,
            queries,
            form,
            [part[:, :, : run.extent(32)] for part in stored],
            32,
            scale=0.3,
            window=window,
            sinks=sinks,
        )
        for row, start in enumerate(starts):
            expected = softmax_attention(
                queries[row],
                held_keys[row],
                held_values[row],
                start + np.arange(num_tokens),
                scale=0.3,
                window=window,
                sinks=sinks,
            )
            assert mx.allclose(found[row], expected, atol=1e-5), (num_tokens, window, is_even, has_sinks)


def test_rows_that_are_decoded_a_few_at_a_time_are_attended_as_all_at_once():
    precision = PRECISIONS["t3:4"]
    form = Form(*(make_codec(precision, 4, DIM, mx.float32, None, seed=seed) for seed in (0, 1)))
    stored = form.encode(*(mx.random.normal((5, 2, 16, DIM)) for _ in range(2)))
    span = Span([SpanPart(Bucket(precision, 16), range(5), [15, 3, 9, 0, 4], [False] * 5)], 1)
    queries = mx.random.normal((5, 4, 1, DIM))
    whole, parts = (
        attend(
            span.runs[0],
            queries,
            form,
            stored,
            16,
            scale=0.1,
            window=None,
            sinks=None,
            decoded_numbers=decoded_numbers,
        )
        for decoded_numbers in (1 << 20, 2 * 2 * 16 * DIM)
    )
    assert mx.allclose(whole, parts, atol=1e-6)
    assert not mx.allclose(whole[0], whole[1], atol=1e-2)
