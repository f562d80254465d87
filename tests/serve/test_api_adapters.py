"""Adapters over HTTP, as vLLM has them: loading, replacing and unloading while others stream."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import httpx
import openai
import pytest

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import read_tensors, write_adapter
from serve.api.adapters import allowed_path
from serve.api.server import serving
from serve.config import ServeConfig
from serve.errors import ForbiddenError, NotFoundError
from serve.runtime import Runtime

LONG = {"prompt": "hello there", "max_tokens": 300, "seed": 1, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def runtime(model_folder):
    started = Runtime.start(ServeConfig(model=str(model_folder), name="lively"))
    yield started
    started.engine.registry.check_integrity()
    started.close()


@pytest.fixture
def url(runtime):
    with serving(runtime) as found:
        yield found


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture
def post(http) -> Callable[..., httpx.Response]:
    """post(verb, **fields) → the answer of /v1/{verb}_lora_adapter."""
    return lambda verb, **fields: http.post(f"/v1/{verb}_lora_adapter", json=fields)


def test_load_list_replace_and_unload_answer_as_vllm_does(post, client, make_adapter):
    first, second = str(make_adapter(1)), str(make_adapter(2))
    added = post("load", lora_name="x", lora_path=first)
    assert added.status_code == 200
    first_line, count = added.text.splitlines()
    assert first_line == "Success: LoRA adapter 'x' added successfully."
    assert count == "x@1 adapts 14 modules, rank 4."
    card = client.models.retrieve("x")
    assert (card.parent, card.root, card.version) == ("lively", first, "x@1")
    assert client.models.retrieve("x@1").id == "x@1"

    again = post("load", lora_name="x", lora_path=second)
    assert again.status_code == 400
    assert "has already been loaded" in again.json()["error"]["message"]
    assert client.models.retrieve("x").root == first

    assert post("load", lora_name="x", lora_path=second, load_inplace=True).status_code == 200
    assert client.models.retrieve("x").version == "x@2"
    assert [model.id for model in client.models.list()] == ["lively", "x"]

    removed = post("unload", lora_name="x", lora_int_id=None)
    assert (removed.status_code, removed.text) == (200, "Success: LoRA adapter 'x' removed successfully.")
    assert [model.id for model in client.models.list()] == ["lively"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("x")


def test_what_cannot_be_loaded_or_unloaded_says_why(post, make_adapter, tmp_path, runtime):
    path = str(make_adapter(1))
    missing = post("load", lora_name="x", lora_path=str(tmp_path / "nope"))
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "lora_path")
    unknown = post("unload", lora_name="x")
    assert (unknown.status_code, unknown.json()["error"]["message"]) == (
        404,
        "The lora adapter 'x' cannot be found.",
    )
    for fields, told in [
        ({"lora_name": "", "lora_path": path}, "must be provided"),
        ({"lora_name": "x"}, "lora_path: missing"),
        ({"lora_name": "x", "lora_path": path, "lora_int_id": 3}, "lora_int_id"),
        ({"lora_name": "x", "lora_path": path, "inplace": True}, "did you mean load_inplace"),
        ({"lora_name": "lively", "lora_path": path}, "not the base's"),
        ({"lora_name": "x@1", "lora_path": path}, "'@'"),
        ({"lora_name": "x\r\nset-cookie: a=b", "lora_path": path}, "printable characters"),
        ({"lora_name": " x", "lora_path": path}, "begins nor ends with a space"),
        ({"lora_name": "x" * 300, "lora_path": path}, "at most 256 characters"),
        ({"lora_name": "x", "lora_path": str(tmp_path)}, str(tmp_path)),
    ]:
        answer = post("load", **fields)
        assert answer.status_code == 400
        assert told in answer.json()["error"]["message"]
    assert runtime.registry.names() == []


def test_a_stream_keeps_its_version_while_its_name_is_replaced_and_removed(
    post, client, make_adapter, runtime
):
    post("load", lora_name="x", lora_path=str(make_adapter(1)))
    alone = client.completions.create(model="x", **LONG).choices[0].text

    stream = client.completions.create(model="x", stream=True, **LONG)
    text = next(stream).choices[0].text
    assert post("load", lora_name="x", lora_path=str(make_adapter(2)), load_inplace=True).status_code == 200
    other = client.completions.create(model="x", **{**LONG, "max_tokens": 12}).choices[0].text
    assert post("unload", lora_name="x").status_code == 200
    assert runtime.worker.stats().num_decoding == 1, "the stream ended before the adapter left"
    text += "".join(chunk.choices[0].text for chunk in stream)

    assert text == alone
    assert not alone.startswith(other)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="x", **LONG)
    assert runtime.registry.versions() == []
    runtime.worker.call(lambda: None)  # behind what the stream's end left to do
    assert runtime.engine.bank.num_bytes == 0


def test_a_running_stream_goes_on_while_an_adapter_loads(post, client, make_adapter):
    alone = client.completions.create(model="lively", **LONG).choices[0].text
    stream = client.completions.create(model="lively", stream=True, **LONG)
    text = next(stream).choices[0].text
    loads = [
        threading.Thread(
            target=post, args=("load",), kwargs={"lora_name": f"x{i}", "lora_path": str(make_adapter(i))}
        )
        for i in (1, 2, 3)
    ]
    for load in loads:
        load.start()
    text += "".join(chunk.choices[0].text for chunk in stream)
    for load in loads:
        load.join()
    assert text == alone
    assert {model.id for model in client.models.list()} == {"lively", "x1", "x2", "x3"}


def test_loads_that_wait_keep_no_thread_from_anybody_else(post, http, client, make_adapter, runtime):
    """More of them than the threads that all requests share: forty, as Starlette has them."""
    folder = str(make_adapter(1))
    with ThreadPoolExecutor(48) as asking, httpx.Client(base_url=http.base_url, timeout=60) as other:
        with runtime.registry._turn("a"):  # somebody makes a version of it, from a slow disk
            loads = [
                asking.submit(post, "load", lora_name="a", lora_path=folder, load_inplace=True)
                for _ in range(48)
            ]
            while runtime.registry._busy["a"].num_waiting < 2:
                other.get("/health", timeout=5)
            for _ in range(20):  # those on their way have come meanwhile
                assert other.get("/v1/models", timeout=5).status_code == 200
            asked = {**LONG, "max_tokens": 2}
            assert client.completions.create(model="lively", timeout=5, **asked).choices[0].text
            assert not any(load.done() for load in loads)
        assert {load.result().status_code for load in loads} == {200}
    assert runtime.registry.resolve("a").number == 48


def test_the_only_adapter_there_may_be_is_replaced_again_and_again_under_its_streams(
    model_folder, make_adapter
):
    """A checkpoint that is watched does this: every version is served to the end of the requests that hold it."""
    config = ServeConfig(model=str(model_folder), name="lively", max_adapters=1)
    runtime = Runtime.start(config)
    with closing(runtime):
        ask = {"prompt": "hello there", "max_tokens": 120, "seed": 1, "ignore_eos": True}
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:

            def load(name: str, seed: int) -> httpx.Response:
                fields = {"lora_name": name, "lora_path": str(make_adapter(seed)), "load_inplace": True}
                return http.post("/v1/load_lora_adapter", json=fields)

            def answer(model: str) -> str:
                return http.post("/v1/completions", json={**ask, "model": model}).json()["choices"][0]["text"]

            alone = {}
            for seed in (1, 2, 3):
                assert load("x", seed).status_code == 200
                alone[seed] = answer("x")
            answers: dict[int, str] = {}
            threads = []
            for number in range(6):
                assert load("x", 1 + number % 3).status_code == 200
                name = runtime.registry.resolve("x").id
                threads.append(
                    threading.Thread(target=lambda n=number, m=name: answers.update({n: answer(m)}))
                )
                threads[-1].start()
                while (
                    runtime.registry.num_pins(runtime.registry.resolve(name)) == 0 and threads[-1].is_alive()
                ):
                    threads[-1].join(0.001)
            for thread in threads:
                thread.join()
            assert answers == {number: alone[1 + number % 3] for number in range(6)}
            assert http.post("/v1/unload_lora_adapter", json={"lora_name": "x"}).status_code == 200
            runtime.worker.call(lambda: None)
            assert "lathe_adapter_bytes 0.0" in http.get("/metrics").text
            runtime.registry.check_integrity()


def test_an_adapter_that_memory_has_no_room_for_is_a_507_and_others_are_served_on(model_folder, make_adapter):
    config = ServeConfig(model=str(model_folder), name="lively", adapter_budget_gib=0.001)
    runtime = Runtime.start(config)
    with closing(runtime), serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:

        def load(name: str, rank: int) -> httpx.Response:
            fields = {"lora_name": name, "lora_path": str(make_adapter(1, rank=rank))}
            return http.post("/v1/load_lora_adapter", json=fields)

        assert load("x", 4).status_code == 200
        there = runtime.engine.bank.num_bytes
        refused = load("big", 64)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "adapter_memory")
        assert "raise adapter_budget_gib" in refused.json()["error"]["message"]
        assert f"lathe_adapter_bytes {float(there)}" in http.get("/metrics").text
        asked = {"model": "x", "prompt": "hello", "max_tokens": 3}
        assert http.post("/v1/completions", json=asked).status_code == 200


def test_another_chat_template_is_told_in_the_answer_to_a_load(post, make_adapter, runtime, tmp_path):
    lineage = Lineage("lively", runtime.model.fingerprint, "sha256:0", "", "", "", "0")
    tensors = read_tensors(make_adapter(1))
    write_adapter(tmp_path / "a", tensors, AdapterConfig("lora", -1, 4, 2.0, lineage=lineage))
    answer = post("load", lora_name="x", lora_path=str(tmp_path / "a"))
    assert answer.status_code == 200
    first, _, third = answer.text.splitlines()
    assert first == "Success: LoRA adapter 'x' added successfully."
    assert third.startswith("Warning: adapter 'x' was trained with another chat template")


def test_every_pin_is_given_back_however_a_request_ends(post, client, make_adapter, runtime):
    post("load", lora_name="x", lora_path=str(make_adapter(1)))
    version = runtime.registry.resolve("x")
    client.completions.create(model="x", prompt="a", max_tokens=3, n=3)
    list(client.completions.create(model="x@1", prompt="a", max_tokens=3, stream=True))
    for broken in ({"max_tokens": 0}, {"prompt": [10**6]}, {"prompt": "x" * 2000}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**{"model": "x", "prompt": "a", **broken})
    assert runtime.registry.num_pins(version) == 0


def test_beyond_loopback_only_listed_roots_may_be_read_links_followed(tmp_path):
    inside, outside = tmp_path / "roots" / "a", tmp_path / "secret"
    inside.mkdir(parents=True)
    outside.mkdir()
    (tmp_path / "roots" / "link").symlink_to(outside)
    local = ServeConfig(model="m")
    closed = ServeConfig(model="m", host="0.0.0.0")
    listed = ServeConfig(model="m", host="0.0.0.0", allowed_adapter_roots=(tmp_path / "roots",))
    assert allowed_path(str(outside), local) == outside
    assert allowed_path(str(inside), listed) == inside
    with pytest.raises(ForbiddenError, match="names no allowed_adapter_roots"):
        allowed_path(str(inside), closed)
    for path in (
        outside,
        tmp_path / "roots" / "link",
        tmp_path / "roots" / ".." / "secret",
        tmp_path / "nope",
    ):
        with pytest.raises(ForbiddenError, match="under none"):
            allowed_path(str(path), listed)
    with pytest.raises(NotFoundError):
        allowed_path(str(tmp_path / "roots" / "nope"), listed)


def test_a_forbidden_path_is_403(model_folder, make_adapter, tmp_path):
    config = ServeConfig(model=str(model_folder), name="lively", allowed_adapter_roots=(tmp_path,))
    runtime = Runtime.start(config)
    with closing(runtime), serving(runtime) as url, httpx.Client(base_url=url) as http:
        fields = {"lora_name": "x", "lora_path": str(make_adapter(1))}
        answer = http.post("/v1/load_lora_adapter", json=fields)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
