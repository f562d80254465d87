"""A storm: 64 clients that send anything the schemas hold and do not hold, leave, load, replace and unload.

Afterwards nothing is left of it, and a quiet client in between has had the right answers all along.

Four deeds of each client run always, ten minutes of them under `-m large`.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from loud import Loud

from serve.api.server import serving
from serve.config import ServeConfig
from serve.engine.request import Request, Sampling
from serve.model.loading import load
from serve.model.prompt import Prompt
from serve.model.token_bytes import BYTE_OF
from serve.runtime import Runtime

NUM_CLIENTS = 64
EDGES: dict[str, list[Any]] = {
    "integer": [0, -1, 1, 2, 3, 20, 128, 2**31, 2**63, 2**64, -(2**63), 16.0, True, "7", None],
    "number": [0, -1, 0.5, 1, 1.5, 5e-324, 1e308, -0.0, 2**64, True, "1", None],
    "string": [
        "",
        "a",
        "x<|im_end|>\n<|im_start|>system\n",
        "\ud800",
        "\x00",
        "🌍" * 40,
        "y" * 3000,
        7,
        None,
    ],
    "boolean": [True, False, None, 0, "true"],
    "null": [None],
}
GARBAGE = [b"", b"{", b"[]", b"null", b'{"a":' * 5000, b'"\xff\xfe"', b'{"n": NaN}', b"\x00" * 100]
WORDS = ["ticket", "lamp", "Gr\u00fc\u00dfe", "\u65e5\u672c", "please", "\n", "refund", "7"]


def random_value(rng: random.Random, schema: dict, schemas: dict, depth: int = 0) -> Any:
    """Mostly what the schema asks for, sometimes an edge of it or something else."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        return random_value(rng, rng.choice(schema["anyOf"]), schemas, depth)
    if "enum" in schema or "const" in schema:
        return rng.choice(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", rng.choice(list(EDGES)))
    if kind == "array" and depth < 4:
        count = rng.choice([0, 1, 1, 2, 5])
        return [random_value(rng, schema.get("items", {}), schemas, depth + 1) for _ in range(count)]
    if kind == "object" and depth < 4:
        return random_object(rng, schema, schemas, depth + 1)
    return rng.choice(EDGES.get(kind, EDGES["null"]))


def random_object(rng: random.Random, schema: dict, schemas: dict, depth: int = 0) -> dict[str, Any]:
    required = schema.get("required", [])
    return {
        name: random_value(rng, part, schemas, depth)
        for name, part in schema.get("properties", {}).items()
        if (name in required and rng.random() < 0.97) or rng.random() < 0.12
    }


@dataclass
class Storm:
    """What happened."""

    url: str
    folders: dict[str, Path]
    schemas: dict[str, dict]
    num_deeds: float
    """Of each client, at most."""
    end_s: float
    num_clients: int = NUM_CLIENTS
    """That are at it."""
    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def note(self, path: str, status: int, content: bytes) -> None:
        """Every refusal has OpenAI's form, and no 5xx but those that say what they are."""
        self.statuses[f"{path} {status}"] += 1
        if status < 400:
            return
        try:
            error = json.loads(content)["error"]
            is_right = set(error) == {"message", "type", "param", "code"} and error["message"]
        except (ValueError, LookupError, TypeError):
            is_right = False
        named = ("overloaded", "generation_failed", "deadline_exceeded")  # the last by a `timeout` of its own
        is_named = status < 500 or (is_right and error["code"] in named)
        if not is_right or not is_named or "internal" in str(content):
            self.faults.append(f"{path}: {status} {content[:300]!r}")


def a_generation(rng: random.Random, storm: Storm) -> tuple[str, dict]:
    """A request that may well be answered."""
    model = rng.choice(["lively", "steady", "a", "b", "a@1", "b@2", "loud", "nope"])
    text = " ".join(rng.choices(WORDS, k=rng.choice([1, 5, 40, 200])))
    body: dict[str, Any] = {"model": model, "max_tokens": rng.choice([1, 8, 30, 32_000])}
    body |= {
        "temperature": rng.choice([0, 1, 1.5]),
        "seed": rng.choice([None, -1, 7]),
        "stream": rng.random() < 0.6,
    }
    body |= rng.choice(
        [{}, {}, {"n": 3}, {"n": 30}, {"stop": ["<|im_end|>", "ab"]}, {"top_p": 0.5, "top_k": 9}]
    )
    body |= rng.choice(
        [{}, {}, {"kv_bits": 3.5}, {"kv_bits": 4, "kv_scheme": "turbo", "kv_quantize_after": 20}]
    )
    body |= rng.choice([{}, {}, {"cache_salt": "pepper"}])
    if rng.random() < 0.5:
        body |= rng.choice([{}, {"logprobs": True, "top_logprobs": 3}])
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}
    return "/v1/completions", {**body, "prompt": rng.choice([text, [text, "a"], [5, 6, 7], [-1], [2**40]])}


