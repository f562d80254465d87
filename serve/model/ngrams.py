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
"""Tokens of an n-gram: two and more, one more each."""
_LEAST_BITS = 8
_SLOTS_EACH = 4
"""For a token there are so many slots, or up to twice as many: one n-gram in ten has lost its own to another."""
_MANY = 32
"""From so many new tokens on numpy is faster."""
_FACTOR, _SPREAD = 0x2C1B3C6D, 0x297A2D39
"""Odd: multiplied by them, numbers differ in their upper bits."""
_BITS = 30
_WORD = (1 << _BITS) - 1
"""Of a key: what Python multiplies at once."""


def ngram_keys(tail: Sequence[int]) -> list[int]:
    """Of the n-grams that end with `tail`, one for each of SIZES that it is long enough for."""
    keys: list[int] = []
    key = tail[-1] & _WORD if tail else 0
    for size in SIZES[: max(len(tail) - 1, 0)]:
        key = (key * _FACTOR + tail[-size]) & _WORD
        keys.append((key * _SPREAD) & _WORD)
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
        if _SLOTS_EACH * count > 1 << self._bits:
            self._rebuild()
        elif count - first >= _MANY:
            self._index(first)
        else:
            self._enter(first)

    def find(self, size: int, key: int, tail: array[int]) -> int | None:
        """Where the text went on when it last said the n-gram of that size that ends `tail`; None where it has not,
        or another has taken its slot. `key` is that n-gram's."""
        position: int = self._views[size - SIZES[0]][key >> (_BITS - self._bits)]
        if position < size or self.tokens[position - size : position] != tail[-size:]:
            return None
        return position

    def _rebuild(self) -> None:
        self._bits = max((_SLOTS_EACH * len(self.tokens)).bit_length(), _LEAST_BITS)
        self._tables = [np.full(1 << self._bits, -1, dtype=np.int32) for _ in SIZES]
        self._views = [table.data for table in self._tables]
        self._index(0)

    def _enter(self, first: int) -> None:
        """As `_index`, a token at a time: the same arithmetic, which is done for every token of an answer."""
        start, shift = max(first - SIZES[-1], 0), _BITS - self._bits
        tokens = self.tokens[start:].tolist()
        sized = tuple(zip(SIZES, self._views, strict=True))
        for place in range(first - start, len(tokens)):
            key = tokens[place - 1] & _WORD
            for size, view in sized[: max(place - 1, 0)]:
                key = (key * _FACTOR + tokens[place - size]) & _WORD
                view[((key * _SPREAD) & _WORD) >> shift] = start + place

    def _index(self, first: int) -> None:
        """Enter the n-grams that go on at `first` or behind it."""
        start = max(first - SIZES[-1], 0)
        words = np.array(self.tokens[start:], dtype=np.int64) & _WORD
        key = np.zeros_like(words)
        for size in range(1, min(SIZES[-1], len(words) - 1) + 1):
            # key[i] is of the n-gram that ends before token start + size + i.
            key = (key[1:] * _FACTOR + words[: len(words) - size]) & _WORD if size > 1 else words[:-1]
            if size >= SIZES[0]:
                behind = max(first - start - size, 0)
                slots = ((key[behind:] * _SPREAD) & _WORD) >> (_BITS - self._bits)
                # The last of a slot's positions stays: numpy promises no order, and keeps this one.
                self._tables[size - SIZES[0]][slots] = np.arange(start + size + behind, len(self.tokens))
