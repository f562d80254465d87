"""Zipf's law: the k-th of N is asked for 1/k^s as often as the first. Which of them, drawn by a seed."""

from __future__ import annotations

import random
from itertools import accumulate


class Zipf:
    """Indices from 0 to `count` − 1, the lowest the likeliest. `exponent` 0: all as likely."""

    def __init__(self, count: int, exponent: float) -> None:
        assert count >= 1
        self._indices = range(count)
        self._sums = list(accumulate((rank + 1) ** -exponent for rank in self._indices))

    def draw(self, drawn: random.Random) -> int:
        """The next one."""
        return drawn.choices(self._indices, cum_weights=self._sums)[0]

    def share(self, first: int) -> float:
        """Of all draws, how many are among the `first` likeliest."""
        return self._sums[min(first, len(self._sums)) - 1] / self._sums[-1]
