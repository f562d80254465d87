"""What rows a family needs: a network in; its rows, what they cost, and proof that they hold its past, out.

Families are told apart by what they do, not by name: by the cache that their own code makes for them, by what
stands in it after a few tokens, and by comparing a small batch with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import is_dataclass
from itertools import combinations
from types import FunctionType, NoneType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import CacheList

from serve import device
from serve.cache.attention import install
from serve.cache.capacity import Bucket, LayerShape, Move, Place, RowCost, ring_capacity
from serve.cache.layers import LayerRows
from serve.cache.precision import PLAIN
from serve.cache.rows import BatchRows
from serve.cache.spans import Span, SpanPart
from serve.cache.states import StateRows
from serve.errors import ModelError
from serve.model.network import Network, evaluating
from serve.model.past import is_full, is_list, is_state, is_window, parts_of, window_of

SAMPLE_TOKENS = 48
"""Tokens that shapes, and the sizes of channels, are measured on."""
HISTORY_CHUNKS = ((3, 2), (3, 2, 1), (4,))
"""Tokens a forward of three histories, before the last ones that they share."""
SHARED_TOKENS = (4, 3, 7)
CODE_ERRORS = (AttributeError, IndexError, TypeError, ValueError)
"""What a family's code raises on a cache that is not what it expects."""
MAX_ERROR_SHARE = 0.01
"""How far a row may be from its own cache, as a share of what tells two histories apart."""
MAX_ERROR_SHARE_HALF = 0.1
"""The same in half precision and in TF32, where another batch shape rounds otherwise."""
Mode = tuple[bool, int]
"""What the layers of a family need: (plain arrays, axes of its scores before the tokens)."""
MODES: tuple[Mode, ...] = ((False, 1), (True, 1), (True, 2))
"""Best first."""
MAX_PROVEN = 32
PLAIN_VALUES = (bool, int, float, str, bytes, NoneType)
_proven: OrderedDict[Hashable, Mode] = OrderedDict()
"""By build what it needs, of the last MAX_PROVEN: a proof is of code, and that of a model that comes again, or of the
next one of its family and sizes, is the same. (Weights that are no numbers are refused at load.)"""


def make_rows(network: Network, *, prefill_chunk_tokens: int) -> BatchRows:
    """Empty rows for every layer, by what the family's own cache is and what it holds after a few tokens.

    Raises ModelError where a layer's past cannot be held as rows, with the reason. `prove` must follow.
    """
    own = network.make_cache()
    for index, cache in enumerate(own):
        if not _can_be_rows(cache):
            raise ModelError(
                f"{_family(network)}: layer {index} keeps its past in a {_described(cache)}, which cannot be held "
                f"as rows: key-value caches, sliding windows and recurrent state can"
            )
    with evaluating(network):
        mx.eval(network.hidden(mx.array([_sample(network.vocab_size)]), cache=own))
    install(network.module)
    parts = [part for cache in own for part in parts_of(cache)]
    num_full = sum(is_full(part) and not part.empty() for part in parts)
    layers: list[LayerRows | StateRows] = []
    depth = num_full
    for part in parts:
        if is_state(part):
            layers.append(StateRows(len(part.cache)))
            continue
        depth -= is_full(part) and not part.empty()
        layers.append(_layer_rows(part, depth, prefill_chunk_tokens))
    rows = iter(layers)
    caches = [
        CacheList(*(next(rows) for _ in cache.caches)) if is_list(cache) else next(rows) for cache in own
    ]
    states = [array for part in parts if is_state(part) for array in part.cache if array is not None]
    cost = RowCost(
        tuple(layer.shape for layer in layers if isinstance(layer, LayerRows) and layer.is_used),
        state_bytes=2 * sum(array.nbytes for array in states),
        prefill_chunk_tokens=prefill_chunk_tokens,
    )
    return BatchRows(caches, layers, cost, lambda rows: _prove(network, rows))


def _can_be_rows(cache: Any) -> bool:
    # Key-value caches alone in a list are those of sparse attention, whose choice of keys a short proof cannot reach.
    if is_list(cache) and any(is_state(part) for part in parts_of(cache)):
        return all(_can_be_rows(part) for part in parts_of(cache))
    return is_full(cache) or is_window(cache) or is_state(cache)


