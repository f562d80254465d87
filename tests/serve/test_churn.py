"""Churn: clients ask, stream and leave while adapters are loaded, written over, rolled back, pinned, added up,
evicted and unloaded. Every answer is one version's, whole or cut short; afterwards nothing is left of any of it.

A few hundred requests run always, ten thousand under `-m large`.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.engine.request import Request, Sampling
from serve.model.prompt import Prompt
from serve.model.token_bytes import TokenBytes

SEEDS = range(5)
"""Of the adapters that there are; versions hold one of them each."""
NAMES = tuple(f"n{number}" for number in range(6))
NUM_CLIENTS = 6
PROMPTS = ("hello there", "a", "a prompt of some length, " * 6)
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 9},
)
WEIGHTS = (0.7, -0.3, 1.0, 0.5)
SETTINGS = {
    "max_adapters": 2,
    "max_rows": 8,
    "adapter_host_gib": 60_000 / 2**30,  # one or two of them
    "adapter_versions": 3,
}
REQUESTS_A_CHANGE = 4

Sum = tuple[tuple[int, float], ...]
"""Seeds of adapters, and so much of each."""


class Churn:
    """What all threads share. Only dictionary work, so without a lock."""

    def __init__(
        self, url: str, tokens: TokenBytes, encode: Callable[[str], list[int]], folder: Path
    ) -> None:
        self.url, self.folder, self.encode = url, folder, encode
        self.seed_of: dict[str, int] = {}
        """By version id, before there is such a version."""
        self.answers: Counter[tuple[Sum, Request, tuple[int, ...]]] = Counter()
        """Each once, and how often it was given."""
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.is_over = threading.Event()
        self._ids = {tokens.name(number, tokens[number]): number for number in range(259)}

    def sum_of(self, served: str) -> Sum:
        """What a version, or a sum of versions, does: `n0@3:0.7+n1@1:-0.3`."""
        found: Counter[int] = Counter()
        for part in served.split("+"):
            version, _, weight = part.partition(":")
            found[self.seed_of[version]] += float(weight or 1)
        return tuple(sorted(found.items()))

    def note(self, status: int, expected: tuple[int, ...], what: str, told: str) -> bool:
        """Whether it was done. What is refused is refused as it may be."""
        self.done[f"{what} {status}"] += 1
        if status not in expected:
            self.wrong.append(f"{what}: {status} {told[:300]}")
        return status == 200

    def start(self, work: Callable[[httpx.Client], None]) -> threading.Thread:
        def inside() -> None:
            with httpx.Client(base_url=self.url, timeout=120) as client:
                try:
                    work(client)
                except Exception as error:  # told by the test's own thread
                    self.wrong.append(repr(error))

        thread = threading.Thread(target=inside)
        thread.start()
        return thread

    def change(self, name: str, made: Sequence[Path], client: httpx.Client) -> None:
        """One thread alone changes a name, so it knows what each version holds; until all requests are answered."""
        rng, number, num_allowed = random.Random(name), 0, 0
        while not self.is_over.is_set():
            num_allowed += 1
            while self.done["asked"] < num_allowed * REQUESTS_A_CHANGE * len(NAMES) and number > 0:
                if self.is_over.wait(0.002):
                    return
            choice = rng.random()
            if choice < 0.5 or number == 0:
                number += 1
                self.load(name, number, rng, made, client)
            elif choice < 0.7:
                found = client.post(f"/v1/adapters/{name}/rollback", json={})
                self.note(found.status_code, (200, 404, 410), "rollback", found.text)
            elif choice < 0.8:
                verb = rng.choice(["pin", "unpin"])
                found = client.post(f"/v1/adapters/{name}/{verb}", json={})
                self.note(found.status_code, (200, 404, 507), verb, found.text)
            elif choice < 0.9:
                found = client.post("/v1/unload_lora_adapter", json={"lora_name": name})
                self.note(found.status_code, (200, 404), "unload", found.text)

    def load(
        self, name: str, number: int, rng: random.Random, made: Sequence[Path], client: httpx.Client
    ) -> None:
        """From where it was made, or over the files of an earlier one, which is lost if it is in no memory."""
        seed = rng.choice(SEEDS)
        folder = made[seed]
        if rng.random() < 0.3:
            folder = self.folder / name
            new = shutil.copytree(made[seed], self.folder / f"{name}-new")
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
        self.seed_of[f"{name}@{number}"] = seed
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        found = client.post("/v1/load_lora_adapter", json=body)
        self.note(found.status_code, (200,), "load", found.text)

    def ask(self, rng: random.Random, count: int, client: httpx.Client) -> None:
        for _ in range(count):
            model = rng.choice(NAMES)
            if rng.random() < 0.3:
                others = [f"{name}:{rng.choice(WEIGHTS)}" for name in rng.sample(NAMES, 2)]
                model = "+".join(others)
            self.ask_for(model, rng, client)
            self.done["asked"] += 1

    def ask_for(self, model: str, rng: random.Random, client: httpx.Client) -> None:
        text, sampling, max_tokens = rng.choice(PROMPTS), rng.choice(SAMPLINGS), rng.choice([1, 4, 12])
        is_streamed, leaves = rng.random() < 0.6, rng.random() < 0.1
        limits = {
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "n": rng.choice([1, 1, 2]),
            "seed": rng.randrange(3),
        }
        body = {"model": model, "prompt": text, "stream": is_streamed, "logprobs": 0, **limits, **sampling}
        found: dict[int, list[int]] = {}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                told = answer.read().decode()
                is_lost = "holds another one now" in told  # was written over, and in no memory
                self.note(answer.status_code, (404, 410) if is_lost else (404,), "answer", told)
                return
            whole = ""
            for piece in answer.iter_text():
                whole += piece
                if leaves:
                    break
        self.note(500 if '"error"' in whole else 200, (200,), "answer", whole)
        lines = [whole] if not is_streamed else whole.split("\n\n")
        for line in lines[: len(lines) - leaves]:
            line = line.removeprefix("data: ")
            for choice in json.loads(line)["choices"] if line.startswith("{") else ():
                names = (choice["logprobs"] or {}).get("tokens", [])
                found.setdefault(choice["index"], []).extend(self._ids[name] for name in names)
        for index, tokens in found.items():
            settings = {**sampling, "seed": limits["seed"] + index}
            request = Request(
                "asked", Prompt(tuple(self.encode(text))), Sampling(max_tokens, ignore_eos=True, **settings)
            )
            assert leaves or len(tokens) == max_tokens, f"{len(tokens)} of {max_tokens} tokens"
            self.answers[self.sum_of(answer.headers["x-lathe-model"]), request, tuple(tokens)] += 1


@pytest.fixture
def summed_module(model_folder, make_one, summed):
    """summed_module(Sum) → the base with that sum fused in, made once."""
    return cache(lambda parts: summed(model_folder, [(make_one(seed), weight) for seed, weight in parts]))


@pytest.mark.parametrize("total", [240, pytest.param(10_000, marks=pytest.mark.large)])
def test_under_any_churn_every_answer_is_one_versions_and_nothing_is_left(
    total, served, model_folder, make_one, summed_module, assert_drawn, tmp_path
):
    with served(model_folder, **SETTINGS) as (runtime, http):
        tokenizer = runtime.model.tokenizer
        churn = Churn(str(http.base_url), TokenBytes(tokenizer), tokenizer.encode, tmp_path)
        made = [make_one(seed) for seed in SEEDS]
        changing = [churn.start(lambda client, name=name: churn.change(name, made, client)) for name in NAMES]
        asking = [
            churn.start(
                lambda client, number=number: churn.ask(random.Random(number), total // NUM_CLIENTS, client)
            )
            for number in range(NUM_CLIENTS)
        ]
        for thread in asking:
            thread.join()
        churn.is_over.set()
        for thread in changing:
            thread.join()
        assert churn.wrong == []
        stats = runtime.registry.residency.stats()
        for name in runtime.registry.names():
            http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        for _ in range(1000):  # between two steps each time
            if not (runtime.engine.has_work or runtime.engine.bank.tidy_is_due or runtime.engine.bank.slots):
                break
            runtime.worker.call(lambda: None)
        left = http.get("/v1/adapters").json()
        assert left["data"] == [], "a sum outlives its parts"
        assert runtime.registry.versions() == [], "a request still holds a version"
        assert left["slots"] == {"max": 2, "taken": 0, "awaited": 0}
        assert [left["bytes"][where] for where in ("device", "host", "files")] == [0, 0, 0]
        assert not runtime.engine.bank.slots
        assert runtime.worker.failure is None
    for (parts, request, tokens), _ in churn.answers.items():
        assert_drawn(request, tokens, summed_module(parts))
    assert churn.done["answer 410"] < total // 20, "what was written over is seldom asked for again"
    told = f"{dict(churn.done)}, {stats}"
    assert stats.num_evicted > total // 40, told
    assert sum(churn.answers.values()) > total // 2, told
    assert any(len(parts) > 1 for parts, _, _ in churn.answers), told
    for what in ("load 200", "rollback 200", "unload 200", "pin 200"):
        assert churn.done[what] > total // 400, (what, told)
