"""The end of a server: it is announced, what runs may end, and what does not is ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Set

from serve.api.exchange import Exchange


class Drain:
    """Whether the server is about to end, and what it still waits for."""

    def __init__(
        self, exchanges: Set[Exchange], timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """exchanges: those that run; timeout_s: how long they may from the announcement on."""
        self._exchanges = exchanges
        self._timeout_s = timeout_s
        self._clock = clock
        self._began_s: float | None = None

    @property
    def is_on(self) -> bool:
        """Nothing new is taken."""
        return self._began_s is not None

    @property
    def is_over(self) -> bool:
        """Nothing runs any more, or what runs has had its time."""
        return self.is_on and (self.num_running == 0 or self.left_s <= 0)

    @property
    def left_s(self) -> float:
        """Seconds that what runs still has."""
        began_s = self._clock() if self._began_s is None else self._began_s
        return began_s + self._timeout_s - self._clock()

    @property
    def num_running(self) -> int:
        """Requests that were taken before the announcement and have not ended."""
        return sum(not each.is_aside for each in self._exchanges)

    def begin(self) -> None:
        """Announce the end. From a signal handler too."""
        if self._began_s is None:
            self._began_s = self._clock()

    def end_all(self) -> int:
        """End what still runs by an error; how many requests that were."""
        ended = [each for each in self._exchanges if each.running]
        for exchange in ended:
            for rows in list(exchange.running):
                rows.abort()
        return len(ended)
