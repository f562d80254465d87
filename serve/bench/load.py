"""Many requests at a fixed number of clients: Asks in, Answers and the wall time out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx

from serve.bench.client import Answer, Ask, ask
from serve.remote import connect_async


@dataclass(frozen=True)
class Round:
    """One run of a fixed set of requests by `concurrency` clients, each sending its next one at once."""

    concurrency: int
    wall_s: float
    answers: tuple[Answer, ...]

    @property
    def tokens_per_s(self) -> float:
        """Of all clients together; failed requests give none."""
        return sum(answer.num_tokens for answer in self.answers if answer.error is None) / self.wall_s


def drive(url: str, asks: Sequence[Ask], concurrency: int, api_key: str | None = None) -> Round:
    """Send all `asks`, never more than `concurrency` at a time, and wait for them. ConfigError for no address."""
    return asyncio.run(_drive(url, asks, concurrency, api_key))


async def _drive(url: str, asks: Sequence[Ask], concurrency: int, api_key: str | None) -> Round:
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with connect_async(url, api_key, limits) as http:
        waiting = iter(asks)
        start_s = time.perf_counter()
        answered = await asyncio.gather(*(_client(http, waiting) for _ in range(concurrency)))
        wall_s = time.perf_counter() - start_s
    return Round(concurrency, wall_s, tuple(answer for answers in answered for answer in answers))


async def _client(http: httpx.AsyncClient, waiting: Iterator[Ask]) -> list[Answer]:
    return [await ask(http, request) for request in waiting]
