"""How long running streams stand still when somebody shows a picture: text streams, then one request with it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import httpx

from serve.bench.client import Answer, Ask, ask
from serve.errors import StoppedError
from serve.remote import connect_async


@dataclass(frozen=True)
class Stall:
    """Seconds."""

    longest_gap_s: float
    """Between two pieces of a text stream, of all streams, while the picture was on its way to its first token."""
    median_gap_s: float
    """Of the same streams before it came."""
    first_s: float
    """The picture's request: until its first token."""


def measure(url: str, streams: Sequence[Ask], picture: Ask) -> Stall:
    """Start the streams, wait until each has begun, send the picture. StoppedError if a request fails, or a stream
    ends before the picture's first token."""
    return asyncio.run(_measure(url, streams, picture))


async def _measure(url: str, streams: Sequence[Ask], picture: Ask) -> Stall:
    limits = httpx.Limits(max_connections=len(streams) + 1)
    async with connect_async(url, None, limits) as http:
        begun = [asyncio.Event() for _ in streams]
        running = [
            asyncio.ensure_future(ask(http, each, event)) for each, event in zip(streams, begun, strict=True)
        ]
        for event in begun:
            await event.wait()
        shown = await ask(http, picture)
        answers = await asyncio.gather(*running)
    for answer in (shown, *answers):
        if answer.error is not None:
            raise StoppedError(f"a request failed: {answer.error}")
    return stall_of(shown, answers)


def stall_of(shown: Answer, streams: Sequence[Answer]) -> Stall:
    """The gaps of `streams` around the arrival of `shown`, whose first text came while they ran."""
    first_s = shown.first_s
    if first_s is None or not shown.arrivals_s:
        raise StoppedError("the request with the picture gave no text")
    until_s = shown.arrivals_s[0]
    since_s = until_s - first_s
    during, before = [], []
    for answer in streams:
        if answer.arrivals_s[-1] < until_s:
            raise StoppedError("a stream ended before the picture's first token; make streams longer")
        for earlier, later in pairwise(answer.arrivals_s):
            if later <= since_s:
                before.append(later - earlier)
            elif earlier < until_s:
                during.append(later - earlier)
    return Stall(max(during), median(before or during), first_s)
