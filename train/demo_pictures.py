"""The part of `lathe demo` about pictures: an adapter for the embedded model that sees, trained, served, scored.

The server has the base and the adapter in one batch; rows with pictures and rows of text alone share it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from serve.bench.process import ServerProcess
from train.asking import Bar, HeldOut, Score, ask, client, held_out, recipe_of, score_of, trained
from train.watch.summary import RunSummary

BASE = "shapes"
DATA = "bins"
ADAPTER = "shapes-vlm"
"""Name of the adapter, and of its recipe."""
GREETING = HeldOut([{"role": "user", "content": "Hello!"}], "Hello! Show me a picture.")
"""A row of text alone, asked again and again between the pictures."""
TALK_EVERY = 10


@dataclass(frozen=True)
class Pictures:
    """What came of it. `answers` are the models' to the first held-out picture."""

    training: RunSummary
    scores: dict[str, Score]
    talk: Score
    question: str
    answers: dict[str, str]
    num_requests: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(home: Path, folder: Path, console: Console) -> Pictures:
    """Train the adapter, start a server, ask both models every held-out picture over HTTP, stop the server.

    home    the checkout that data/ and recipes/ are read from
    folder  where everything is written
    """
    summary = trained(recipe_of(home, folder, ADAPTER), console)
    console.rule("Serving pictures", align="left")
    command = [sys.executable, "-P", "-m", "lathe", "serve", str(home / "data" / BASE), "--port", "{port}"]
    command += ["--adapter", f"{ADAPTER}={folder / ADAPTER}"]
    with ServerProcess("lathe serve", command, folder / "pictures.log") as server:
        return asyncio.run(_drive(server.url, held_out(home, DATA), summary, console))


async def _drive(url: str, rows: Sequence[HeldOut], summary: RunSummary, console: Console) -> Pictures:
    asked: list[tuple[str, HeldOut]] = []
    for number, row in enumerate(rows):
        asked += [(BASE, row), (ADAPTER, row)]
        if number % TALK_EVERY == 0:
            asked.append((BASE, GREETING))
    with Bar("held-out pictures and some talk, base and adapter mixed", len(asked), console) as told:
        async with client(url) as http:
            replies = await asyncio.gather(*(ask(http, model, row, told) for model, row in asked))
    hits = [row.is_met_by(reply.text) for (_, row), reply in zip(asked, replies, strict=True)]

    def score(model: str, talks: bool) -> Score:
        return score_of(
            [
                hit
                for (name, row), hit in zip(asked, hits, strict=True)
                if (name, row is GREETING) == (model, talks)
            ]
        )

    texts = {model: reply.text for (model, row), reply in zip(asked, replies, strict=True) if row is rows[0]}
    return Pictures(
        training=summary,
        scores={model: score(model, False) for model in (BASE, ADAPTER)},
        talk=score(BASE, True),
        question=_words(rows[0]),
        answers=texts,
        num_requests=len(asked),
    )


def _words(row: HeldOut) -> str:
    """What is asked, without the picture."""
    parts = row.messages[-1]["content"]
    return " ".join(part["text"] for part in parts if part["type"] == "text")
