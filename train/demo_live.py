"""The part of `lathe demo` in which an adapter is served while it trains.

Its recipe tells the server of each checkpoint, which is a new version there. One client streams answers of another
adapter all the while, without a pause; another asks each version a few held-out prompts as it comes.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from serve import tables
from serve.errors import StoppedError
from train.asking import HeldOut, ask, checked, client, trained
from train.recipe.recipe import Recipe
from train.watch.summary import RunSummary

PROBES = 8
"""Held-out prompts that each version is asked."""
LOOK_S = 0.2
"""How often the newest version is looked for."""
STREAM_TOKENS = 600
STREAM_TEMPERATURE = 5.0
"""Past its answer a trained adapter repeats the end token, which is no text; hot enough, it rambles on visibly."""
WARM_PIECES = 20
"""The stream runs before the recipe starts."""


@dataclass(frozen=True)
class Probed:
    """One version, and how it answered."""

    version: str
    step: int | None
    """Of its checkpoint; None: the adapter that the run ended with."""
    num_exact: int
    answer: str
    """To the first prompt."""
    pieces_before: int
    """Of the stream, by when it was asked."""


@dataclass(frozen=True)
class WentBack:
    """A rollback and its undoing: what new requests got, and how long each took."""

    version: str
    num_exact: int
    seconds: float
    forward_to: str
    forward_num_exact: int


@dataclass(frozen=True)
class Live:
    """What was seen while it trained. Pieces are of streamed text."""

    adapter: str
    streamed: str
    """What the stream that never stopped asked for."""
    num_probes: int
    question: str
    wanted: str
    """The right answer to the first prompt."""
    versions: tuple[Probed, ...]
    num_pieces: int
    num_answers: int
    """That the stream was made of, one after the other."""
    seconds: float
    longest_gap_s: float
    """Between two pieces, from the first to the last."""
    went_back: WentBack

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    url: str, streamed: str, recipe: Recipe, rows: Sequence[HeldOut], console: Console
) -> tuple[RunSummary, Live]:
    """Train the recipe, which tells the server at `url` of its checkpoints, and look at them meanwhile.

    streamed  the model that the stream asks for
    """
    probes = rows[:PROBES]
    is_over, is_warm = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1, "lathe-demo") as pool:
        looking = pool.submit(
            lambda: asyncio.run(_look(url, streamed, recipe.served_name, probes, is_warm, is_over))
        )
        try:
            while not is_warm.wait(LOOK_S) and not looking.done():
                pass
            if looking.done():
                looking.result()  # which raises
            summary = trained(recipe, console)
        finally:
            is_over.set()
        live = looking.result()
    _show(live, console)
    return summary, live


async def _look(
    url: str,
    streamed: str,
    name: str,
    probes: Sequence[HeldOut],
    is_warm: threading.Event,
    is_over: threading.Event,
) -> Live:
    arrivals: list[float] = []
    async with client(url) as http:
        stream = asyncio.create_task(_stream(http, streamed, probes[0], arrivals, is_warm, is_over))
        seen: list[Probed] = []
        while True:
            was_over = is_over.is_set()  # asked before the look, so that nothing is missed
            probed = await _newest(http, name, probes, seen, arrivals)
            if was_over and not probed:
                break
            if stream.done():
                await stream  # which raises
            await asyncio.sleep(LOOK_S)
        num_answers = await stream
        if not seen:  # a run goes on without its server: what that said stands above, in the run's own notes
            raise StoppedError(f"{url} was never told of a checkpoint of {name}, or took none")
        went_back = await _go_back(http, name, probes, seen)
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    return Live(
        adapter=name,
        streamed=streamed,
        num_probes=len(probes),
        question=str(probes[0].messages[-1]["content"]),
        wanted=probes[0].answer,
        versions=tuple(seen),
        num_pieces=len(arrivals),
        num_answers=num_answers,
        seconds=arrivals[-1] - arrivals[0],
        longest_gap_s=max(gaps),
        went_back=went_back,
    )


async def _stream(
    http: httpx.AsyncClient,
    model: str,
    row: HeldOut,
    arrivals: list[float],
    is_warm: threading.Event,
    is_over: threading.Event,
) -> int:
    """Stream one long answer after the other, noting when each piece comes. Returns how many."""
    body = {
        "model": model,
        "messages": row.messages,
        "max_tokens": STREAM_TOKENS,
        "temperature": STREAM_TEMPERATURE,
        "ignore_eos": True,
        "stream": True,
    }
    number = 0
    while True:
        async with http.stream("POST", "/v1/chat/completions", json={**body, "seed": number}) as response:
            number += 1
            if response.status_code != 200:
                await response.aread()
                checked(response)
            async for line in response.aiter_lines():
                if '"error"' in line:
                    raise StoppedError(f"the stream broke: {line}")
                if line.startswith("data:") and '"content"' in line:
                    arrivals.append(time.perf_counter())
                    if len(arrivals) >= WARM_PIECES:
                        is_warm.set()
                if is_over.is_set():
                    return number


async def _newest(
    http: httpx.AsyncClient, name: str, probes: Sequence[HeldOut], seen: list[Probed], arrivals: list[float]
) -> bool:
    """Ask the newest version its prompts, if it was not seen yet."""
    response = await http.get(f"/v1/models/{name}")
    if response.status_code == 404:
        return False
    card = checked(response)
    if seen and seen[-1].version == card["version"]:
        return False
    pieces_before = len(arrivals)
    texts = await _answers(http, card["version"], probes)
    step = re.search(r"step-(\d+)$", Path(card["root"]).name)
    num_exact = sum(probe.is_met_by(text) for probe, text in zip(probes, texts, strict=True))
    seen.append(
        Probed(card["version"], int(step[1]) if step else None, num_exact, texts[0].strip(), pieces_before)
    )
    return True


async def _answers(http: httpx.AsyncClient, model: str, probes: Sequence[HeldOut]) -> list[str]:
    replies = await asyncio.gather(*(ask(http, model, probe, lambda: None) for probe in probes))
    return [reply.text for reply in replies]


async def _go_back(
    http: httpx.AsyncClient, name: str, probes: Sequence[HeldOut], seen: Sequence[Probed]
) -> WentBack:
    """Give new requests the first version again, ask, and give them the newest."""
    first, last = seen[0], seen[-1]
    counts, seconds = [], []
    for version in (first.version, last.version):
        start_s = time.perf_counter()
        number = int(version.rpartition("@")[2])
        checked(await http.post(f"/v1/adapters/{name}/rollback", json={"version": number}))
        seconds.append(time.perf_counter() - start_s)
        texts = await _answers(http, name, probes)
        counts.append(sum(probe.is_met_by(text) for probe, text in zip(probes, texts, strict=True)))
    return WentBack(first.version, counts[0], max(seconds), last.version, counts[1])


def _show(live: Live, console: Console) -> None:
    drawn = tables.Table(
        "version",
        *tables.numbers("step", "exact"),
        tables.words("its answer to the first"),
        title=f"{live.adapter}, asked {live.num_probes} held-out prompts as its checkpoints came",
    )
    for each in live.versions:
        step = "the end" if each.step is None else str(each.step)
        drawn.add(each.version, step, f"{each.num_exact} of {live.num_probes}", each.answer)
    back = live.went_back
    tables.show(console, drawn)
    console.print(
        f"meanwhile {live.streamed} streamed without a pause: {live.num_pieces:,} pieces in {live.seconds:.0f} s, "
        f"longest gap {live.longest_gap_s * 1e3:.0f} ms\n"
        f"rolled back to {back.version}: {back.num_exact} of {live.num_probes}; forward to {back.forward_to}: "
        f"{back.forward_num_exact} of {live.num_probes}; at most {back.seconds * 1e3:.0f} ms",
        highlight=False,
        soft_wrap=True,
    )
