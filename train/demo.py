"""`lathe demo`: the whole job once, with real parts, on the embedded model.

One recipe is trained, a server is started as a process of its own, and a second recipe is trained while its
checkpoints are served; held-out prompts are scored over HTTP, an experiment compares the adapters, and the winner is
exported.
Everything it shows is in the numbers it returns.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import yaml
from rich.console import Console

from serve import tables
from serve.bench.process import ServerProcess
from serve.errors import ConfigError
from serve.experiments.report import ExperimentReport, render, report
from serve.experiments.store import Store
from train import demo_live, demo_pictures
from train.after.export import ExportReport, Form, export
from train.asking import (
    CLIENTS,
    Bar,
    HeldOut,
    Score,
    ask,
    checked,
    client,
    held_out,
    recipe_of,
    score_of,
    trained,
)
from train.demo_live import Live
from train.demo_pictures import Pictures
from train.recipe.recipe import Recipe
from train.watch.summary import RunSummary

MARKER = ".lathe-demo"
BASE = "tickets"
DATA = "routing"
ADAPTERS = ("tickets-all", "tickets-attn")
"""Names of the adapters, and of their recipes. The first is served from the start, the second while it trains."""
SAVE_EVERY = 30
"""Batches between two versions of the second."""
BESIDE_TRAINING = {"OPENBLAS_NUM_THREADS": "1"}
"""Of the server's environment: two programs with as many BLAS threads as cores wait for each other, by spinning."""
EXPERIMENT = "ticket-router"
OUTCOME = "exact_match"
EXPORT_BITS: Literal[4, 8] = 8


@dataclass(frozen=True)
class Served:
    """What was measured over HTTP."""

    scores: dict[str, Score]
    num_requests: int
    num_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Of the scoring: base and both adapters in the same batches."""
        return self.num_tokens / self.seconds


def run(home: Path, folder: Path, console: Console, *, keep: bool = False) -> dict[str, Any]:
    """Do it all and return every number.

    home    the checkout that data/ and recipes/ are read from
    folder  where everything is written; it is emptied first, if it is an earlier demo's
    keep    leave the server running at the end
    """
    start_s = time.perf_counter()
    folder = folder.absolute()
    _make_fresh(folder)
    first, second = ADAPTERS
    recipes = {name: recipe_of(home, folder, name) for name in ADAPTERS}
    training = {first: trained(recipes[first], console)}
    rows = held_out(home, DATA)
    with ExitStack() as stack:
        console.rule("Serving", align="left")
        command = _command(home, folder)
        server = ServerProcess("lathe serve", command, folder / "server.log", BESIDE_TRAINING)
        stack.enter_context(server)
        telling = recipe_of(home, folder, second, save_every=SAVE_EVERY, serve_to=server.url)
        training[second], live = demo_live.run(server.url, first, telling, rows, console)
        served = asyncio.run(_drive(server.url, rows, console))
        found = _report(folder)
        winner = _winner(served.scores)
        console.rule("Export", align="left")
        exported = _export(recipes[winner], folder, console)
        pictures = demo_pictures.run(home, folder, console)
        seconds = time.perf_counter() - start_s
        numbers = _numbers(training, live, served, found, winner, exported, pictures, seconds)
        _show(numbers, found, console)
        if keep:
            _say_what_to_try(server, rows[0], console)
            stack.pop_all()
    return numbers


def _make_fresh(folder: Path) -> None:
    """Empty the folder of an earlier demo; anything else that is in the way stays, and is an error."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise ConfigError(f"{folder} is not empty and not an earlier demo's; name another folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def _command(home: Path, folder: Path) -> list[str]:
    """How the server is started, its configuration written."""
    config = {
        "model": str(home / "data" / "tickets"),
        "name": BASE,
        "adapters": [{"name": ADAPTERS[0], "path": str(folder / ADAPTERS[0])}],
        "allowed_adapter_roots": [str(folder)],
        "experiments": [{"name": EXPERIMENT, "variants": [{"model": name} for name in ADAPTERS]}],
        "store": _store_url(folder),
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return [sys.executable, "-P", "-m", "lathe", "serve", str(path), "--port", "{port}"]


def _store_url(folder: Path) -> str:
    return f"sqlite:///{folder / 'experiments.sqlite'}"


# Over HTTP, as any client would.


async def _drive(url: str, rows: Sequence[HeldOut], console: Console) -> Served:
    async with client(url) as http:
        models = (BASE, *ADAPTERS)
        with Bar("held-out prompts, base and adapters mixed", len(rows) * len(models), console) as told:
            start_s = time.perf_counter()
            asked = [(model, row) for row in rows for model in models]
            replies = await asyncio.gather(*(ask(http, model, row, told) for model, row in asked))
            seconds = time.perf_counter() - start_s
        with Bar(f"experiment {EXPERIMENT}", len(rows), console) as told:
            users = [f"customer-{number}" for number in range(len(rows))]
            await asyncio.gather(
                *(_experiment(http, row, user, told) for row, user in zip(rows, users, strict=True))
            )
    hits = [(model, row.is_met_by(reply.text)) for (model, row), reply in zip(asked, replies, strict=True)]
    return Served(
        scores={model: score_of([hit for name, hit in hits if name == model]) for model in models},
        num_requests=len(replies),
        num_tokens=sum(reply.num_tokens for reply in replies),
        seconds=seconds,
    )


async def _experiment(http: httpx.AsyncClient, row: HeldOut, user: str, told: Callable[[], None]) -> None:
    """Ask under the experiment's public name, and report how the answer turned out."""
    reply = await ask(http, EXPERIMENT, row, told, user)
    outcome = {"id": reply.id, "name": OUTCOME, "value": float(row.is_met_by(reply.text))}
    checked(await http.post("/v1/feedback", json=outcome))


# What came of it.


def _report(folder: Path) -> ExperimentReport:
    store = Store(_store_url(folder), create=False)
    try:
        return report(store, EXPERIMENT, OUTCOME)
    finally:
        store.close()


def _winner(scores: dict[str, Score]) -> str:
    """The adapter with most exact answers; the first one of equals."""
    return max(ADAPTERS, key=lambda name: scores[name].exact_match)


def _export(recipe: Recipe, folder: Path, console: Console) -> ExportReport:
    adapter = Path(recipe.adapter_path)
    return export(
        adapter,
        folder / f"{adapter.name}-{EXPORT_BITS}bit",
        Form(bits=EXPORT_BITS),
        base=recipe.model,
        console=console,
    )


def _numbers(
    training: dict[str, RunSummary],
    live: Live,
    served: Served,
    found: ExperimentReport,
    winner: str,
    exported: ExportReport,
    pictures: Pictures,
    seconds: float,
) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "base": asdict(served.scores[BASE]),
        "adapters": {
            name: {**asdict(served.scores[name]), "training": asdict(summary)}
            for name, summary in training.items()
        },
        "live": live.to_dict(),
        "serving": {
            "num_requests": served.num_requests,
            "num_tokens": served.num_tokens,
            "seconds": served.seconds,
            "tokens_per_s": served.tokens_per_s,
            "clients": CLIENTS,
        },
        "experiment": found.to_dict(),
        "winner": winner,
        "export": asdict(exported),
        "pictures": pictures.to_dict(),
    }


