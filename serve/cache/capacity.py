"""How much memory a batch's rows take: keys and values by rows and positions, recurrent state by rows.

Integers only: the scheduler plans with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from serve.cache.precision import KvPrecision

POSITION_BLOCK = 256
MAX_POSITIONS = 2**31 - 1
"""What a position's int32 can hold."""


def rows_capacity(count: int) -> int:
    """Rows a buffer holds for `count` used ones: powers of two."""
    return 1 << (count - 1).bit_length()


def positions_capacity(extent: int) -> int:
    """Positions a buffer holds for `extent` used ones: blocks of 256, eighths of a power of two past 2048."""
    if extent <= 8 * POSITION_BLOCK:
        return -(-extent // POSITION_BLOCK) * POSITION_BLOCK
    block = 1 << ((extent - 1).bit_length() - 3)
    return -(-extent // block) * block


class Bucket(NamedTuple):
    """Rows that share buffers: one precision, one capacity of positions."""

    precision: KvPrecision
    """As `KvPrecision.at` gives it."""
    num_positions: int
    """A value of `bucket_positions`."""


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
class RowCost:
    """Bytes of one row, over all layers."""

    position_bytes: int
    """Keys and values of one position; 0 where no layer attends."""
    state_bytes: int = 0
    """Recurrent state, old and new, since a step replaces it; the same at any length, 0 where no layer keeps any."""

    def batch_bytes(self, num_rows: int, longest: int) -> int:
        """Memory of `num_rows` rows, the longest of them `longest` positions. States have no spare rows."""
        positions = rows_capacity(num_rows) * positions_capacity(longest)
        return positions * self.position_bytes + num_rows * self.state_bytes

    def max_positions(self, max_bytes: int) -> int:
        """The longest row that has room in `max_bytes` by itself; 0 if none has."""
        if self.batch_bytes(1, 1) > max_bytes:
            return 0
        low, high = 1, MAX_POSITIONS
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.batch_bytes(1, middle) <= max_bytes else (low, middle - 1)
        return low
