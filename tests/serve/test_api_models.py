"""Several bases behind one server: two small models whose answers tell them apart, each with adapters of its own."""

from __future__ import annotations

import asyncio
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
    assert answers == [alone[name] for name in ("ant", "bee") * 16]
    assert len(steps) == 2
    assert min(steps) > 0
