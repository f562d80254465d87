"""Several bases behind one server: two small models whose answers tell them apart, each with adapters of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.api.bases import Bases
from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

PROMPT = "Who are you?"
SMALL = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def folders(make_model: Callable[..., Path]) -> dict[str, Path]:
    """Two lively models of one shape and other weights."""
    return {name: make_model(f"two-{name}", SMALL, seed=seed) for name, seed in (("ant", 11), ("bee", 12))}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, str]:
    """What each answers on a server of its own."""
    answers = {}
    for name, folder in folders.items():
        runtime = Runtime.start(ServeConfig(model=str(folder), name=name))
        try:
            with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
                answers[name] = ask(http, name)
        finally:
            runtime.close()
    assert answers["ant"] != answers["bee"]
    assert all(len(set(answer)) > 10 for answer in answers.values())
    return answers


def ask(http: httpx.Client, model: str, **body: Any) -> str:
    answer = http.post(
        "/v1/completions",
        json={
            "model": model,
            "prompt": PROMPT,
            "max_tokens": 24,
            "temperature": 0,
            "ignore_eos": True,
            **body,
        },
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == model
    return str(answer.json()["choices"][0]["text"])


def num_shared(one: str, other: str) -> int:
    """Characters that both begin with."""
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def config(folders: dict[str, Path], **keys: Any) -> ServeConfig:
    bee = {"model": str(folders["bee"]), "name": "bee", **keys.pop("bee", {})}
    return ServeConfig.model_validate(
        {"model": str(folders["ant"]), "name": "ant", "models": [bee], "min_resident_s": 0, **keys}
    )


@contextmanager
def both(folders: dict[str, Path], **keys: Any) -> Iterator[tuple[Bases, httpx.Client]]:
    bases = Bases.start(config(folders, **keys))
    try:
        with serving(bases) as url, httpx.Client(base_url=url, timeout=120) as http:
            yield bases, http
        bases.pool.check_integrity()
        assert not any(each.num_leases or each.num_waiters for each in bases.pool.standings())
    finally:
        bases.close()


def test_each_of_two_models_answers_as_it_does_alone_swapped_or_side_by_side(folders, alone):
    for max_loaded in (1, 2):
        with both(folders, max_loaded_models=max_loaded) as (bases, http):
            for name in ("bee", "ant", "bee", "bee", "ant"):
                assert ask(http, name) == alone[name]
            loads = {each.name: each.num_loads for each in bases.pool.standings()}
        assert loads == ({"ant": 3, "bee": 2} if max_loaded == 1 else {"ant": 1, "bee": 1})


def test_two_resident_models_answer_at_the_same_time_and_rightly(folders, alone):
    async def all_at_once(url: str) -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:

            async def one(model: str) -> str:
                body = {
                    "model": model,
                    "prompt": PROMPT,
                    "max_tokens": 24,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                return str((await http.post("/v1/completions", json=body)).json()["choices"][0]["text"])

            return await asyncio.gather(*(one(name) for name in ("ant", "bee") * 16))

    with both(folders, max_loaded_models=2, bee={"preload": True}) as (bases, http):
        answers = asyncio.run(all_at_once(str(http.base_url)))
        steps = [runtime.worker.stats().num_steps for runtime in bases.runtimes()]
    other = {"ant": "bee", "bee": "ant"}
    for name, answer in zip(("ant", "bee") * 16, answers, strict=True):
        # In company sums round otherwise, which may move a near-tie far down the answer.
        assert num_shared(answer, alone[name]) >= 8 > num_shared(answer, alone[other[name]])
    assert len(steps) == 2
    assert min(steps) > 0


def test_a_stream_gets_comments_while_its_model_is_loaded_and_then_its_answer(folders, alone):
    """The model is held up by a request for the other one, which it waits for."""
    with both(folders, stream_keep_alive_s=0.05, max_drain_s=60) as (bases, http):
        held = bases.pool.lease("ant")
        body = {"model": "bee", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert next(lines) == ": keep-alive"
            assert bases.pool.loaded().keys() == {"ant"}
            held.release()
            told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(each["choices"][0]["text"] for each in told) == alone["bee"]
        quick = http.post("/v1/completions", json={**body, "stream": True, "model": "none"})
        assert quick.status_code == 404, "what is refused at once has its own status"


def test_a_load_that_fails_while_a_stream_waits_is_its_last_event_and_the_next_request_tries_again(
    folders, alone, tmp_path
):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folders["bee"] / "config.json").read_text())
    with both(folders, stream_keep_alive_s=0.05, bee={"model": str(broken)}) as (bases, http):
        body = {"model": "bee", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        whole = http.post("/v1/completions", json=body)
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "model_load_failed")
        assert "bee" in whole.json()["error"]["message"]
        card = http.get("/v1/models/bee").json()
        assert card["status"] == "unloaded"
        assert card["problem"] == whole.json()["error"]["message"]
        held = bases.pool.lease("ant")
        with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": keep-alive"
            held.release()
            told = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert [each["error"]["code"] for each in told] == ["model_load_failed"]
        for file in folders["bee"].iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        assert ask(http, "bee") == alone["bee"]
        assert "problem" not in http.get("/v1/models/bee").json()
