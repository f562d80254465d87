"""An experiment end to end: split, headers, exposures, feedback, and the report read from the file alone."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import openai
import pytest

from serve.api.server import serving
from serve.config import ServeConfig
from serve.experiments.assignment import assign
from serve.experiments.report import report
from serve.experiments.store import Store
from serve.runtime import Runtime

VARIANTS = [{"model": "x", "name": "treated"}, {"model": "lively", "name": "base"}]
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def runtime(model_folder, make_adapter, tmp_path):
    config = ServeConfig(
        model=str(model_folder),
        name="lively",
        adapters=[{"name": "x", "path": make_adapter(1)}],
        experiments=[{"name": "test", "variants": VARIANTS}],
        store=f"sqlite:///{tmp_path}/e.sqlite",
    )
    started = Runtime.start(config)
    yield started
    started.close()


@pytest.fixture
def http(runtime):
    with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture
def ask(http):
    """ask(user, **fields) → the response's JSON and headers."""

    def post(user: str | None, **fields) -> tuple[dict, httpx.Headers]:
        body = {
            "model": "test",
            "messages": MESSAGES,
            "max_tokens": 3,
            "ignore_eos": True,
            "user": user,
            **fields,
        }
        answer = http.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        return answer.json(), answer.headers

    return post


def test_a_user_meets_the_variant_of_the_hash_each_time_and_the_headers_say_so(ask, runtime):
    experiment = runtime.experiments["test"].experiment
    met = set()
    for user in (f"u{i}" for i in range(8)):
        variant = assign(experiment, user)
        for _ in range(2):
            body, headers = ask(user)
            assert headers["x-lathe-variant"] == variant.name
            assert headers["x-lathe-model"] == {"treated": "x@1", "base": "lively"}[variant.name]
            assert body["model"] == "test"
        met.add(variant.name)
    assert met == {"treated", "base"}


def test_the_public_name_answers_as_the_model_behind_it(ask):
    for user in ("u0", "u1", "u2", "u3"):
        body, headers = ask(user, seed=1, max_tokens=12)
        direct, _ = ask(None, seed=1, max_tokens=12, model=headers["x-lathe-model"])
        assert body["choices"] == direct["choices"]


def test_exposures_and_feedback_reach_the_report(ask, http, tmp_path):
    for i in range(12):
        body, headers = ask(f"u{i}")
        value = float(headers["x-lathe-variant"] == "treated")
        for sent in (0.5, value):
            answer = http.post("/v1/feedback", json={"id": body["id"], "name": "exact_match", "value": sent})
            assert answer.status_code == 200
    store = Store(f"sqlite:///{tmp_path}/e.sqlite", create=False)
    treated, base = report(store, "test").variants
    assert treated.num_units + base.num_units == 12
    assert treated.num_outcomes == treated.num_exposures
    assert (treated.mean, base.mean) == (1.0, 0.0)
    assert next(iter(treated.versions)).startswith("x@1 ")
    assert treated.finishes == {"length": treated.num_exposures}
    assert treated.latency.p50_s >= treated.latency.ttft_p50_s > 0
    store.close()


def test_feedback_may_follow_the_end_of_a_stream_at_once(http):
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="none", max_retries=0) as client:
        for i in range(5):
            chunks = client.chat.completions.create(
                model="test", messages=MESSAGES, max_tokens=2, stream=True, user=f"u{i}"
            )
            finished = next(chunk for chunk in chunks if chunk.choices[0].finish_reason)
            sent = http.post("/v1/feedback", json={"id": finished.id, "name": "ok", "value": 1})
            assert sent.status_code == 200
            chunks.close()


def test_an_answer_does_not_end_before_its_exposure_is_written(http, tmp_path):
    other_replica = sqlite3.connect(tmp_path / "e.sqlite", isolation_level=None)
    body = {"model": "test", "messages": MESSAGES, "max_tokens": 2}
    with ThreadPoolExecutor(1) as pool:
        other_replica.execute("BEGIN IMMEDIATE")
        answer = pool.submit(http.post, "/v1/chat/completions", json=body)
        with pytest.raises(TimeoutError):
            answer.result(timeout=1)
        other_replica.execute("COMMIT")
        completion = answer.result(timeout=120).json()["id"]
    found = other_replica.execute("SELECT completion_id FROM exposures").fetchall()
    other_replica.close()
    assert found == [(completion,)]


