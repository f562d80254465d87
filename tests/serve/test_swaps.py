"""Two small models that take each other's place again and again under load: whose answers, and what is left."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip

from tiny import QWEN3

from serve import device
from serve.api.bases import Bases
from serve.api.server import serving
from serve.config import ServeConfig
from serve.engine.engine import Engine
from serve.model.loading import LoadedModel
from serve.runtime import Runtime

NAMES = ("ant", "bee", "of-ant", "of-bee")
NUM_CLIENTS = 6
MAX_GROWTH_BYTES = 64 << 20

pytestmark = pytest.mark.long


def body_of(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": "Who are you?", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


def num_shared(one: str, other: str) -> int:
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def left_behind() -> dict[str, int]:
    """What a model that has gone might have left."""
    device.give_back_all_memory()
    kinds = Counter(type(thing).__name__ for thing in gc.get_objects() if type(thing) in KINDS)
    threads = Counter(thread.name.rstrip("0123456789").rstrip("_-") for thread in threading.enumerate())
    return {**kinds, **threads, "files": len(os.listdir("/proc/self/fd"))}


KINDS = (Runtime, Engine, LoadedModel)


async def load_on(url: str, num_loads: Callable[[], int], goal: int, alone: dict[str, str]) -> Counter[str]:
    """Clients that ask for this and that until there were so many loads; some leave before they have their answer."""
    answered: Counter[str] = Counter()

    async def client(number: int, http: httpx.AsyncClient) -> None:
        draw = random.Random(number)
        while num_loads() < goal:
            name = draw.choice(NAMES)
            asking = asyncio.ensure_future(http.post("/v1/completions", json=body_of(name)))
            if draw.random() < 0.1:
                await asyncio.sleep(draw.random() * 0.05)
                asking.cancel()
                await asyncio.wait({asking})
                continue
            response = await asking
            assert response.status_code == 200, response.text
            text = response.json()["choices"][0]["text"]
            nearest = max(NAMES, key=lambda each: num_shared(text, alone[each]))
            assert nearest == name, f"{name} was answered by {nearest}"
            assert response.headers["x-lathe-model"] == (name if name in ("ant", "bee") else f"{name}@1")
            answered[name] += 1

    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        await asyncio.gather(*(client(number, http) for number in range(NUM_CLIENTS)))
    return answered


@pytest.mark.parametrize("goal", [16, pytest.param(200, marks=pytest.mark.large)])
def test_two_models_swapped_under_load_leave_nothing_behind_and_nobody_is_answered_by_the_wrong_one(
    make_model, make_adapter_of, goal
):
    folders: dict[str, Path] = {
        n: make_model(f"swap-{n}", QWEN3, seed=s) for n, s in (("ant", 5), ("bee", 6))
    }
    adapters = {
        name: [{"name": f"of-{name}", "path": str(make_adapter_of(folder, 9))}]
        for name, folder in folders.items()
    }
    bee = {"model": str(folders["bee"]), "name": "bee", "adapters": adapters["bee"]}
    config = ServeConfig.model_validate(
        {
            "model": str(folders["ant"]),
            "name": "ant",
            "adapters": adapters["ant"],
            "models": [bee],
            "min_resident_s": 0.02,
        }
    )
    before = left_behind()
    gc.freeze()  # as a server does: what was there before is looked through no more as a model leaves
    bases = Bases.start(config)

    def num_loads() -> int:
        return sum(each.num_loads for each in bases.pool.standings())

    try:
        with serving(bases) as url:
            with httpx.Client(base_url=url, timeout=120) as http:
                alone = {
                    name: http.post("/v1/completions", json=body_of(name)).json()["choices"][0]["text"]
                    for name in NAMES
                }
                assert len({text[:4] for text in alone.values()}) == len(NAMES), (
                    "their answers tell them apart"
                )
            asyncio.run(load_on(url, num_loads, 8, alone))
            early, early_bytes, early_active = (
                left_behind(),
                psutil.Process().memory_info().rss,
                mx.get_active_memory(),
            )
            answered = asyncio.run(load_on(url, num_loads, goal, alone))
            bases.pool.check_integrity()
            late, late_bytes, late_active = (
                left_behind(),
                psutil.Process().memory_info().rss,
                mx.get_active_memory(),
            )
        assert all(not each.num_leases and not each.num_waiters for each in bases.pool.standings())
        assert num_loads() >= goal
        assert set(answered) == set(NAMES)
        for kind in ("Runtime", "Engine", "LoadedModel", "lathe-engine", "lathe-models"):
            assert late[kind] == 1, f"{late[kind]} of {kind} are there"
        grown = {key: late[key] - early.get(key, 0) for key in late if late[key] > early.get(key, 0) + 8}
        assert not grown, "threads and files are as many as before"
        assert late_bytes - early_bytes < MAX_GROWTH_BYTES
        assert late_active - early_active < 1 << 20
    finally:
        bases.close()
        gc.unfreeze()
    after = left_behind()
    assert all(after.get(kind, 0) == before.get(kind, 0) for kind in ("Runtime", "Engine", "LoadedModel"))
    assert not any(name in after for name in ("lathe-engine", "lathe-models"))
