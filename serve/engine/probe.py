"""What rows a family needs: a network in; its rows, what they cost, and proof that they hold its past, out.

Families are told apart by what they do, not by name: by the cache mlx-lm makes for them, by the shape their scores
take a mask in, and, where a layer keeps recurrent state, by comparing a small batch with that cache.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache, make_prompt_cache

from serve.cache.capacity import RowCost
from serve.cache.rows import BatchRows, LayerRows, Rows, Span
from serve.cache.states import StateRows
from serve.errors import ModelError
from serve.model.network import TextNetwork

PROBE_ROWS = 11  # no family has 11 heads, so a mask of the wrong rank cannot broadcast by accident
HISTORY_CHUNKS = ((3, 2), (3, 2, 1), (4,))
"""Tokens a forward of three histories, before the last ones that they share."""
SHARED_TOKENS = (4, 3)
CODE_ERRORS = (AttributeError, IndexError, TypeError, ValueError)
"""What a family's code raises on a cache that is not what it expects."""
MAX_ERROR_SHARE = 0.01
"""How far a row may be from its own cache, as a share of what tells two histories apart."""
MAX_ERROR_SHARE_HALF = 0.1
"""The same in half precision, where another batch shape rounds otherwise."""


def make_rows(network: TextNetwork) -> BatchRows:
    """Rows for every layer, by what the family's own cache is. Sliding windows are kept whole and masked.

    Raises ModelError where a layer's past cannot be held as rows, with the reason.
    """
    layers: list[Rows] = []
    caches: list[Any] = []
    for index, cache in enumerate(make_prompt_cache(network.module)):
        rows = _rows(cache)
        if rows is None:
            raise ModelError(
                f"{_family(network)}: layer {index} keeps its past in a {_described(cache)}, which cannot be held "
                f"as rows: key-value caches, sliding windows and recurrent state can"
            )
        caches.append(rows)
        layers.extend(rows.caches if isinstance(rows, CacheList) else [rows])
    return BatchRows(caches, layers)