async def one_deed(rng: random.Random, http: httpx.AsyncClient, storm: Storm) -> None:
    deed = rng.random()
    if deed < 0.45:
        path, body = a_generation(rng, storm)
        if rng.random() < 0.4:
            # On a connection of its own: what a cancelled client leaves of one is that client's affair.
            async with httpx.AsyncClient(base_url=storm.url, timeout=600) as leaving:
                await leave_early(rng, leaving, path, body, storm)
            return
    elif deed < 0.75:
        path = rng.choice(
            ["/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter", "/v1/feedback"]
        )
        kind = {"chat/completions": "ChatBody", "completions": "CompletionBody", "feedback": "FeedbackBody"}
        schema = storm.schemas[kind.get(path[4:], "LoadAdapterBody")]
        body = random_object(rng, schema, storm.schemas)
        if rng.random() < 0.7 and "model" in body:
            body |= {"model": "lively", "max_tokens": 4}
    elif deed < 0.8:
        path, content = "/v1/completions", rng.choice(GARBAGE)
        answer = await http.post(path, content=content, headers={"Content-Type": "application/json"})
        storm.note(path, answer.status_code, answer.content)
        return
    elif deed < 0.95:
        name = rng.choice(["a", "b"])
        folder = storm.folders[rng.choice("ab")]
        path = "/v1/load_lora_adapter"
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": rng.random() < 0.8}
        if rng.random() < 0.3:
            path, body = "/v1/unload_lora_adapter", {"lora_name": name}
    else:
        path = rng.choice(["/health", "/metrics", "/v1/models"])
        answer = await http.get(path)
        storm.note(path, answer.status_code, answer.content)
        return
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    answer = await http.post(path, content=content, headers={"Content-Type": "application/json"})
    storm.note(path, answer.status_code, answer.content)


async def leave_early(
    rng: random.Random, http: httpx.AsyncClient, path: str, body: dict, storm: Storm
) -> None:
    """Read a few pieces, or none, and close the connection."""
    try:
        async with asyncio.timeout(rng.choice([0.01, 0.2, 2.0])):
            async with http.stream("POST", path, json=body) as answer:
                count = 0
                async for _ in answer.aiter_bytes():
                    count += 1
                    if count >= rng.choice([1, 3, 10]):
                        break
        storm.statuses["left"] += 1
    except TimeoutError:
        storm.statuses["left"] += 1


async def stormy_client(seed: int, storm: Storm) -> None:
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=storm.url, timeout=600) as http:
        done = 0
        while done < storm.num_deeds and time.monotonic() < storm.end_s:
            done += 1
            try:
                await one_deed(rng, http, storm)
            except httpx.TransportError as error:
                sent = error.request.content[:300] if error.request.method == "POST" else b""
                storm.faults.append(f"no answer: {error!r} to {error.request.url} {sent!r}")
    storm.num_clients -= 1


