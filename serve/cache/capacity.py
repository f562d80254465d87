"""How much memory a batch's rows take: where rows stand, and the bytes of one, from the shapes of the layers.

Integers only: the scheduler plans with it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from serve.cache.precision import PLAIN, KvPrecision, stored_bytes

MIN_POSITIONS = 256
FINE_POSITIONS = 2048
"""Above it, capacities grow by quarters of a power of two instead of doubling."""
MAX_REMEMBERED = 4096
"""Results kept by precision: clients choose those, so there is no end of them."""
MAX_POSITIONS = 2**31 - 1
"""What a position's int32 can hold."""


def rows_capacity(count: int) -> int:
    """Rows a bucket holds for `count` used ones: 0, 1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40 …"""
    if count <= 2:
        return count
    low = 1 << ((count - 1).bit_length() - 1)  # low < count <= 2 * low
    steps = (low * 5 // 4, low * 3 // 2, low * 2) if low >= 8 else (low * 3 // 2, low * 2)
    return next(step for step in steps if step >= count and step % 2 == 0)


def positions_capacity(extent: int) -> int:
    """Positions a row's bucket has for `extent` used ones: 256, 512, 1024, 2048, then by quarters (2560, 3072 …)."""
    if extent <= MIN_POSITIONS:
        return MIN_POSITIONS
    if extent <= FINE_POSITIONS:
        return 1 << (extent - 1).bit_length()
    block = 1 << ((extent - 1).bit_length() - 3)
    return -(-extent // block) * block


class Bucket(NamedTuple):
    """Rows that share buffers: one precision, one capacity of positions."""

    precision: KvPrecision
    """As `KvPrecision.at` gives it."""
    num_positions: int
    """A value of `positions_capacity`."""


class Place(NamedTuple):
    """Where a row of keys and values stands."""

    bucket: Bucket
    row: int


class Move(NamedTuple):
    """A row goes elsewhere with its first `num_positions` positions; quantized, where the bucket is."""

    source: Place
    target: Place
    num_positions: int


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a position."""

    num_heads: int
    key_dim: int
    value_dim: int
    itemsize: int
    """Bytes of a number as the model computes it."""
    window: int | None = None
    """How far back a token sees, itself counted; None: to the start."""
    depth: int = 0
    """Which of the full-attention layers it is, from the last: 0 is the last one."""

    def capacity(self, num_positions: int, ring: int | None) -> int:
        """Positions its buffers have in a bucket of `num_positions`."""
        return num_positions if self.window is None or ring is None else min(num_positions, ring)

    def precision(self, precision: KvPrecision) -> KvPrecision:
        """In what form it keeps rows of that precision."""
        return PLAIN if self.window is not None or self.depth < precision.num_plain_layers else precision

    def position_bytes(self, precision: KvPrecision) -> int:
        """Keys and values of one position."""
        held = self.precision(precision)
        return self.num_heads * (
            stored_bytes(held, held.key_bits, self.key_dim, self.itemsize)
            + stored_bytes(held, held.value_bits, self.value_dim, self.itemsize)
        )


@dataclass(frozen=True)
class RowCost:
    """Bytes of one row, over all layers."""

    layers: Sequence[LayerShape] = ()
    """Those that attend."""
    state_bytes: int = 0
    """Recurrent state, old and new, since a step replaces it; the same at any length, 0 where no layer keeps any."""
    prefill_chunk_tokens: int = 256
    """The most tokens that one forward writes of a row: what a sliding window's buffer has room for beside it."""
    _bytes: dict[Bucket, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def has_windows(self) -> bool:
        """Some layer looks back on so many positions and no more."""
        return any(layer.window is not None for layer in self.layers)

    def row_bytes(self, bucket: Bucket) -> int:
        """Keys and values of one row of the bucket, whether it is used or not."""
        found = self._bytes.get(bucket)
        if found is None:
            found = sum(
                layer.position_bytes(bucket.precision)
                * layer.capacity(bucket.num_positions, ring_capacity(layer.window, self.prefill_chunk_tokens))
                for layer in self.layers
            )
            if len(self._bytes) >= MAX_REMEMBERED:
                self._bytes.clear()
            self._bytes[bucket] = found
        return found

    def max_positions(self, max_bytes: int, precision: KvPrecision = PLAIN) -> int:
        """The longest row that has room in `max_bytes` by itself; 0 if none has."""

        def fits(num_tokens: int) -> bool:
            bucket = Bucket(precision.at(num_tokens), positions_capacity(num_tokens))
            return self.row_bytes(bucket) + self.state_bytes <= max_bytes

        if not fits(1):
            return 0
        # A row is plain before it is quantized, so it may be too large for a while.
        bounds = [precision.start_after] if not precision.is_plain and precision.start_after else []
        for low, high in zip([0, *bounds], [*bounds, MAX_POSITIONS], strict=True):
            if not fits(high):
                return low + bisect_left(range(low + 1, high), True, key=lambda n: not fits(n))
        return MAX_POSITIONS


@lru_cache
def ring_capacity(window: int | None, prefill_chunk_tokens: int) -> int | None:
    """Positions a sliding window's buffer has at most: the window of a chunk's first token, and the chunk.

    None where there is no window.
    """
    return None if window is None else -(-(window + prefill_chunk_tokens - 1) // 64) * 64
