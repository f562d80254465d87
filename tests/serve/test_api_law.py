"""The law over HTTP: whatever an adapter is, and went through, every endpoint gives its answers, streamed or not, one
choice or several; never the base's, nor those of what its name stood for before.

Each token is held against the model with the adapter fused into its weights. `LIVES` is what adapters are and go
through; a new one is a function.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import mlx.nn as nn
import pytest

from serve.api.server import serving
from serve.config import ServeConfig
from serve.engine.request import Request, Sampling
from serve.model.prompt import Prompt
from serve.model.token_bytes import TokenBytes
from serve.runtime import Runtime

MODEL = "full"
KINDS = ("lora", "dora", "experts")
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.7},
    {"temperature": 0.0, "repetition_penalty": 1.6, "repetition_context_size": 24},
    {"temperature": 1.0, "frequency_penalty": 0.8, "presence_penalty": 0.5, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.3, "top_n_sigma": 1.5, "repetition_penalty": 1.2},
)
NUM_TOKENS = 12
CASES = [
    f"{endpoint}-{stream}-{count}"
    for endpoint, stream, count in product(("chat", "completions"), ("whole", "streamed"), (1, 2, 3))
]

Tokens = list[list[int]]
"""Of each choice."""


class Server:
    """One server, its clients' side, and what its answers have to be."""

    def __init__(self, runtime: Runtime, http: httpx.Client, lively: Any, folder: Path) -> None:
        self.runtime, self.http, self.lively, self.folder = runtime, http, lively, folder
        tokens = TokenBytes(runtime.model.tokenizer)
        self._ids = {tokens.name(number, tokens[number]): number for number in range(259)}
        assert len(self._ids) == 259, "two tokens have one name"

    def load(self, name: str, folder: Path) -> None:
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
        answer = self.http.post("/v1/load_lora_adapter", json=body)
        assert answer.status_code == 200, answer.text

    def adapter(self, kind: str, number: int) -> Path:
        return self.lively.adapter(MODEL, kind, number)

    def tokens_of(self, choices: list[dict[str, Any]]) -> Tokens:
        """Of entries of `choices`, whole or in pieces."""
        found: dict[int, list[int]] = {}
        for choice in choices:
            said = choice["logprobs"] or {}
            names = [entry["token"] for entry in said.get("content", [])] or said.get("tokens", [])
            found.setdefault(choice["index"], []).extend(self._ids[name] for name in names)
        return [found[index] for index in sorted(found)]