def test_what_feedback_cannot_take_is_refused_by_its_name(ask, http):
    body, _ = ask("u1")
    direct, _ = ask("u1", model="x")
    for fields, status, param in [
        ({"id": "nope", "name": "ok", "value": 1.0}, 404, "id"),
        ({"id": direct["id"], "name": "ok", "value": 1.0}, 404, "id"),
        ({"id": body["id"], "name": "ok", "value": 1.5}, 400, "value"),
        ({"id": body["id"], "name": "ok"}, 400, "value"),
        ({"id": body["id"], "name": "", "value": 1.0}, 400, "name"),
        ({"id": body["id"], "name": "ok", "value": 1.0, "comment": "x"}, 400, "comment"),
    ]:
        answer = http.post("/v1/feedback", json=fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_without_a_user_each_completion_is_its_own_unit(ask, tmp_path, runtime):
    ids = [ask(None)[0]["id"] for _ in range(4)]
    runtime.recorder.close()
    store = Store(f"sqlite:///{tmp_path}/e.sqlite", create=False)
    records = store.records(store.newest_run("test").id)
    assert [record.unit for record in records] == [record.completion_id for record in records] == ids
    store.close()


def test_a_variant_whose_adapter_is_not_loaded_answers_503_naming_both_and_recovers(
    ask, http, runtime, make_adapter
):
    experiment = runtime.experiments["test"].experiment
    user = next(u for u in map(str, range(99)) if assign(experiment, u).name == "treated")
    other = next(u for u in map(str, range(99)) if assign(experiment, u).name == "base")
    http.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
    body = {"model": "test", "messages": MESSAGES, "max_tokens": 1, "user": user}
    answer = http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "variant_not_loaded")
    assert "'treated'" in answer.json()["error"]["message"]
    assert "adapter 'x'" in answer.json()["error"]["message"]
    assert "retry-after" in answer.headers
    ask(other)
    http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(make_adapter(2))})
    assert ask(user)[1]["x-lathe-model"] == "x@2"


def test_an_experiments_name_is_listed_and_taken(http, make_adapter):
    cards = {card["id"]: card for card in http.get("/v1/models").json()["data"]}
    assert cards["test"]["variants"] == ["treated", "base"]
    assert cards["test"]["parent"] == "lively"
    fields = {"lora_name": "test", "lora_path": str(make_adapter(1))}
    answer = http.post("/v1/load_lora_adapter", json=fields)
    assert answer.status_code == 400
    assert "experiment" in answer.json()["error"]["message"]


def test_a_stream_that_is_left_keeps_its_exposure_and_says_cancelled(http, runtime, tmp_path):
    body = {"model": "test", "messages": MESSAGES, "max_tokens": 900, "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
    store = Store(f"sqlite:///{tmp_path}/e.sqlite", create=False)
    run = store.newest_run("test")
    while not (records := store.records(run.id)) or records[0].finish is None:
        pass
    assert records[0].finish == "cancelled"
    assert 0 < records[0].num_tokens < 900
    store.close()


def test_a_store_that_cannot_be_written_does_not_cost_the_answer(ask, http, runtime):
    runtime.recorder.store._engine.dispose()
    with runtime.recorder.store._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE outcomes")
        connection.exec_driver_sql("DROP TABLE exposures")
    assert ask("u1")[0]["choices"]
    assert "lathe_exposures_lost_total 0.0" not in http.get("/metrics").text


def test_feedback_without_experiments_is_404(model_folder):
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively"))
    with closing(runtime), serving(runtime) as url, httpx.Client(base_url=url) as http:
        answer = http.post("/v1/feedback", json={"id": "a", "name": "b", "value": 0})
    assert answer.status_code == 404