def measure(network: TextNetwork, rows: BatchRows) -> RowCost:
    """Run a few rows once, to learn how the family takes a mask and what a row costs. Leaves the rows empty."""
    tokens = mx.ones((PROBE_ROWS, 1), dtype=mx.int32)
    attending = [layer for layer in rows.layers if isinstance(layer, LayerRows)]
    for num_head_axes in (1, 2):
        for layer in attending:
            layer.num_head_axes = num_head_axes
        rows.set_span(Span(range(PROBE_ROWS), range(PROBE_ROWS), 1, num_rows=PROBE_ROWS))
        try:
            network.hidden(tokens, cache=rows.caches)
            break
        except (
            CODE_ERRORS
        ) as error:  # most often the mask, which does not broadcast over this family's scores
            problem = error
    else:
        raise ModelError(f"{_family(network)}: its rows cannot be batched: {problem}")
    mx.eval(rows.arrays())
    buffers = [buffer for layer in attending for buffer in layer.state]
    states = [array for layer in rows.layers if isinstance(layer, StateRows) for array in layer.state]
    rows.clear()
    return RowCost(
        position_bytes=sum(buffer.nbytes // (buffer.shape[0] * buffer.shape[2]) for buffer in buffers),
        state_bytes=2 * sum(array.nbytes // array.shape[0] for array in states),
    )


def prove(network: TextNetwork, rows: BatchRows) -> None:
    """Raise ModelError unless rows of recurrent state equal the family's own cache. Leaves the rows empty.

    Three histories run in one batch as requests do: beginning together and later, in chunks and one token at a
    time, in any order, some rows waiting, rows changing indices. Then all take the same tokens, so what comes out
    differs by what their rows hold alone; each must be its own cache's.
    """
    try:
        found = _in_company(network, rows)
    except CODE_ERRORS as error:
        raise ModelError(f"{_family(network)}: its recurrent state cannot be batched: {error}") from error
    finally:
        rows.clear()
    alone = mx.stack([_alone(network, index) for index in range(len(HISTORY_CHUNKS))])
    share = MAX_ERROR_SHARE if alone.dtype == mx.float32 else MAX_ERROR_SHARE_HALF
    apart = min(_size(alone[a] - alone[b]) for a, b in combinations(range(len(HISTORY_CHUNKS)), 2))
    allowed = share * apart + 8 * mx.finfo(alone.dtype).eps * _size(alone)
    away = max(_size(row) for row in found - alone)
    if not away <= allowed:  # NaN is not
        raise ModelError(
            f"{_family(network)}: its recurrent state cannot be batched: a row in company comes out {away:.3g} "
            f"away from the same row alone in the family's own cache; at most {allowed:.3g} was expected, where "
            f"two histories are {apart:.3g} apart"
        )


def _rows(cache: Any) -> LayerRows | StateRows | CacheList | None:
    if type(cache) is KVCache:
        return LayerRows()
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return LayerRows(window=cache.max_size)
    if type(cache) is ArraysCache:
        return StateRows(len(cache.cache))
    # Key-value caches alone in a list are those of sparse attention, whose choice of keys a short proof cannot reach.
    if type(cache) is CacheList and any(type(part) is ArraysCache for part in cache.caches):
        parts = [_rows(part) for part in cache.caches]
        return None if None in parts else CacheList(*parts)
    return None


def _described(cache: Any) -> str:
    parts = ", ".join(type(part).__name__ for part in getattr(cache, "caches", ()))
    return f"{type(cache).__name__} of {parts}" if parts else type(cache).__name__


def _in_company(network: TextNetwork, rows: BatchRows) -> mx.array:
    """[3, D]: the last hidden states of the histories, from one batch."""
    first, second, third = (_tokens(index) for index in range(len(HISTORY_CHUNKS)))
    _run(network, rows, [0, 1], [0, 0], [first[:3], second[:3]], num_rows=2)
    _run(network, rows, [2], [0], [third], num_rows=3)
    _run(network, rows, [1, 0], [3, 3], [second[3:5], first[3:]], num_rows=3)
    rows.move([(0, 2), (2, 0)])
    _run(network, rows, [1], [5], [second[5:]], num_rows=3)
    for step, token in enumerate(SHARED_TOKENS):
        hidden = _run(
            network, rows, [0, 1, 2], [4 + step, 6 + step, 5 + step], [[token]] * 3, num_rows=3
        )  # [3, 1, D]
    return hidden[::-1, -1]


def _run(
    network: TextNetwork,
    rows: BatchRows,
    indices: list[int],
    starts: list[int],
    tokens: list[list[int]],
    *,
    num_rows: int,
) -> mx.array:
    new_rows = [index for index, start in zip(indices, starts, strict=True) if start == 0]
    rows.set_span(Span(indices, starts, len(tokens[0]), num_rows=num_rows, new_rows=new_rows))
    hidden = network.hidden(mx.array(tokens), cache=rows.caches)
    mx.eval(hidden, rows.arrays())
    return hidden


def _alone(network: TextNetwork, index: int) -> mx.array:
    """[D]: the last hidden state of one history, from the family's own cache, in the same chunks."""
    cache = make_prompt_cache(network.module)
    tokens = mx.array([[*_tokens(index), *SHARED_TOKENS]])
    start = 0
    for width in (*HISTORY_CHUNKS[index], *(1 for _ in SHARED_TOKENS)):
        hidden = network.hidden(tokens[:, start : start + width], cache=cache)
        start += width
    return hidden[0, -1]


def _tokens(index: int) -> list[int]:
    """A history of its own: small token ids, which every vocabulary has."""
    return list(range(10 * (index + 1), 10 * (index + 1) + sum(HISTORY_CHUNKS[index])))


def _size(values: mx.array) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values.astype(mx.float32))))))


def _family(network: TextNetwork) -> str:
    return type(network.module).__module__
