"""Several documents in one row: masks that keep them apart, handed to a family's own code as its cache.

A network and the document of each token go in; out come objects with mlx-lm's cache contract that store nothing.
Positions do not restart: rotary embeddings turn queries and keys by the difference of their positions alone, which
is the same wherever a document stands. `packing_problem` finds the families where that, or anything else, is not so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from serve import device
from serve.errors import ModelError
from serve.model.network import Network, evaluating
from serve.model.past import is_full, is_list, is_window, parts_of, window_of

PROBE_ROWS = 11
"""No family has 11 heads, so a mask of the wrong rank cannot broadcast by accident."""
PROBE_LENGTHS = (5, 3, 7)
PROBE_POSITIONS = 4096


class SegmentMasks:
    """Who sees whom in packed rows: a token sees its own document, up to itself, and all of its block.

    segments  [B, T] int32; documents are contiguous, padding is a document of its own
    blocks    [B, T] int32, tokens of one number see one another; below 0: in no block; None: nobody is
    """

    def __init__(self, segments: mx.array, blocks: mx.array | None = None) -> None:
        self._segments = segments
        self._blocks = blocks
        self._masks: dict[int | None, mx.array] = {}

    def mask(self, window: int | None) -> mx.array:
        """[B, 1, T, T] bool; at most `window` tokens back, itself counted."""
        if window not in self._masks:
            places = mx.arange(self._segments.shape[1], dtype=mx.int32)
            queries, keys = places[:, None], places[None]
            same = self._segments[:, :, None] == self._segments[:, None, :]
            mask = (keys <= queries) & same  # [B, T, T]
            if self._blocks is not None:
                rows, columns = self._blocks[:, :, None], self._blocks[:, None, :]
                mask = mask | ((rows == columns) & (rows >= 0))
            if window is not None:
                mask = mask & (keys > queries - window)
            self._masks[window] = mask[:, None]
        return self._masks[window]


class PackedLayer:
    """One layer's cache, as mlx-lm's models call it: it keeps nothing and masks by document."""

    def __init__(self, masks: SegmentMasks, window: int | None, num_head_axes: int, offset: int) -> None:
        self.offset = offset
        """Position of the first token of a row."""
        self._masks = masks
        self._window = window
        self._num_head_axes = num_head_axes

    @property
    def state(self) -> list[mx.array]:
        return []

    def make_mask(
        self, num_tokens: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """[B, 1, T, T], with a further axis where the family's scores have one; always an array."""
        mask = self._masks.mask(window_size if window_size is not None else self._window)
        return mask if self._num_head_axes == 1 else mask[:, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The row's own keys and values are all there are."""
        return keys, values


class PackedParts:
    """A layer with several caches (mlx-lm's CacheList): each part is a PackedLayer."""

    def __init__(self, parts: Sequence[PackedLayer]) -> None:
        self._parts = list(parts)

    def __getitem__(self, index: int) -> PackedLayer:
        return self._parts[index]

    @property
    def state(self) -> list[mx.array]:
        return []


def packed_cache(network: Network, segments: mx.array, blocks: mx.array | None = None) -> list[Any]:
    """What `network.hidden(tokens, cache=…)` takes to run packed rows.

    segments  [B, T] int32, the document a token belongs to, contiguous within its row; -1 is padding
    blocks    [B, T] int32, tokens of one number, of one document, see one another both ways; -1 is in no block
    Returns one object a layer, good for one forward. ModelError where a layer's past is no keys and values.
    """
    return _cache(network, segments, mask_axes(network), 0, blocks)


def mask_axes(network: Network) -> int:
    """Axes the family's scores have between rows and tokens: 1, or 2 where grouped heads stand apart (gemma2).

    Found once a network by building a forward, which is never evaluated. ModelError if neither fits.
    """
    if network.num_head_axes is None:
        tokens = mx.ones((PROBE_ROWS, 2), dtype=mx.int32)
        segments = mx.zeros((PROBE_ROWS, 2), dtype=mx.int32)
        problem: Exception | None = None
        for axes in (1, 2):
            try:
                with evaluating(network):
                    network.hidden(tokens, cache=_cache(network, segments, axes, 0))
            except ValueError as error:  # the mask does not broadcast over this family's scores
                problem = error
            else:
                network.num_head_axes = axes
                break
        else:
            raise ModelError(f"{_family(network)}: packed rows cannot be masked: {problem}")
    return network.num_head_axes


def packing_problem(network: Network, num_positions: int = PROBE_POSITIONS) -> str | None:
    """Why rows of several documents would not give each document what it gets alone; None if they do.

    Nothing is known of families: a few tokens run packed and alone, and far from and at the beginning of a row.
    num_positions  longest packed row; a family may change what it does with later positions
    """
    stored = _stateful_layer(network)
    if stored is not None:
        return stored
    with evaluating(network):
        try:
            return _found_unequal(network, _probe_documents(network), num_positions)
        except (AttributeError, IndexError, ModelError, TypeError, ValueError) as error:
            # The family's own code asks its cache for something that only its own kind of cache has.
            return f"its code needs more of a cache than keys, values and a mask: {error}"


def _found_unequal(network: Network, documents: list[np.ndarray], num_positions: int) -> str | None:
    alone = [network.hidden(mx.array(document[None]))[0] for document in documents]  # [T, D] each
    shift = max(num_positions - max(PROBE_LENGTHS), 1)
    for offset in (max(PROBE_LENGTHS), shift):
        moved = [_hidden_at(network, document, offset) for document in documents]
        error = _difference(alone, moved)
        if error > _tolerance(alone[0].dtype, offset):
            return (
                f"what it computes for a document depends on the position the document begins at: "
                f"beginning at {offset:,}, hidden states differ by {error:.1%}"
            )
    tokens = mx.array(np.concatenate(documents)[None])
    segments = mx.array(np.repeat(np.arange(len(documents)), PROBE_LENGTHS)[None].astype(np.int32))
    packed = network.hidden(tokens, cache=packed_cache(network, segments))[0]
    ends = np.cumsum(PROBE_LENGTHS)
    parts = [packed[end - length : end] for end, length in zip(ends.tolist(), PROBE_LENGTHS, strict=True)]
    error = _difference(alone, parts)
    if error > _tolerance(alone[0].dtype, int(ends[-1])):
        return f"documents in one row change each other: hidden states differ by {error:.1%}"
    return None


def _hidden_at(network: Network, document: np.ndarray, offset: int) -> mx.array:
    segments = mx.zeros((1, len(document)), dtype=mx.int32)
    cache = _cache(network, segments, mask_axes(network), offset)
    return network.hidden(mx.array(document[None]), cache=cache)[0]


def _difference(alone: list[mx.array], other: list[mx.array]) -> float:
    """The largest relative distance of a token's hidden state; in half precision the median one.

    Rounding may route a token of a half-precision MoE to another expert; crossing documents changes most tokens.
    """
    one = mx.concatenate(alone).astype(mx.float32)
    two = mx.concatenate(other).astype(mx.float32)
    distance = mx.linalg.norm(one - two, axis=-1) / mx.maximum(mx.linalg.norm(one, axis=-1), 1e-9)
    values = np.array(distance)
    if not np.isfinite(values).all():
        return float("inf")
    return float(values.max() if device.multiplies_in_single(alone[0].dtype) else np.median(values))


def _tolerance(dtype: mx.Dtype, position: int) -> float:
    """Rounding grows with the angle a position is turned by: float32 keeps 24 bits of it."""
    return (2e-3 if device.multiplies_in_single(dtype) else 5e-2) + position * 2.0**-22


def _cache(
    network: Network, segments: mx.array, num_head_axes: int, offset: int, blocks: mx.array | None = None
) -> list[Any]:
    stored = _stateful_layer(network)
    if stored is not None:
        raise ModelError(f"{_family(network)}: {stored}")
    masks = SegmentMasks(segments, blocks)
    layers: list[Any] = []
    for own in network.make_cache():
        parts = [PackedLayer(masks, window_of(part), num_head_axes, offset) for part in parts_of(own)]
        layers.append(PackedParts(parts) if is_list(own) else parts[0])
    return layers


def _stateful_layer(network: Network) -> str | None:
    """The first layer whose past is more than keys and values, in words."""
    for index, own in enumerate(network.make_cache()):
        for part in parts_of(own):
            if not (is_full(part) or is_window(part)):
                return (
                    f"layer {index} keeps its past as {type(part).__name__}, not as keys and values that a mask can "
                    f"hide: recurrent or chunked state runs on from one document into the next"
                )
    return None


def _probe_documents(network: Network) -> list[np.ndarray]:
    num_tokens = (
        network.vocab_size or network.logits(network.hidden(mx.zeros((1, 2), dtype=mx.int32))).shape[-1]
    )
    rng = np.random.default_rng(0)
    return [rng.integers(0, num_tokens, length) for length in PROBE_LENGTHS]


def _family(network: Network) -> str:
    return type(network.module).__module__
