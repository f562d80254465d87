"""Several bases behind one server: two small models whose answers tell them apart, each with adapters of its own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny import QWEN3

from serve.api.bases import Bases
from serve.api.server import serving
from serve.config import ServeConfig
from serve.errors import ConfigError, ModelError
from serve.experiments.store import Store
from serve.model.loading import expected_bytes, load
from serve.runtime import Runtime

PROMPT = "Who are you?"


@pytest.fixture(scope="module")
def folders(make_model: Callable[..., Path]) -> dict[str, Path]:
    """Two lively models of one shape and other weights."""
    return {name: make_model(f"two-{name}", QWEN3, seed=seed) for name, seed in (("ant", 11), ("bee", 12))}


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


def test_each_base_has_its_own_keys_and_adapters_and_what_was_loaded_is_there_again_when_it_comes_back(
    folders, make_adapter_of
):
    adapters = {name: make_adapter_of(folders[name], 3) for name in folders}
    late = make_adapter_of(folders["ant"], 4)
    own = {
        "adapters": [{"name": "of-bee", "path": str(adapters["bee"])}],
        "aliases": ["gpt-4o"],
        "max_context": 300,
    }
    first = {
        "adapters": [{"name": "of-ant", "path": str(adapters["ant"])}],
        "max_context": 400,
        "max_rows": 3,
    }
    with both(folders, bee=own, **first) as (bases, http):
        limits = {base.name: (base.config.max_context, base.config.max_rows) for base in bases.all()}
        assert limits == {"ant": (400, 3), "bee": (300, 3)}
        body = {"lora_name": "late", "lora_path": str(late)}
        for again in range(2):
            answer = http.post("/v1/load_lora_adapter", json={**body, "load_inplace": bool(again)})
            assert answer.status_code == 200, answer.text
        answers = {name: ask(http, name) for name in ("of-ant", "of-bee", "late", "gpt-4o", "ant")}
        assert len(set(answers.values())) == 5
        assert ask(http, "bee") == answers["gpt-4o"]
        cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
        assert {name: card["parent"] for name, card in cards.items()} == {
            "ant": None,
            "bee": None,
            "of-ant": "ant",
            "late": "ant",
            "of-bee": "bee",
        }
        assert (cards["ant"]["status"], cards["bee"]["status"]) == ("unloaded", "ready")
        assert (cards["bee"]["aliases"], cards["bee"]["context_window"]) == (["gpt-4o"], 300)
        assert cards["late"]["root"] == str(late)
        for name, wanted in answers.items():
            assert ask(http, name) == wanted
        assert http.get("/v1/models/late").json()["version"] == "late@2", "its files are as they were"
        taken = http.post("/v1/load_lora_adapter", json={**body, "lora_name": "of-bee"})
        assert taken.status_code == 400, "a file of the other base does not fit, or the name is taken"
        clash = {"lora_name": "of-ant", "lora_path": str(late), "base_model_name": "bee"}
        refused = http.post("/v1/load_lora_adapter", json=clash)
        assert "already the name of an adapter of model 'ant'" in refused.json()["error"]["message"]
        for name in ("bee", "gpt-4o"):
            refused = http.post("/v1/load_lora_adapter", json={**body, "lora_name": name})
            assert "already the name of a model" in refused.json()["error"]["message"]
        lost = http.post("/v1/load_lora_adapter", json={**body, "base_model_name": "cat"})
        assert (lost.status_code, "ant, bee" in lost.json()["error"]["message"]) == (404, True)
        ask(http, "bee")
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200
        assert http.get("/v1/models/late").status_code == 404


def test_models_are_loaded_and_unloaded_over_http_and_health_and_metrics_say_so(folders, alone):
    with both(folders) as (_, http):
        assert http.get("/health").json()["loaded"] == ["ant"]
        assert http.post("/v1/models/load", json={"model": "bee"}).json()["status"] == "ready"
        assert http.get("/health").json()["loaded"] == ["bee"]
        assert http.post("/v1/models/unload", json={"model": "bee"}).json()["status"] == "unloaded"
        assert http.get("/health").json() == {
            "status": "ok",
            "models": ["ant", "bee"],
            "problems": {},
            "loaded": [],
            "num_decoding": 0,
            "num_prefilling": 0,
            "num_waiting": 0,
        }
        assert http.get("/v1/cache/stats").json()["kv_bytes"] == 0
        assert http.post("/v1/models/load", json={"model": "cat"}).status_code == 404
        assert ask(http, "bee") == alone["bee"]
        text = http.get("/metrics").text
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert lines['lathe_model_loads_total{base="bee"}'] == "2.0"
        assert lines['lathe_model_state{base="ant",state="unloaded"}'] == "1.0"
        assert float(lines['lathe_model_load_seconds_total{base="bee"}']) > 0
        assert lines['lathe_generated_tokens_total{base="bee"}'] == "24.0"
        assert 'lathe_generated_tokens_total{base="ant"}' not in lines, "what is gone is not shown"
        assert lines['lathe_requests_total{endpoint="completions",finish="length",model="bee"}'] == "1.0"
        for name in ("ant", "bee"):
            http.post("/v1/models/unload", json={"model": name})
        assert ask(http, "bee") == alone["bee"]


def test_models_that_cannot_be_there_are_told_at_the_start_all_of_them(folders, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    others = [
        {"model": str(tmp_path / "nowhere"), "name": "a"},
        {"model": str(folders["bee"]), "name": "b"},
        {"model": str(tmp_path / "empty"), "name": "c"},
        {"model": "nobody-at-all/nothing", "name": "d"},
    ]
    config = ServeConfig(model=str(folders["ant"]), name="ant", models=others)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as refused:
        Bases.start(config)
    told = str(refused.value).splitlines()
    assert [line.partition(":")[0] for line in told] == ["models.0", "models.2", "models.3"]
    assert [
        word in line for word, line in zip(("nowhere", "empty", "HF_HUB_OFFLINE"), told, strict=True)
    ] == [True] * 3


def test_an_experiment_may_compare_two_bases(folders, alone, tmp_path):
    experiment = {"name": "which", "variants": [{"model": "ant"}, {"model": "bee"}]}
    store = f"sqlite:///{tmp_path / 'x.sqlite'}"
    with both(folders, experiments=[experiment], store=store) as (bases, http):
        answers = {ask(http, "which", user=f"user {i}") for i in range(12)}
        assert answers == set(alone.values())
        run = bases.experiments.runs["which"]
    written = Store(store, create=False)  # an answer's end is written behind the answer
    records = written.records(run.id)
    written.close()
    assert {record.variant for record in records} == {"ant", "bee"}
    assert len({record.content_hash for record in records}) == 2
    assert all(record.num_tokens == 24 for record in records)


def test_a_model_in_use_is_not_taken_away_and_a_client_that_leaves_does_not_end_the_load_for_others(
    folders, alone
):
    async def talk(url: str, bases: Bases) -> list[str]:
        body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:

            async def one(model: str) -> str:
                answer = await http.post("/v1/completions", json={**body, "model": model})
                return str(answer.json()["choices"][0]["text"])

            held = bases.pool.lease("ant")
            staying, leaving = (asyncio.ensure_future(one("bee")) for _ in range(2))
            while bases.pool.standings()[1].num_waiters < 2:
                await asyncio.sleep(0.001)
            leaving.cancel()
            while bases.pool.standings()[1].num_waiters > 1:
                await asyncio.sleep(0.001)
            back = asyncio.ensure_future(one("ant"))
            assert bases.pool.loaded().keys() == {"ant"}
            held.release()
            return await asyncio.gather(staying, back)

    with both(folders) as (bases, http):
        assert asyncio.run(talk(str(http.base_url), bases)) == [alone["bee"], alone["ant"]]


def test_a_base_that_nobody_asks_for_gives_its_memory_back(folders, alone):
    with both(folders, bee={"idle_unload_s": 0.05}, max_loaded_models=2) as (bases, http):
        assert ask(http, "bee") == alone["bee"]
        while "bee" in bases.pool.loaded():
            http.get("/health")
        assert ask(http, "bee") == alone["bee"]
        assert bases.pool.loaded().keys() >= {"ant"}


WRONG = {
    "models.0: 'ant' is already": {"name": "ant"},
    "aliases.0: 'x' is already": {"aliases": ["x", "x"]},
    "kv_bits: kv_bits is 7": {"kv_bits": 7},
    "max_loaded_models: found 1, and 2 models are loaded at start": {"preload": True},
    "max_loaded_models: found 1, and 1 models are pinned": {"pinned": True},
}


@pytest.mark.parametrize(("told", "keys"), WRONG.items(), ids=WRONG)
def test_a_configuration_that_cannot_be_served_is_refused_by_name(folders, told, keys):
    with pytest.raises(ValueError, match=told.split(":", maxsplit=1)[0]) as raised:
        config(folders, bee=keys)
    assert told.partition(": ")[2] in str(raised.value)


def test_a_model_in_an_allowed_folder_is_found_by_its_name_and_none_outside_of_it(folders, alone, tmp_path):
    inside = tmp_path / "models"
    (inside / "hive").mkdir(parents=True)
    shutil.copytree(folders["bee"], inside / "hive" / "bee")
    (inside / "leads-out").symlink_to(folders["bee"])
    (inside / "no-model").mkdir()
    runs = ServeConfig.model_validate(
        {"model": str(folders["ant"]), "name": "ant", "model_dirs": [str(inside)], "max_rows": 3}
    )
    bases = Bases.start(runs)
    try:
        with serving(bases) as url, httpx.Client(base_url=url, timeout=120) as http:
            listed = {card["id"]: card["status"] for card in http.get("/v1/models").json()["data"]}
            assert listed == {"ant": "ready", "hive/bee": "unloaded"}
            assert ask(http, "hive/bee") == alone["bee"]
            assert ask(http, "ant") == alone["ant"]
            assert bases.find("hive/bee").config.max_rows == 3
            for name, status in (
                ("leads-out", 403),
                ("../models/hive/bee", 403),
                ("no-model", 404),
                ("hive//bee", 404),
                ("bee", 404),
                (str(folders["bee"]), 403),
            ):
                answer = http.post("/v1/completions", json={"model": name, "prompt": "x", "max_tokens": 1})
                assert answer.status_code == status, name
            assert bases.pool.loaded().keys() == {"ant"}, "what is refused loads nothing"
    finally:
        bases.close()


OFFLINE = """
import sys
from serve.model.loading import resolve
for name in sys.argv[1:]:
    try:
        print(resolve(name))
    except LookupError as error:
        print(error)
