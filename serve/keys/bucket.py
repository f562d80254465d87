"""An allowance that fills up steadily: so many in a while, taken at once or one by one."""

from __future__ import annotations

import math
from collections.abc import Callable


class Bucket:
    """Holds up to `size` and is full again after `period_s`.

    It may be overdrawn, by what was given before its price was known; then nothing is to be had until that has been
    paid off, so that over time no more is taken than the allowance.
    """

    def __init__(self, size: int, period_s: float, clock: Callable[[], float]) -> None:
        self.size = size
        self.period_s = period_s
        self._clock = clock
        self._level = float(size)
        self._seen_s = clock()

    @property
    def num_left(self) -> int:
        """Whole ones that are there now."""
        return max(math.floor(self._now() + 1e-9), 0)

    @property
    def full_in_s(self) -> float:
        """Seconds until it is full, if nobody takes any."""
        return (self.size - self._now()) * self.period_s / self.size

    def wait_s(self, count: float = 1) -> float:
        """Seconds until `count` are there; 0: they are."""
        missing = count - self._now()
        return missing * self.period_s / self.size if missing > 1e-9 else 0.0

    def take(self, count: float) -> None:
        """Whatever is there. A negative count gives back, up to the size."""
        self._level = min(self._now() - count, float(self.size))

    def resized(self, size: int) -> Bucket:
        """One of another size, of which as much is taken as of this one."""
        other = Bucket(size, self.period_s, self._clock)
        other.take(self.size - self._now())
        return other

    def _now(self) -> float:
        now_s = self._clock()
        self._level = min(self._level + (now_s - self._seen_s) * self.size / self.period_s, float(self.size))
        self._seen_s = now_s
        return self._level
