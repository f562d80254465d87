"""`lathe bench hostile`: the rate of streams beside clients that do a server no good, over without them, in turns.

One server, as `lathe serve` starts it, with a file of keys. Hostile clients have the lowest priority, since their own
work is none of the server's; what the server does for them is in its CPU time. A round without and one with them
belong together. Those that take nothing of their answers have rows, which cost the others what any company costs:
there the round without has as many that read.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import psutil

from serve.bench import servers, standin, wire
from serve.bench.finding import Finding, Keep
from serve.bench.overhead import body_of, chats_of
from serve.bench.process import ServerProcess, cpu_s, see_end
from serve.bench.servers import PYTHON

PARTS = ("vanish", "half", "bodies", "keys", "deaf")
ASKED_RATE = 0.9
ASKED_MEMORY = 1.1
KEY = "sk-bench"
WORDS = {
    "vanish": "clients that ask and vanish, 16 a second",
    "half": "64 half-open connections",
    "bodies": "bodies of 100 MiB, one a second",
    "keys": "wrong keys, 32 a second",
    "deaf": "8 that take nothing of their streams",
}


@dataclass(frozen=True)
class Setting:
    """What to measure."""

    parts: tuple[str, ...] = PARTS
    size: str = "29M"
    """One of SIZES."""
    num_streams: int = 8
    num_prompt_tokens: int = 74
    max_tokens: int = 192
    hostile_tokens: int = 900
    """Of the streams that hostile clients ask for."""
    rounds: int = 3


@dataclass(frozen=True)
class Beside:
    """One round."""

    tokens_per_s: float
    tokens_per_cpu_s: float
    resident_mib: float
    """Of the server, once it was over."""


def run(setting: Setting, folder: Path, progress: Callable[[str], None], keep: Keep) -> list[Finding]:
    """Write a random model into `folder`, start a server, and measure."""
    progress("writing a random model")
    model = folder / "model"
    standin.write_model(model, standin.default_dtype(), standin.SIZES[setting.size])
    keys = folder / "keys.yaml"
    keys.write_text(f"keys:\n  - {{name: bench, key: {KEY}}}\n")
    findings: list[Finding] = []
    told = {"api_keys": keys, "name": "standin", "prefix_cache_gib": 0}  # which would grow with each round
    with servers.lathe(model, folder / "lathe.log", settings=told) as server:
        bench = _Bench(setting, server)
        bench.round(None)  # warms up
        for part in setting.parts:
            pairs: list[tuple[Beside, Beside]] = []
            for number in range(setting.rounds):
                progress(f"{WORDS[part]}: round {number + 1} of {setting.rounds}")
                kinds = ["readers" if part == "deaf" else None, part]
                done = [bench.round(kind) for kind in (kinds if number % 2 else reversed(kinds))]
                pairs.append((done[0], done[1]) if number % 2 else (done[1], done[0]))
            findings += findings_of(part, setting.num_streams, pairs)
            keep(findings)
    return findings


class _Bench:
    """Rounds of one server."""

    def __init__(self, setting: Setting, server: ServerProcess) -> None:
        self._setting, self._server = setting, server
        self._chats = chats_of(setting.num_prompt_tokens)

    def round(self, kind: str | None) -> Beside:
        """All streams, from their beginning to their end, beside clients of a kind."""
        setting, url = self._setting, self._server.url
        asked = [
            wire.chat(url, body_of(chat, setting.max_tokens), KEY)
            for chat in islice(self._chats, setting.num_streams)
        ]
        with self._beside(kind):
            before_s = cpu_s(self._server.pid)
            done = wire.stream(url, asked, setting.num_streams)
            spent_s = cpu_s(self._server.pid) - before_s
        resident = psutil.Process(self._server.pid).memory_info().rss
        return Beside(done.num_tokens / done.wall_s, done.num_tokens / spent_s, resident / 2**20)

    @contextmanager
    def _beside(self, kind: str | None) -> Iterator[None]:
        """Clients of that kind are there inside the block."""
        if kind is None:
            yield
            return
        body = json.dumps(body_of(next(self._chats), self._setting.hostile_tokens))
        words = [*PYTHON, "serve.bench.hostile_child", kind, self._server.url, KEY, body]
        child = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
        )
        assert child.stdin is not None, "a pipe"
        assert child.stdout is not None, "a pipe"
        try:
            child.stdout.readline()
            yield
        finally:
            child.stdin.close()
            see_end(child)
            child.stdout.close()


def findings_of(part: str, num_streams: int, pairs: Sequence[tuple[Beside, Beside]]) -> list[Finding]:
    """Of one kind: pairs of a round without such clients and one with them."""
    over = "over beside 8 that read" if part == "deaf" else "over without"
    what = f"{num_streams} streams beside {WORDS[part]}"
    without, beside = zip(*pairs, strict=True)
    return [
        Finding(
            f"{what}: tokens a second, {over}",
            tuple(b.tokens_per_s / a.tokens_per_s for a, b in pairs),
            ASKED_RATE,
            "at least",
            {
                "beside tok/s": [each.tokens_per_s for each in beside],
                "without tok/s": [each.tokens_per_s for each in without],
            },
        ),
        Finding(
            f"{what}: tokens a second of the server's processor time, {over}",
            tuple(b.tokens_per_cpu_s / a.tokens_per_cpu_s for a, b in pairs),
            ASKED_RATE,
            "at least",
        ),
        Finding(
            f"{what}: the server's memory, over before",
            tuple(b.resident_mib / a.resident_mib for a, b in pairs),
            ASKED_MEMORY,
            "at most",
            {"beside MiB": [each.resident_mib for each in beside]},
        ),
    ]
