"""How much KV memory a batch takes, in rows and positions. Integers only: the scheduler plans with it."""

from __future__ import annotations

POSITION_BLOCK = 256


def rows_capacity(count: int) -> int:
    """Rows a buffer holds for `count` used ones: powers of two."""
    return 1 << (count - 1).bit_length()


def positions_capacity(extent: int) -> int:
    """Positions a buffer holds for `extent` used ones: blocks of 256, eighths of a power of two past 2048."""
    if extent <= 8 * POSITION_BLOCK:
        return -(-extent // POSITION_BLOCK) * POSITION_BLOCK
    block = 1 << ((extent - 1).bit_length() - 3)
    return -(-extent // block) * block
