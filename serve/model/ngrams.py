"""A text's tokens → where the n-grams of SIZES came in it last. Plain host data.

For each size a table of positions, one a slot, and an n-gram's slot follows from its tokens. The later n-gram of a
slot takes the earlier one's place; what is found is compared with the text, so that costs a find, and no more. A text
of 32,768 tokens is indexed by a few operations of numpy, and a token more by a few of Python.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

SIZES = (2, 3, 4)
"""Tokens of an n-gram, ascending, one more each."""
_LEAST_BITS = 8
_MANY = 32
"""From so many new tokens on numpy is faster."""
_FACTOR, _SPREAD = 0x9E3779B97F4A7C55, 0xC2B2AE3D27D4EB4F
"""Odd: multiplied by them, numbers differ in their upper bits."""
_WORD = (1 << 64) - 1


def ngram_keys(tail: Sequence[int]) -> list[int]:
    """Of the n-grams that end with `tail`, one for each of SIZES that it is long enough for: 64 bits each."""
    keys: list[int] = []
    key = 0
    for size in range(1, min(len(tail), SIZES[-1]) + 1):
        key = (key * _FACTOR + tail[-size]) & _WORD
        if size >= SIZES[0]:
            keys.append(key * _SPREAD & _WORD)
    return keys


class Ngrams:
    """A text, which may grow. A negative token stands for what nobody can say: a placeholder, the end of a text."""

    def __init__(self, tokens: array[int]) -> None:
        """tokens: 64 bits each. Changed by `extend` alone from here on."""
        assert tokens.typecode == "q"
        self.tokens = tokens
        self._rebuild()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self.tokens.itemsize * len(self.tokens) + sum(table.nbytes for table in self._tables)

    def extend(self, token_ids: Iterable[int]) -> None:
        """The text goes on."""
        first = len(self.tokens)
        self.tokens.extend(token_ids)
        count = len(self.tokens)
        if 2 * count > 1 << self._bits:
            self._rebuild()
        elif count - first >= _MANY:
            self._index(first)
        else:
            longest, shift = SIZES[-1], 64 - self._bits
            for position in range(max(first, SIZES[0]), count):
                tail = self.tokens[max(position - longest, 0) : position]
                for view, key in zip(self._views, ngram_keys(tail), strict=False):
                    view[key >> shift] = position

    def find(self, size: int, key: int, tail: Sequence[int]) -> int | None:
        """Where the text went on when it last said the n-gram of that size that ends `tail`; None where it has not,
        or another has taken its slot. `key` is that n-gram's."""
        position: int = self._views[size - SIZES[0]][key >> (64 - self._bits)]
        if position < size or self.tokens[position - size : position] != array("q", tail[-size:]):
            return None
        return position

    def _rebuild(self) -> None:
        self._bits = max((2 * len(self.tokens)).bit_length(), _LEAST_BITS)
        self._tables = [np.full(1 << self._bits, -1, dtype=np.int32) for _ in SIZES]
        self._views = [memoryview(table) for table in self._tables]
        self._index(0)

    def _index(self, first: int) -> None:
        """Enter what goes on at `first` or behind it."""
        start = max(first - SIZES[-1], 0)
        words = np.array(self.tokens[start:], dtype=np.int64).view(np.uint64)
        count = len(self.tokens)
        key = np.zeros(len(words), dtype=np.uint64)  # at i: of the n-gram that ends before token start + i
        for size in range(1, SIZES[-1] + 1):
            # key' (i) = key (i) · factor + token (i − size)
            if len(words) <= size:
                return
            key = key[1:] * np.uint64(_FACTOR) + words[: len(words) - size] if size > 1 else words[:-1]
            # key[j] belongs to position start + size + j
            if size >= SIZES[0]:
                skipped = max(first - start - size, 0)
                slots = (key[skipped:] * np.uint64(_SPREAD)) >> np.uint64(64 - self._bits)
                positions = np.arange(start + size + skipped, count, dtype=np.int32)
                np.maximum.at(self._tables[size - SIZES[0]], slots.astype(np.int64), positions)