def _layer_rows(cache: Any, depth: int, prefill_chunk_tokens: int) -> LayerRows:
    if cache.empty():
        return LayerRows(None)
    keys, values = cache.keys[..., : cache.offset, :], cache.values[..., : cache.offset, :]
    window = window_of(cache)
    shape = LayerShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype.size, window, depth)
    sizes = tuple(np.asarray(mx.abs(part.astype(mx.float32)).mean(axis=(0, 1, 2))) for part in (keys, values))
    return LayerRows(
        shape, keys.dtype, ring=ring_capacity(window, prefill_chunk_tokens), sizes=(sizes[0], sizes[1])
    )


def _described(cache: Any) -> str:
    parts = ", ".join(type(part).__name__ for part in getattr(cache, "caches", ()))
    return f"{type(cache).__name__} of {parts}" if parts else type(cache).__name__


def _sample(vocab_size: int) -> list[int]:
    """Ids that every run measures on, all over the vocabulary."""
    return [1 + 7919 * index % max(vocab_size - 1, 1) for index in range(SAMPLE_TOKENS)]


# Proof


def _prove(network: Network, rows: BatchRows) -> None:
    """Raise ModelError unless rows of such a build equal the family's own cache. Leaves the rows empty."""
    with evaluating(network):
        build = _build(network, rows)
        mode = _proven.get(build) or _needed(network, rows)
        _set(rows, mode)
        _proven[build] = mode
        while len(_proven) > MAX_PROVEN:
            _proven.popitem(last=False)


def _build(network: Network, rows: BatchRows) -> Hashable:
    """All that a family's code reads but for the numbers in its arrays: classes, settings, shapes and types."""
    modules = tuple(
        (path, type(module), tuple((name, _plain(value)) for name, value in _attributes(module)))
        for path, module in network.text.named_modules()
    )
    layers = tuple((layer.shape, layer.ring) for layer in rows.attending)
    caches = tuple(type(cache) for cache in network.make_cache())
    return modules, layers, caches, device.multiplies_in_single(network.parameters_dtype()), device.backend()


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    return [*vars(module).items(), *module.items()]


def _plain(value: Any) -> Hashable:
    """Of an attribute what can be compared."""
    if isinstance(value, PLAIN_VALUES):
        return value
    if isinstance(value, FunctionType):
        return value.__code__  # the function itself may hold its network
    if isinstance(value, mx.array):
        return value.shape, str(value.dtype)
    if isinstance(value, list | tuple):
        return type(value), tuple(map(_plain, value))
    if isinstance(value, dict) and not isinstance(value, nn.Module):  # modules stand by themselves
        return tuple((key, _plain(each)) for key, each in value.items())
    if is_dataclass(value) and not isinstance(value, type):
        return repr(value)
    return (type(value),)


def _set(rows: BatchRows, mode: Mode) -> None:
    for layer in rows.attending:
        layer.is_dense, layer.num_head_axes = mode


def _needed(network: Network, rows: BatchRows) -> Mode:
    """The first mode in which rows equal the family's own cache. ModelError where none does.

    Three histories run in one batch as requests do: beginning together and later, in two buckets, in chunks and one
    token at a time, in any order, some rows waiting, rows changing places. Then all take the same tokens, so what
    comes out differs by what their rows hold alone; each must be its own cache's.
    """
    problems = []
    for mode in MODES if rows.attending else MODES[:1]:
        _set(rows, mode)
        problem = _problem(network, rows)
        if problem is None:
            return mode
        problems.append(problem)
    # What was computed says more than what was refused: a mask of the wrong rank, an object in place of an array.
    reason = next((text for text, is_number in problems if is_number), problems[-1][0])
    raise ModelError(f"{_family(network)}: its rows cannot be batched: {reason}")


