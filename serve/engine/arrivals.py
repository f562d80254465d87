"""What a process knows of requests before it has read them: a client has connected, or its request has begun to come.

An idle engine that has one prompt looks here whether others come with it; see `Worker.expecting`, which goes on from
where a request is known.
"""

from __future__ import annotations

import math
import threading
import time

COMING_S = 0.02
"""Who has connected, or begun, longer ago is not waited for: it may never ask, or ask for something else."""


class Arrivals:
    """Those that come. Safe to use from any thread."""

    def __init__(self) -> None:
        self._since_s: dict[object, float] = {}  # by time.monotonic
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._since_s)

    def begin(self, one: object) -> None:
        """It has come this far now."""
        with self._lock:
            self._since_s[one] = time.monotonic()

    def end(self, one: object) -> None:
        """Its request is known, or there will be none. At any time, any number of times."""
        with self._lock:
            self._since_s.pop(one, None)

    @property
    def until_s(self) -> float:
        """By time.monotonic: so long the youngest is waited for; -inf where nobody comes."""
        with self._lock:
            return max(self._since_s.values(), default=-math.inf) + COMING_S


ARRIVALS = Arrivals()
"""Of this process: which model somebody is about to ask is not known yet."""
