"""Arrays that are made beside a running engine, on another thread: evaluated so that its steps do not wait for them.

On a CPU MLX hands operations over in tasks of ten, lets ten tasks be under way in the whole process, and has whoever
hands over more wait until one of them has ended. Hundreds of operations on hundreds of megabytes, evaluated together,
hold up each operation of the engine's step by one of theirs. A few at a time never are so many tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from serve import device

PIECE_BYTES = 4 << 20
"""A millisecond or two of one core. What is smaller altogether is evaluated together, which costs it less."""


def pieces(arrays: Iterable[mx.array]) -> Iterator[list[mx.array]]:
    """The arrays, a few of them at a time: of so many bytes, or one."""
    piece: list[mx.array] = []
    num_bytes = 0
    for array in arrays:
        if piece and num_bytes + array.nbytes > PIECE_BYTES:
            yield piece
            piece, num_bytes = [], 0
        piece.append(array)
        num_bytes += array.nbytes
    if piece:
        yield piece


def evaluate(tree: Any) -> None:
    """As mx.eval of dicts and lists of arrays, on a CPU piece by piece."""
    if device.backend() != "cpu":
        mx.eval(tree)
        return
    for piece in pieces(leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)):
        mx.eval(piece)