def _problem(network: Network, rows: BatchRows) -> tuple[str, bool] | None:
    """What is wrong with the rows, and whether it is about numbers."""
    try:
        found = _in_company(network, rows)
    except CODE_ERRORS as error:
        return str(error), False
    finally:
        rows.clear()
    alone = mx.stack([_alone(network, index) for index in range(len(HISTORY_CHUNKS))])
    share = MAX_ERROR_SHARE if device.multiplies_in_single(alone.dtype) else MAX_ERROR_SHARE_HALF
    apart = min(_size(alone[a] - alone[b]) for a, b in combinations(range(len(HISTORY_CHUNKS)), 2))
    allowed = share * apart + 8 * device.product_eps(alone.dtype) * _size(alone)
    away = max(_size(row) for row in found - alone)
    if away <= allowed:  # NaN is not
        return None
    return (
        f"a row in company comes out {away:.3g} away from the same row alone in the family's own cache; at most "
        f"{allowed:.3g} was expected, where two histories are {apart:.3g} apart"
    ), True


def _in_company(network: Network, rows: BatchRows) -> mx.array:
    """[3, D]: the last hidden states of the histories, from one batch."""
    first, second, third = (_tokens(network, index) for index in range(len(HISTORY_CHUNKS)))
    short, long = Bucket(PLAIN, 16), Bucket(PLAIN, 24)
    run = _runner(network, rows)
    rows.resize({short: 2, long: 1})
    run([(short, [0, 1], [0, 0])], [first[:3], second[:3]], [0, 1], 2)
    run([(long, [0], [0])], [third], [2], 3)
    run([(short, [1], [3]), (short, [0], [3])], [second[3:5], first[3:]], [1, 0], 3)
    rows.resize({short: 2, long: 2})
    rows.move(
        [Move(Place(short, 0), Place(long, 1), 5), Move(Place(short, 1), Place(short, 0), 5)],
        [(0, 2), (2, 0)],
    )
    rows.resize({short: 1, long: 2})
    run([(short, [0], [5])], [second[5:]], [1], 3)
    batch = [(short, [0], [6]), (long, [0, 1], [4, 5])]  # second, third, first
    run(batch, [[SHARED_TOKENS[0]]] * 3, [1, 0, 2], 3)
    rows.move([], [(0, 1), (1, 0)])
    span = _span(
        [(bucket, where, [start + 1 for start in starts]) for bucket, where, starts in batch], 1, [0, 1, 2], 3
    )
    hidden = _forward(network, rows, span, [[SHARED_TOKENS[1]]] * 3)
    for token in SHARED_TOKENS[2:]:
        span = span.next()
        hidden = _forward(network, rows, span, [[token]] * 3)
    return mx.stack([hidden[2, -1], hidden[0, -1], hidden[1, -1]])


Parts = Sequence[tuple[Bucket, list[int], list[int]]]
"""(bucket, rows, starts)"""


def _runner(
    network: Network, rows: BatchRows
) -> Callable[[Parts, list[list[int]], list[int], int], mx.array]:
    def run(parts: Parts, tokens: list[list[int]], state_rows: list[int], num_state_rows: int) -> mx.array:
        return _forward(network, rows, _span(parts, len(tokens[0]), state_rows, num_state_rows), tokens)

    return run


def _span(parts: Parts, num_tokens: int, state_rows: list[int], num_state_rows: int) -> Span:
    return Span(
        [
            SpanPart(bucket, where, starts, [start == 0 for start in starts])
            for bucket, where, starts in parts
        ],
        num_tokens,
        state_rows,
        num_state_rows,
    )


def _forward(network: Network, rows: BatchRows, span: Span, tokens: list[list[int]]) -> mx.array:
    rows.set_span(span)
    hidden = network.hidden(mx.array(tokens), cache=rows.caches)
    mx.eval(hidden, rows.arrays())
    return hidden


def _alone(network: Network, index: int) -> mx.array:
    """[D]: the last hidden state of one history, from the family's own cache, in the same chunks."""
    cache = network.make_cache()
    tokens = mx.array([[*_tokens(network, index), *SHARED_TOKENS]])
    start = 0
    for width in (*HISTORY_CHUNKS[index], *(1 for _ in SHARED_TOKENS)):
        hidden = network.hidden(tokens[:, start : start + width], cache=cache)
        start += width
    return hidden[0, -1]


def _tokens(network: Network, index: int) -> list[int]:
    """A history of its own: small token ids, which every vocabulary has."""
    first = 10 * (index + 1)
    return [token % network.vocab_size for token in range(first, first + sum(HISTORY_CHUNKS[index]))]


def _size(values: mx.array) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values.astype(mx.float32))))))


def _family(network: Network) -> str:
    return type(network.module).__module__