def _show(numbers: dict[str, Any], found: ExperimentReport, console: Console) -> None:
    console.rule("Result", align="left")
    headings = ("exact", "of", "exact match", "trained weights", "training")
    drawn = tables.Table(
        "model", *tables.numbers(*headings), title="Held-out prompts answered exactly, over HTTP"
    )
    pictures = numbers["pictures"]
    lines = {f"{BASE} (base)": numbers["base"], **numbers["adapters"]}
    for name, score in pictures["scores"].items():
        is_base = name == demo_pictures.BASE
        lines[f"{name} (base)" if is_base else name] = {
            **score,
            "training": None if is_base else pictures["training"],
        }
    for name, score in lines.items():
        training = score.get("training")
        drawn.add(
            name,
            str(score["num_exact"]),
            str(score["num_rows"]),
            f"{score['exact_match']:.1%}",
            f"{training['num_trainable']:,}" if training else "",
            f"{training['seconds']:.0f} s" if training else "",
        )
    exported, serving = numbers["export"], numbers["serving"]
    said = ", ".join(f"{name} says {text!r}" for name, text in pictures["answers"].items())
    tables.show(console, drawn, *render(found))
    console.print(
        f"served: {serving['num_requests']} requests of the base and both adapters in shared batches, "
        f"{serving['tokens_per_s']:.0f} tok/s\n"
        f"exported: {numbers['winner']} as {exported['bits']} bit in {exported['out']}, top-1 agreement "
        f"{exported['top1_agreement']:.2%}, KL {exported['kl_mean']:.1e} nats a token\n"
        f"a picture and {pictures['question']!r} over HTTP: {said}\n"
        f"all of it took {numbers['seconds']:.0f} s",
        highlight=False,
        soft_wrap=True,
    )


def _say_what_to_try(server: ServerProcess, row: HeldOut, console: Console) -> None:
    body = json.dumps({"model": ADAPTERS[0], "messages": row.messages})
    quoted = body.replace("'", "'\\''")
    console.print(
        f"\nThe server stays up: {server.url} (stop it with: kill {server.pid})\n"
        f"  curl {server.url}/v1/models\n"
        f"  curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{quoted}'\n"
        f"  lathe chat --url {server.url} --model {ADAPTERS[1]}\n"
        f"  lathe bench serve --url {server.url} --model {BASE},{','.join(ADAPTERS)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
