"""Models that leave memory and come back over HTTP: as Ollama's clients ask for it, after an engine has broken, and
with all the versions of their adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import ollama
import pytest
from tiny import QWEN3
from waiting import until

from serve.api.bases import Bases
from serve.api.server import serving
from serve.config import ServeConfig


@contextmanager
def served(folder, **keys: Any) -> Iterator[tuple[Bases, httpx.Client]]:
    bases = Bases.start(ServeConfig.model_validate({"model": str(folder), "name": "ant", **keys}))
    try:
        with serving(bases) as url, httpx.Client(base_url=url, timeout=60) as http:
            yield bases, http
        bases.pool.check_integrity()
    finally:
        bases.close()


@pytest.fixture(scope="module")
def folder(make_model):
    return make_model("returning", QWEN3, seed=21)


@pytest.fixture(scope="module")
def server(folder):
    with served(folder) as both:
        yield both


def ask(http: httpx.Client, model: str = "ant", **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": "Who are you?", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    return http.post("/v1/completions", json={**body, **fields})


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_ollamas_client_stops_a_model_and_the_next_request_loads_it(server):
    bases, http = server
    client = ollama.Client(str(http.base_url))
    for say in (client.generate, client.chat):
        assert say(model="ant", keep_alive="10m").done_reason == "load"
        (running,) = client.ps().models
        left_s = (running.expires_at - running.expires_at.now(running.expires_at.tzinfo)).total_seconds()
        assert 590 < left_s < 601
        stopped = say(model="ant", keep_alive=0)
        assert (stopped.done, stopped.done_reason) == (True, "unload")
        until(lambda: not client.ps().models)
        assert say(model="ant:latest", keep_alive=0).done_reason == "unload", "it has gone already"
        answer = client.generate(model="ant", prompt="hi", options={"num_predict": 4})
        assert answer.eval_count == 4
    with pytest.raises(ollama.ResponseError, match="not served"):
        client.generate(model="bat", keep_alive=0)
    bases.pool.check_integrity()


def test_a_model_that_is_to_leave_at_once_leaves_nobodys_answer(server):
    bases, http = server
    client = ollama.Client(str(http.base_url))
    options = {"num_predict": 600, "temperature": 0}  # drawn at random, one answer in many is short
    stream = client.generate(model="ant", prompt="hi", stream=True, options=options)
    first = next(stream)
    assert client.generate(model="ant", keep_alive=0).done_reason == "unload"
    beside = client.generate(model="ant", prompt="hi", options={"num_predict": 4})
    assert beside.eval_count == 4, "it takes requests as long as it is there"
    last = [first, *stream][-1]
    assert last.done
    assert last.done_reason == "stop" or last.eval_count == 600, "it was not cut"
    assert last.eval_count > 100
    until(lambda: not bases.pool.loaded())


@pytest.mark.parametrize(
    ("said", "stays"), [(0, False), ("20ms", False), (-1, True), ("-1m", True), ("1h30m", True)]
)
def test_an_answers_keep_alive_says_how_long_its_model_stays(server, said, stays):
    bases, http = server
    loads = bases.pool.standings()[0].num_loads
    fields = {"model": "ant", "prompt": "hi", "stream": False, "options": {"num_predict": 2}}
    assert http.post("/api/generate", json={**fields, "keep_alive": said}).status_code == 200
    if stays:
        assert http.post("/api/generate", json=fields).status_code == 200
        assert bases.pool.loaded(), "what says nothing changes nothing"
        idle_s = bases.pool.standings()[0].idle_s
        assert idle_s is None if "1h" not in str(said) else 5390 < idle_s <= 5400
    else:
        until(lambda: not bases.pool.loaded())
        assert http.post("/api/generate", json=fields).status_code == 200
        assert bases.pool.standings()[0].num_loads > loads
        assert bases.pool.standings()[0].idle_s is None, "it is as the configuration says again"
    assert http.post("/api/generate", json={**fields, "keep_alive": "soon"}).status_code == 400


def test_only_a_key_that_may_unload_models_does_so_by_their_words(folder, tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text(
        "keys:\n"
        "  - {name: admin, key: sk-admin-0123456789abcdef, admin: true}\n"
        "  - {name: plain, key: sk-plain-0123456789abcdef}\n"
    )
    with served(folder, api_keys=str(keys)) as (bases, http):
        body = {"model": "ant", "keep_alive": 0, "stream": False}
        plain = {"Authorization": "Bearer sk-plain-0123456789abcdef"}
        assert http.post("/api/generate", json=body, headers=plain).status_code == 403
        spoken = {**body, "prompt": "hi", "options": {"num_predict": 2}}
        assert http.post("/api/generate", json=spoken, headers=plain).status_code == 200
        assert bases.pool.standings()[0].idle_s is None
        assert bases.pool.loaded()
        admin = {"Authorization": "Bearer sk-admin-0123456789abcdef"}
        assert http.post("/api/generate", json=body, headers=admin).json()["done_reason"] == "unload"
        until(lambda: not bases.pool.loaded())


def break_engine(bases: Bases) -> None:
    """Its next steps fail, each and every one."""
    (services,) = bases.pool.loaded().values()
    services.runtime.worker.call(lambda: setattr(services.runtime.engine._runner, "start", None))


def test_a_base_whose_engine_broke_is_loaded_afresh_but_not_in_a_loop(folder):
    with served(folder) as (bases, http):
        wanted = text(ask(http))
        for count in (1, 2, 3):
            break_engine(bases)
            assert {ask(http).status_code for _ in range(2)} <= {500, 503}
            until(lambda: not bases.pool.loaded())
            (standing,) = bases.pool.standings()
            assert standing.num_breaks == count
            assert "NoneType" in standing.problem
            health, live = http.get("/health"), http.get("/health/live")
            if count == 1:
                assert (health.status_code, live.status_code) == (200, 200), health.text
                assert "NoneType" in health.json()["problems"]["ant"]
            refused = ask(http) if count > 1 else None
            if bases.pool.standings()[0].retry_s:  # else this machine was too slow to see it
                assert refused is not None
                assert (health.status_code, live.status_code) == (503, 200 if count < 3 else 503)
                assert refused.status_code == 503
                assert "broken" in refused.json()["error"]["message"]
                assert 0 < int(refused.headers["Retry-After"]) <= count
                until(lambda: not bases.pool.standings()[0].retry_s)
            assert text(ask(http)) == wanted
            assert http.get("/health").json()["problems"] == {}


def test_a_base_that_comes_back_has_the_earlier_versions_of_its_adapters(folder, make_adapter_of, tmp_path):
    paths = [str(make_adapter_of(folder, seed)) for seed in (1, 2, 3)]
    with served(folder) as (bases, http):
        for path in paths:
            body = {"lora_name": "a", "lora_path": path, "load_inplace": True}
            assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        answers = {name: text(ask(http, name)) for name in ("a@1", "a@2", "a@3")}
        assert len(set(answers.values())) == 3
        assert http.post("/v1/adapters/a/rollback", json={"version": 2}).status_code == 200
        before = http.get("/v1/adapters/a").json()
        for _ in range(2):
            assert http.post("/v1/models/unload", json={"model": "ant"}).status_code == 200
            assert text(ask(http, "a")) == answers["a@2"], "the current one is the current one"
        after = http.get("/v1/adapters/a").json()
        for shown in (before, after):
            assert [(each["version"], each["content_hash"]) for each in shown["versions"]] == [
                (each["version"], each["content_hash"]) for each in before["versions"]
            ]
        assert {name: text(ask(http, name)) for name in answers} == answers
        assert http.post("/v1/adapters/a/rollback", json={}).status_code == 200
        assert http.get("/v1/models/a").json()["version"] == "a@1"
        assert text(ask(http, "a")) == answers["a@1"]
        (services,) = bases.pool.loaded().values()
        services.runtime.registry.check_integrity()
        body = {"lora_name": "a", "lora_path": paths[0], "load_inplace": True}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert http.get("/v1/models/a").json()["version"] == "a@4"