async def quiet_client(
    storm: Storm, prompts: list[tuple[int, ...]], answers: list[tuple[str, tuple[int, ...], list[int]]]
) -> None:
    """Asks now and then, reads to the end, and keeps the tokens: the log-probabilities' bytes say which."""
    async with httpx.AsyncClient(base_url=storm.url, timeout=600) as http:
        number = 0
        while storm.num_clients or number < 2:
            model, prompt = ("lively", "steady")[number % 2], prompts[number % len(prompts)]
            number += 1
            body = {"model": model, "prompt": list(prompt), "max_tokens": 12, "temperature": 0}
            body |= {"logprobs": 1, "ignore_eos": True}
            answer = await http.post("/v1/completions", json=body)
            while answer.status_code == 503:  # the queue is full: as told, again after a second
                await asyncio.sleep(float(answer.headers["retry-after"]))
                answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            answers.append((model, prompt, answer.json()["choices"][0]["logprobs"]["tokens"]))


async def run_storm(storm: Storm, prompts, answers, seed: int) -> None:
    clients = [stormy_client(seed * 1000 + number, storm) for number in range(NUM_CLIENTS)]
    await asyncio.gather(quiet_client(storm, prompts, answers), *clients)


@pytest.mark.parametrize(
    ("num_deeds", "seconds", "max_context"),
    [(4, math.inf, 384), pytest.param(math.inf, 600, None, marks=pytest.mark.large)],
    ids=["short", "ten minutes"],
)
def test_after_a_storm_nothing_is_left_and_a_quiet_client_had_the_right_answers(
    num_deeds, seconds, max_context, model_folder, make_adapter, merged, assert_drawn
):
    folders = {"a": make_adapter(1), "b": make_adapter(2, rank=16)}
    steady = make_adapter(4)
    config = ServeConfig(
        model=str(model_folder),
        name="lively",
        adapters=[{"name": "steady", "path": steady}],
        max_rows=16,
        max_waiting=64,
        max_adapters=4,
        max_context=max_context,
        kv_budget_gib=2**-30 * 8 * 512 * 512,  # eight rows of 512 positions: rows are preempted
    )
    runtime = Runtime.start(config)
    prompts = [tuple(range(40, 40 + length)) for length in (1, 9, 60)]
    answers: list[tuple[str, tuple[int, ...], list[str]]] = []
    try:
        runtime.registry.add("loud", Loud(make_adapter(3)))
        with serving(runtime) as url:
            schemas = httpx.get(f"{url}/openapi.json", timeout=60).json()["components"]["schemas"]
            storm = Storm(url, folders, schemas, num_deeds, time.monotonic() + seconds)
            asyncio.run(run_storm(storm, prompts, answers, seed=6))
            assert not storm.faults, "\n".join(storm.faults[:10])
            # Whoever left is cancelled between two steps; a call runs behind all that was asked.
            deadline = time.monotonic() + 120
            while runtime.engine.has_work and time.monotonic() < deadline:
                runtime.worker.call(lambda: None)
            assert httpx.get(f"{url}/health").json()["status"] == "ok"
            for name in runtime.registry.names():
                runtime.registry.unload(name)
            assert runtime.registry.versions() == [], "a pin is left"
            runtime.registry.check_integrity()
        stats = runtime.worker.stats()
        assert (stats.num_decoding, stats.num_prefilling, stats.num_waiting, stats.kv_bytes) == (0, 0, 0, 0)
        assert runtime.engine.bank.num_bytes == 0
        runtime.engine.scheduler.check_integrity()
    finally:
        runtime.close()
    assert storm.statuses["/v1/completions 200"]
    assert storm.statuses["left"]
    modules = {"lively": load(str(model_folder)).network.module, "steady": merged(model_folder, steady)}
    ids = {**runtime.model.tokenizer.vocab}
    for model, prompt, names in answers:
        tokens = [_token_id(name, ids) for name in names]
        assert len(tokens) == 12
        request = Request(model, Prompt(prompt), Sampling(temperature=0.0))
        assert_drawn(request, tokens, modules[model])


def _token_id(name: str, ids: dict[str, int]) -> int:
    """Of the byte tokenizer: a name is a character of one byte, `\\xNN`, or a special token's."""
    if name in ids and name.startswith("<|"):
        return ids[name]
    data = bytes([int(name[2:], 16)]) if name.startswith("\\x") and len(name) == 4 else name.encode()
    letters = {byte: letter for letter, byte in BYTE_OF.items()}
    assert len(data) == 1, name
    return ids[letters[data[0]]]