"""


def test_a_hub_name_that_was_downloaded_is_loaded_without_the_hub_and_a_part_of_one_is_not(folders, tmp_path):
    """The cache is laid out as the hub's client does it."""
    whole, part = ((tmp_path / f"models--some-owner--{name}") for name in ("bee", "half"))
    for repository in (whole, part):
        shutil.copytree(folders["bee"], repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    (part / "snapshots" / "abc" / "model.safetensors").unlink()
    names = ["some-owner/bee", "some-owner/half", "some-owner/other"]
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *names], env=env, capture_output=True, text=True, check=True
    )
    found, half, other = done.stdout.splitlines()
    assert found == str(whole / "snapshots" / "abc")
    assert "a part of it alone, and HF_HUB_OFFLINE says not to ask the hub" in half
    assert "nor in the hub's cache, and HF_HUB_OFFLINE says not to ask the hub" in other


def test_a_model_that_brings_its_own_code_is_refused_and_told_so(folders, tmp_path):
    copy = tmp_path / "own"
    shutil.copytree(folders["bee"], copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_file": "own.py"}))
    (copy / "own.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match="Lathe runs no code that comes with a model"):
        load(str(copy))


def test_memory_is_kept_to_by_weights_that_are_known_before_they_are_loaded(folders):
    """Each has a quarter of a gibibyte for its rows and 0.4 MB of weights: of half of one, two never fit."""
    num_bytes = expected_bytes(folders["bee"], None, None, None)
    runtime = Runtime.start(ServeConfig(model=str(folders["bee"]), name="bee"))
    try:
        assert runtime.weight_bytes <= num_bytes < 1.2 * runtime.weight_bytes
    finally:
        runtime.close()
    few = {"memory_budget_gib": 0.25, "max_loaded_models": 2}
    for budget, loaded in ((0.5, {"bee"}), (0.51, {"ant", "bee"})):
        with both(folders, models_budget_gib=budget, **few) as (bases, http):
            ask(http, "bee")
            assert set(bases.pool.loaded()) == loaded
    with both(folders, models_budget_gib=0.3, bee={"memory_budget_gib": 0.5}, **few) as (bases, http):
        answer = http.post("/v1/completions", json={"model": "bee", "prompt": "x", "max_tokens": 1})
        assert (answer.status_code, "there is no room for it" in answer.text) == (503, True)
        assert set(bases.pool.loaded()) == {"ant"}, "nobody leaves in vain"


SAID = [{"role": "user", "content": "Hi"}]
STREAMS = {
    "/v1/chat/completions": ({"messages": SAID, "max_tokens": 8, "stream": True}, "[DONE]"),
    "/v1/responses": ({"input": "Hi", "max_output_tokens": 16, "stream": True}, '"response.'),
    "/v1/messages": ({"messages": SAID, "max_tokens": 8, "stream": True}, "message_stop"),
    "/api/chat": ({"messages": SAID, "options": {"num_predict": 8}}, '"done":true'),
}


@pytest.mark.parametrize(("path", "body"), [(path, body) for path, (body, _) in STREAMS.items()])
def test_streams_of_every_api_hear_something_while_a_model_is_loaded_and_then_have_their_answer(
    folders, path, body
):
    with both(folders, stream_keep_alive_s=0.02) as (bases, http):
        held = bases.pool.lease("ant")
        with http.stream("POST", path, json={"model": "bee", **body}) as answer:
            assert answer.status_code == 200
            pieces = answer.iter_raw()
            first = next(pieces)
            assert bases.pool.loaded().keys() == {"ant"}, "nothing is loaded yet"
            assert first.startswith((b": ", b"event: ping")) or b'"content":""' in first
            held.release()
            text = b"".join(pieces).decode()
        assert STREAMS[path][1] in text.replace(" ", "")
        assert '"error":{' not in text.replace(" ", "")


@pytest.mark.parametrize(
    ("path", "body"), [("/tokenize", {"messages": SAID}), ("/v1/responses/input_tokens", {"input": "x"})]
)
def test_what_is_no_stream_stays_json_however_long_its_model_is_in_coming(folders, path, body):
    """Though its body, a chat's, asks for a stream."""
    with both(folders, stream_keep_alive_s=0.02) as (bases, http), ThreadPoolExecutor() as threads:
        held = bases.pool.lease("ant")
        counted = threads.submit(http.post, path, json={"model": "bee", "stream": True, **body})
        beside = {"model": "bee", "prompt": "x", "max_tokens": 1, "stream": True}
        with http.stream("POST", "/v1/completions", json=beside) as answer:
            comments = answer.iter_raw()
            for _ in range(5):
                assert next(comments).startswith(b": keep-alive")
            held.release()
            assert b"[DONE]" in b"".join(comments)
        assert counted.result().headers["content-type"] == "application/json"
        assert set(counted.result().json()) & {"count", "input_tokens"}


def test_a_request_with_a_deadline_waits_no_longer_for_a_model_than_that(folders):
    with both(folders) as (bases, http):
        held = bases.pool.lease("ant")
        for path, body in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": SAID})):
            late = http.post(f"/v1/{path}", json={"model": "bee", "max_tokens": 1, "timeout": 0.05, **body})
            assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
            assert "while it waited for model 'bee'" in late.json()["error"]["message"]
        assert bases.pool.standings()[1].num_waiters == 0
        held.release()