class Asked:
    """One request, as often as it is asked."""

    def __init__(self, case: str, rng: random.Random) -> None:
        self.endpoint, manner, count = case.split("-")
        self.is_streamed, self.num_choices = manner == "streamed", int(count)
        self.text = "".join(rng.choice("abcdefgh ") for _ in range(rng.choice([3, 40, 150])))
        self.sampling = {**rng.choice(SAMPLINGS), "seed": rng.getrandbits(30)}
        self.drafter = rng.choice(["none", "ngram"])

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.endpoint == "chat" else "/v1/completions"

    def body(self, model: str, max_tokens: int = NUM_TOKENS) -> dict[str, Any]:
        shown = {"logprobs": 0, "prompt": self.text}
        if self.endpoint == "chat":
            shown = {"logprobs": True, "messages": [{"role": "user", "content": self.text}]}
        limits = {"max_tokens": max_tokens, "ignore_eos": True, "n": self.num_choices}
        limits["drafter"] = self.drafter
        return {"model": model, "stream": self.is_streamed, **limits, **self.sampling, **shown}

    def ask(self, server: Server, model: str) -> tuple[Tokens, str]:
        """The tokens of each choice, and the version that is said to have answered."""
        answer = server.http.post(self.path, json=self.body(model))
        assert answer.status_code == 200, answer.text
        parts = [answer.text]
        if self.is_streamed:
            parts = [line[6:] for line in answer.text.split("\n") if line.startswith("data: {")]
        choices = [choice for part in parts for choice in json.loads(part)["choices"]]
        return server.tokens_of(choices), answer.headers["x-lathe-model"]

    def check(self, server: Server, found: Tokens, module: nn.Module, assert_drawn: Any) -> None:
        """Each choice is what the module draws."""
        assert [len(tokens) for tokens in found] == [NUM_TOKENS] * self.num_choices
        tokenizer = server.runtime.model.tokenizer
        prompt = tokenizer.encode(self.text)
        if self.endpoint == "chat":
            messages = [{"role": "user", "content": self.text}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for number, tokens in enumerate(found):
            settings = {**self.sampling, "seed": self.sampling["seed"] + number}
            request = Request(
                f"choice {number}", Prompt(tuple(prompt)), Sampling(NUM_TOKENS, ignore_eos=True, **settings)
            )
            assert_drawn(request, tokens, module)

    def differs(self, server: Server, found: Tokens, module: nn.Module, assert_drawn: Any) -> None:
        """Not every choice is what the module draws."""
        with pytest.raises(AssertionError, match="the whole model draws"):
            self.check(server, found, module, assert_drawn)


Life = Callable[[Server, str, Asked], tuple[str, tuple[str, int], tuple[str, int]]]
"""Brings an adapter of a kind to where it is to be asked. What to ask for; kind and number of what it is, and of what
it must not be taken for."""
BASE = ("base", 0)


def in_pefts_layout(server: Server, kind: str, asked: Asked) -> tuple[str, tuple[str, int], tuple[str, int]]:
    server.load("x", server.lively.in_pefts_layout(MODEL, kind, 0))
    return "x", (kind, 0), BASE


def two_merged(server: Server, kind: str, asked: Asked) -> tuple[str, tuple[str, int], tuple[str, int]]:
    server.load("first", server.adapter(kind, 1))
    server.load("second", server.adapter("lora", 1))
    for name in ("first", "second"):
        asked.ask(server, name)
    return "first:0.7+second:0.4", (f"{kind} and more", 0), (kind, 1)


def updated_in_place(server: Server, kind: str, asked: Asked) -> tuple[str, tuple[str, int], tuple[str, int]]:
    """Under a stream of the earlier version."""
    server.load("x", server.adapter(kind, 2))
    asked.ask(server, "x")
    body = {"model": "x", "prompt": asked.text, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
        server.load("x", server.adapter(kind, 0))
        asked.ask(server, "x")
    return "x", (kind, 0), (kind, 2)


def evicted_and_reloaded(
    server: Server, kind: str, asked: Asked
) -> tuple[str, tuple[str, int], tuple[str, int]]:
    server.load("x", server.adapter(kind, 0))
    asked.ask(server, "x")
    for name, number in (("y", 1), ("z", 3)):
        server.load(name, server.adapter("lora", number))
        asked.ask(server, name)
    assert server.http.get("/v1/adapters/x").json()["state"] in ("host", "disk")
    return "x", (kind, 0), ("lora", 3)


def found_by_the_resolver(
    server: Server, kind: str, asked: Asked
) -> tuple[str, tuple[str, int], tuple[str, int]]:
    name = f"org/{kind}"
    if not (server.folder / name).exists():
        shutil.copytree(server.adapter(kind, 0), server.folder / name)
    server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})
    assert server.http.get(f"/v1/adapters/{name}").status_code == 404
    return name, (kind, 0), BASE


LIVES: tuple[Life, ...] = (
    in_pefts_layout,
    two_merged,
    updated_in_place,
    evicted_and_reloaded,
    found_by_the_resolver,
)


@pytest.fixture(scope="module")
def server(lively, tmp_path_factory) -> Iterator[Server]:
    """Of two slots."""
    folder = tmp_path_factory.mktemp("found")
    config = ServeConfig(model=str(lively.folder(MODEL)), name="base", max_adapters=2, adapter_dirs=(folder,))
    runtime = Runtime.start(config)
    try:
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=120) as http:
            yield Server(runtime, http, lively, folder)
        runtime.registry.check_integrity()
        assert all(runtime.registry.num_pins(version) == 0 for version in runtime.registry.versions())
    finally:
        runtime.close()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_every_endpoint_gives_the_adapters_answer(life, case, server, lively, assert_drawn):
    rng = random.Random(f"{life.__name__} {case}")
    kind, asked = rng.choice(KINDS), Asked(case, rng)
    of_base, served = asked.ask(server, "base")  # what is kept of it is the base's
    assert served == "base"
    asked.check(server, of_base, lively.module(MODEL, *BASE), assert_drawn)

    model, what, other = life(server, kind, asked)
    for _ in range(2):  # the second time its prefix is there
        found, served = asked.ask(server, model)
        asked.check(server, found, lively.module(MODEL, *what), assert_drawn)
        asked.differs(server, found, lively.module(MODEL, *BASE), assert_drawn)
        asked.differs(server, found, lively.module(MODEL, *other), assert_drawn)
        assert "@" in served
