"""Where time goes inside calls of somebody else's objects: methods are replaced by timed ones, and put back.

Each part has the time of its own alone: what a timed call inside it takes is that one's. So parts add up to the
outermost calls. Nothing of it is in the code that is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple


class Lap(NamedTuple):
    """Calls of `owner.name` are time of `part`. The owner is an object, a class or a module."""

    owner: Any
    name: str
    part: str


class Moment(NamedTuple):
    """Seconds: by the wall, and of this thread on a processor, which waits while others compute."""

    wall_s: float
    thread_s: float

    @classmethod
    def now(cls) -> Moment:
        """Of clocks that begin anywhere."""
        return cls(time.perf_counter(), time.thread_time())

    def since(self, before: Moment) -> Moment:
        """What has passed."""
        return Moment(self.wall_s - before.wall_s, self.thread_s - before.thread_s)

    def plus(self, more: Moment) -> Moment:
        """Both together."""
        return Moment(self.wall_s + more.wall_s, self.thread_s + more.thread_s)


class Stopwatch:
    """`spent`: on each part so far.

    now  what time it is
    """

    def __init__(self, now: Callable[[], Moment] = Moment.now) -> None:
        self._now = now
        self.spent: dict[str, Moment] = {}
        self._open: list[str] = []
        self._since = Moment(0.0, 0.0)

    @contextmanager
    def watching(self, laps: Sequence[Lap]) -> Iterator[None]:
        """Time these calls inside the block. AttributeError if one is not there."""
        missing = object()
        replaced = []
        try:
            for lap in laps:
                timed = self._timed(getattr(lap.owner, lap.name), lap.part)
                replaced.append((lap, vars(lap.owner).get(lap.name, missing)))
                setattr(lap.owner, lap.name, timed)
            yield
        finally:
            for lap, before in reversed(replaced):
                if before is missing:
                    delattr(lap.owner, lap.name)
                else:
                    setattr(lap.owner, lap.name, before)

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **options: Any) -> Any:
            self._switch()
            self._open.append(part)
            try:
                return call(*args, **options)
            finally:
                self._switch()
                self._open.pop()

        return timed

    def _switch(self) -> None:
        """What has passed belongs to the innermost open part."""
        now = self._now()
        if self._open:
            part = self._open[-1]
            self.spent[part] = self.spent.get(part, Moment(0.0, 0.0)).plus(now.since(self._since))
        self._since = now
