"""`lathe bench overhead`: what HTTP costs over the engine alone: tokens a second, the first token, processors' time.

One process has the runtime. In turns, the same chats are streamed from it over HTTP, and put to its engine's worker
as token ids with the same sampling, without HTTP, templates or tokenizer. No prefix is kept, so both compute all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from serve.bench import standin, wire
from serve.bench.finding import Finding, Keep
from serve.bench.lines import LineProcess
from serve.bench.prompts import PromptMaker

ASKED_RATIO = 0.97
ASKED_TTFT_MS = 3.0
SIDES = ("HTTP", "engine")
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    size: str = "29M"
    """One of SIZES."""
    clients: tuple[int, ...] = (1, 16)
    requests_per_client: int = 2
    requests_alone: int = 12
    """Of one client."""
    num_prompt_tokens: int = 74
    max_tokens: int = 64
    rounds: int = 5


@dataclass(frozen=True)
class Measured:
    """One side's round."""

    tokens_per_s: float
    ttft_ms: float
    """The median."""
    cpu_us: float
    """Of the whole process, a token."""
    http_cpu_us: float | None
    """Of the thread that serves HTTP, a token."""


def run(setting: Setting, folder: Path, progress: Callable[[str], None], keep: Keep) -> list[Finding]:
    """Write a random model into `folder`, start the process, and measure."""
    progress("writing a random model")
    model = folder / "model"
    standin.write_model(model, standin.default_dtype(), standin.SIZES[setting.size])
    config = {"model": str(model), "name": "standin", "prefix_cache_gib": 0}
    findings: list[Finding] = []
    with LineProcess(
        "the server", ["serve.bench.overhead_child", json.dumps(config)], folder / "overhead.log"
    ) as process:
        chats = chats_of(setting.num_prompt_tokens)
        for clients in setting.clients:
            for side in SIDES:
                _measure(process, side, list(islice(chats, clients)), clients, WARM_UP_TOKENS)
            measured: dict[str, list[Measured]] = {side: [] for side in SIDES}
            for number in range(setting.rounds):
                asked = list(islice(chats, _num_requests(setting, clients)))
                for side in SIDES if number % 2 else reversed(SIDES):
                    progress(f"{clients} client(s): round {number + 1} of {setting.rounds}, {side}")
                    measured[side].append(_measure(process, side, asked, clients, setting.max_tokens))
            findings += findings_of(clients, measured)
            keep(findings)
    return findings


def _num_requests(setting: Setting, clients: int) -> int:
    return setting.requests_alone if clients == 1 else clients * setting.requests_per_client


def chats_of(num_prompt_tokens: int) -> Iterator[str]:
    """Messages that are prompts of the asked length, all different."""
    maker = PromptMaker(0)
    while True:
        yield maker.prompt(standin.words_for(num_prompt_tokens))


def _measure(
    process: LineProcess, side: str, chats: Sequence[str], clients: int, max_tokens: int
) -> Measured:
    before = process.ask({"cpu": True})
    if side == "engine":
        done = process.ask({"prompts": chats, "max_tokens": max_tokens, "concurrency": clients})
    else:
        url = process.ready["url"]
        done = vars(wire.stream(url, [wire.chat(url, body_of(each, max_tokens)) for each in chats], clients))
    return _measured(done, before, process.ask({"cpu": True}))


def body_of(message: str, max_tokens: int) -> dict[str, Any]:
    """What is asked over HTTP: a greedy answer of that length."""
    return {
        "model": "standin",
        "messages": [{"role": "user", "content": message}],
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
    }


def _measured(done: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> Measured:
    count = done["num_tokens"]
    http_s = None if after["http_cpu_s"] is None else after["http_cpu_s"] - before["http_cpu_s"]
    return Measured(
        tokens_per_s=count / done["wall_s"],
        ttft_ms=1e3 * median(done["ttft_s"]),
        cpu_us=1e6 * (after["cpu_s"] - before["cpu_s"]) / count,
        http_cpu_us=None if http_s is None else 1e6 * http_s / count,
    )


def findings_of(clients: int, measured: Mapping[str, Sequence[Measured]]) -> list[Finding]:
    """At one number of clients; a round's two sides belong together."""
    http, engine = (measured[side] for side in SIDES)
    pairs = list(zip(http, engine, strict=True))
    who = "1 client" if clients == 1 else f"{clients} clients"
    on_thread = [each.http_cpu_us for each in http if each.http_cpu_us is not None]
    return [
        Finding(
            f"{who}: tokens a second over HTTP, over the engine alone",
            tuple(ours.tokens_per_s / alone.tokens_per_s for ours, alone in pairs),
            ASKED_RATIO,
            "at least",
            {
                "HTTP tok/s": [each.tokens_per_s for each in http],
                "engine tok/s": [each.tokens_per_s for each in engine],
                "more of processors, µs a token": [ours.cpu_us - alone.cpu_us for ours, alone in pairs],
                **({"HTTP thread's, µs a token": on_thread} if on_thread else {}),
            },
        ),
        Finding(
            f"{who}: first token over HTTP, later by, ms",
            tuple(ours.ttft_ms - alone.ttft_ms for ours, alone in pairs),
            ASKED_TTFT_MS,
            "at most",
            {
                "HTTP ms": [each.ttft_ms for each in http],
                "engine ms": [each.ttft_ms for each in engine],
            },
        ),
    ]
