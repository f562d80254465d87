"""Short rows beside a long one, and beside one more short one: does the long row cost its neighbours their speed?

The companion's answer is under way before the others are sent, and still is when they have ended. Their speed is
counted from when the last of them has begun until the first has ended, so nobody's prompt is computed meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from serve.bench import servers, standin
from serve.bench.client import Answer, Ask, ask
from serve.bench.finding import Finding
from serve.bench.prompts import PromptMaker
from serve.errors import StoppedError
from serve.remote import connect_async

ASKED = 0.75
COMPANION_TOKENS = 4096
"""Its answer is never waited for; the connection is closed."""


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    num_rows: int = 16
    """The companion among them."""
    short_tokens: int = 100
    long_tokens: int = 2000
    max_tokens: int = 64
    rounds: int = 3


def run(setting: Setting, model: Path, folder: Path, progress: Callable[[str], None]) -> list[Finding]:
    """Start a server of `model`, measure, stop it."""
    maker = PromptMaker(10)
    lengths = (setting.short_tokens, setting.long_tokens)
    speeds: dict[int, list[float]] = {length: [] for length in lengths}
    with servers.lathe(model, folder / "lathe-ragged.log") as server:
        for length in lengths:
            answers_beside(server.url, asks(model.name, setting, length, maker, max_tokens=8))
        for number in range(setting.rounds):
            for length in lengths if number % 2 else reversed(lengths):
                progress(
                    f"round {number + 1} of {setting.rounds}: {setting.num_rows - 1} rows of "
                    f"{setting.short_tokens} tokens beside one of {length}"
                )
                asked = asks(model.name, setting, length, maker, max_tokens=setting.max_tokens)
                speeds[length].append(speed_of(answers_beside(server.url, asked)))
    short, long = (speeds[length] for length in lengths)
    return [
        Finding(
            what=f"speed of {setting.num_rows - 1} short rows beside {setting.long_tokens:,} tokens",
            ratios=tuple(a / b for a, b in zip(long, short, strict=True)),
            asked=ASKED,
            sense="at least",
            values={"beside the long row tok/s": long, "beside a short row tok/s": short},
        )
    ]


def asks(model: str, setting: Setting, length: int, maker: PromptMaker, *, max_tokens: int) -> list[Ask]:
    """The companion of `length` prompt tokens, then the short rows."""
    words = standin.words_for(setting.short_tokens)
    companion = Ask(model, maker.prompt(standin.words_for(length)), COMPANION_TOKENS)
    short = (Ask(model, maker.prompt(words), max_tokens) for _ in range(setting.num_rows - 1))
    return [companion, *short]


def answers_beside(url: str, asked: Sequence[Ask]) -> list[Answer]:
    """Those of all but the first of `asked`, which runs all the while. Raises StoppedError if that one has ended."""
    return asyncio.run(_beside(url, asked[0], asked[1:]))


async def _beside(url: str, companion: Ask, others: Sequence[Ask]) -> list[Answer]:
    limits = httpx.Limits(max_connections=len(others) + 1)
    async with connect_async(url, None, limits) as http:
        begun = asyncio.Event()
        held = asyncio.create_task(ask(http, companion, begun))
        try:
            await begun.wait()
            answers = await asyncio.gather(*(ask(http, each) for each in others))
            if held.done():
                raise StoppedError(f"the companion's answer has ended too early: {held.result()}")
        finally:
            held.cancel()
            await asyncio.wait([held])
    return answers


def speed_of(answers: Sequence[Answer]) -> float:
    """Pieces of text a second while all of `answers` were under way. Raises StoppedError if one has failed."""
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        raise StoppedError(f"{len(errors)} of {len(answers)} requests failed: {errors[0]}")
    start_s = max(answer.arrivals_s[0] for answer in answers)
    stop_s = min(answer.arrivals_s[-1] for answer in answers)
    if stop_s <= start_s:
        raise StoppedError(
            f"the {len(answers)} answers were never all under way: the first had ended before the last began; "
            "ask for longer ones"
        )
    arrived = sum(start_s < moment <= stop_s for answer in answers for moment in answer.arrivals_s)
    return arrived / (stop_s - start_s)
