"""Many requests at a fixed number of clients, or at the times that were drawn for them: Asks in, Answers out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass

import httpx

from serve.bench.client import Answer, Ask, ask
from serve.remote import connect_async

MAX_CONNECTIONS = 4096
"""Of an open loop: a request waits for nobody."""


@dataclass(frozen=True)
class Round:
    """One run of requests.

    Closed loop: `concurrency` clients, each sending its next request at once. Open loop: requests come at
    `request_rate` a second, whatever has become of those before them; `concurrency` is then the most that were to be
    under way, or how many there were.
    """

    concurrency: int
    wall_s: float
    answers: tuple[Answer, ...]
    request_rate: float | None = None
    """Requests a second; inf: all at once. None: a closed loop."""
    late_s: tuple[float, ...] = ()
    """Open loop: how long after its time each request was sent."""
    cpu_s: float | None = None
    """What the server had of processors meanwhile; None if nobody looked."""

    @property
    def tokens_per_s(self) -> float:
        """Of all clients together; failed requests give none."""
        return sum(answer.num_tokens for answer in self.answers if answer.error is None) / self.wall_s

    @property
    def tokens_per_cpu_s(self) -> float | None:
        """As tokens_per_s, of processors' time instead of the wall's."""
        return self.tokens_per_s * self.wall_s / self.cpu_s if self.cpu_s else None

    @property
    def longest_gap_s(self) -> float | None:
        """Between two pieces of one stream, of all streams; None if no stream had two."""
        return max((gap for answer in self.answers for gap in answer.gaps_s), default=None)


@dataclass(frozen=True)
class TimeLimit:
    """Seconds after the first request could be sent. None: no limit."""

    begin_s: float | None = None
    """No request is sent later."""
    end_s: float | None = None
    """Streams that have not ended by then are cut off."""


NO_LIMIT = TimeLimit()


def drive(
    url: str,
    asks: Iterable[Ask],
    concurrency: int,
    api_key: str | None = None,
    limit: TimeLimit = NO_LIMIT,
) -> Round:
    """Send `asks`, never more than `concurrency` at a time, and wait for them. ConfigError for no address.

    `asks` may be endless where `limit` says when to stop.
    """
    return asyncio.run(_drive(url, asks, concurrency, api_key, limit))


def drive_open(
    url: str,
    asks: Sequence[Ask],
    offsets_s: Sequence[float],
    request_rate: float,
    api_key: str | None = None,
    *,
    max_concurrency: int | None = None,
    limit: TimeLimit = NO_LIMIT,
) -> Round:
    """Send each of `asks` at its offset after the start, and wait for all. ConfigError for no address.

    max_concurrency  more than so many are not under way together: later ones wait before they are sent
    """
    return asyncio.run(_drive_open(url, asks, offsets_s, request_rate, api_key, max_concurrency, limit))


async def _drive(
    url: str, asks: Iterable[Ask], concurrency: int, api_key: str | None, limit: TimeLimit
) -> Round:
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with connect_async(url, api_key, limits) as http:
        clock = _Clock(limit)
        waiting = iter(asks)
        answered = await asyncio.gather(*(_client(http, waiting, clock) for _ in range(concurrency)))
        wall_s = clock.now_s
    return Round(concurrency, wall_s, tuple(answer for answers in answered for answer in answers))


async def _client(http: httpx.AsyncClient, waiting: Iterator[Ask], clock: _Clock) -> list[Answer]:
    answers = []
    while not clock.is_over and (request := next(waiting, None)) is not None:
        answers.append(await ask(http, request, until_s=clock.until_s))
    return answers


async def _drive_open(
    url: str,
    asks: Sequence[Ask],
    offsets_s: Sequence[float],
    request_rate: float,
    api_key: str | None,
    max_concurrency: int | None,
    limit: TimeLimit,
) -> Round:
    limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
    turn: AbstractAsyncContextManager[object] = (
        nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    )
    async with connect_async(url, api_key, limits) as http:
        clock = _Clock(limit)
        sent = await asyncio.gather(
            *(_at(http, each, at_s, turn, clock) for each, at_s in zip(asks, offsets_s, strict=True))
        )
        wall_s = clock.now_s
    done = [each for each in sent if each is not None]
    return Round(
        max_concurrency or len(done),
        wall_s,
        tuple(answer for answer, _ in done),
        request_rate,
        tuple(late_s for _, late_s in done),
    )


async def _at(
    http: httpx.AsyncClient,
    request: Ask,
    at_s: float,
    turn: AbstractAsyncContextManager[object],
    clock: _Clock,
) -> tuple[Answer, float] | None:
    """The answer, and how late it was asked for; None if its time never came."""
    if clock.limit.begin_s is not None and at_s > clock.limit.begin_s:
        return None
    await asyncio.sleep(max(0.0, at_s - clock.now_s))
    async with turn:
        if clock.is_over:
            return None
        late_s = clock.now_s - at_s
        return await ask(http, request, until_s=clock.until_s), late_s


class _Clock:
    """Seconds since it was made, and what of the limit is left. Made inside a running event loop."""

    def __init__(self, limit: TimeLimit) -> None:
        self.limit = limit
        self._start_s = time.perf_counter()
        loop_s = asyncio.get_running_loop().time()
        self.until_s = None if limit.end_s is None else loop_s + limit.end_s
        """By the event loop's clock."""

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self._start_s

    @property
    def is_over(self) -> bool:
        return self.limit.begin_s is not None and self.now_s > self.limit.begin_s
