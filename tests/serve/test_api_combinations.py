"""`model: "a:0.7+b:0.3"` over HTTP: every endpoint, experiments, updates, eviction, and what is refused."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from typing import Any

import httpx
import pytest

from serve.adapters.sums.expression import MOST_TERMS
from serve.adapters.tools.merging import Merge
from serve.adapters.tools.writing import merge
from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

MESSAGES = [{"role": "user", "content": "hello there"}]
SUM = "a:0.7+b:-0.3"
SERVED = "a@1:0.7+b@1:-0.3"
BODIES = {
    "chat": ("/v1/chat/completions", {"messages": MESSAGES}),
    "completions": ("/v1/completions", {"prompt": "hello there"}),
}
DRAWN = {"max_tokens": 16, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def merged(make_adapter, tmp_path_factory):
    """The same sum as an adapter of its own, made offline."""
    folder = tmp_path_factory.mktemp("merged") / "cat"
    merge([f"{make_adapter(1)}:0.7", f"{make_adapter(2)}:-0.3"], folder, Merge("cat"), None)
    return folder


@pytest.fixture
def start(model_folder, make_adapter):
    """start(**keys of the configuration) → a client of a server with adapters a and b."""
    adapters = [{"name": "a", "path": str(make_adapter(1))}, {"name": "b", "path": str(make_adapter(2))}]
    with ExitStack() as opened:

        def start(**keys: Any) -> httpx.Client:
            config = {"model": str(model_folder), "name": "lively", "adapters": adapters, **keys}
            runtime = opened.enter_context(closing(Runtime.start(ServeConfig(**config))))
            opened.callback(check_nothing_is_held, runtime)
            url = opened.enter_context(serving(runtime))
            return opened.enter_context(httpx.Client(base_url=url, timeout=60))

        yield start


def check_nothing_is_held(runtime: Runtime) -> None:
    runtime.engine.registry.check_integrity()
    assert all(runtime.registry.num_pins(version) == 0 for version in runtime.registry.versions())


@pytest.fixture
def http(start) -> httpx.Client:
    return start()


def texts(
    http: httpx.Client, model: str, endpoint: str, *, stream: bool, **fields: Any
) -> tuple[list[str], str]:
    """Of each choice its text, and what the headers say was served."""
    path, body = BODIES[endpoint]
    asked = {**body, **DRAWN, "model": model, "stream": stream, **fields}
    with http.stream("POST", path, json=asked) as answer:
        answer.read()
        assert answer.status_code == 200, answer.text
        if not stream:
            choices = answer.json()["choices"]
            found = {
                c["index"]: c["message"]["content"] if endpoint == "chat" else c["text"] for c in choices
            }
            assert answer.json()["model"] == model
        else:
            found = {}
            lines = [
                line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")
            ]
            for choice in (choice for line in lines for choice in json.loads(line)["choices"]):
                part = choice["delta"].get("content") if endpoint == "chat" else choice["text"]
                found[choice["index"]] = found.get(choice["index"], "") + (part or "")
    return [found[index] for index in sorted(found)], answer.headers["x-lathe-model"]


@pytest.mark.parametrize("num_choices", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", BODIES)
def test_every_endpoint_answers_as_the_merged_adapter_would(endpoint, stream, num_choices, http, merged):
    loaded = http.post("/v1/load_lora_adapter", json={"lora_name": "whole", "lora_path": str(merged)})
    assert loaded.status_code == 200, loaded.text
    options = {"stream": stream, "n": num_choices, "temperature": 0.0 if num_choices == 1 else 1.0}
    wanted, _ = texts(http, "whole", endpoint, **options)
    found, served = texts(http, SUM, endpoint, **options)
    assert served == SERVED
    assert found == wanted
    assert len(found) == num_choices
    for other in ("a", "b", "lively"):
        assert texts(http, other, endpoint, **options)[0] != found, other
    swapped, served = texts(http, "b:-0.3+a:0.7", endpoint, **options)
    assert (swapped, served) == (found, SERVED)


def test_prefixes_are_its_own_whatever_the_order(http):
    prompt = "a prompt of some length " * 12

    def cached(model: str) -> int:
        body = {"model": model, "prompt": prompt, "max_tokens": 1}
        usage = http.post("/v1/completions", json=body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [cached(model) for model in ("a", "b", "a:0.5+b:0.5")] == [0, 0, 0]
    assert cached("b:0.5+a:0.25+a:0.25") > 200
    assert cached("a:0.5+b:0.25") == 0
    assert cached("a:1.0") > 200  # all of one is that one
    assert cached("a:0+b") > 200


def test_nothing_of_anything_is_the_base(http):
    found, served = texts(http, "a:0+b:0", "chat", stream=False, temperature=0.0)
    assert served == "lively"
    assert found == texts(http, "lively", "chat", stream=False, temperature=0.0)[0]
    assert texts(http, "a:0.5+a:-0.5", "chat", stream=False, temperature=0.0)[1] == "lively"
    assert texts(http, "a:1+b:0", "chat", stream=False, temperature=0.0)[1] == "a@1"


def test_an_update_makes_another_combination(http, make_adapter):
    options = {"stream": False, "temperature": 0.0}
    before, served = texts(http, SUM, "chat", **options)
    http.post(
        "/v1/load_lora_adapter",
        json={"lora_name": "a", "lora_path": str(make_adapter(3)), "load_inplace": True},
    )
    after, served_now = texts(http, SUM, "chat", **options)
    assert (served, served_now) == (SERVED, "a@2:0.7+b@1:-0.3")
    assert before != after
    # The older version is known, and so is what it was added to.
    assert texts(http, "a@1:0.7+b:-0.3", "chat", **options) == (before, SERVED)
    assert texts(http, served, "chat", **options) == (before, SERVED)


def test_combinations_share_slots_with_everybody(start):
    """Of one slot, whoever is asked for has it."""
    http, wide = start(max_adapters=1), start()
    options = {"stream": False, "temperature": 0.0}
    models = (SUM, "a", "b", "a:0.5+b:0.5", SUM, "a", "b:2")
    wanted = [texts(wide, model, "chat", **options) for model in models]
    assert [texts(http, model, "chat", **options) for model in models] == wanted
    assert http.get("/v1/adapters").json()["evicted"] > 0


def test_combinations_are_listed_apart(http):
    texts(http, SUM, "chat", stream=False)
    cards = {card["name"]: card for card in http.get("/v1/adapters").json()["data"]}
    assert cards.keys() == {"a", "b", SERVED}
    assert [cards[name]["object"] for name in ("a", SERVED)] == ["adapter", "combination"]
    (version,) = cards[SERVED]["versions"]
    assert (version["id"], version["format"], version["rank"]) == (
        SERVED,
        "combination",
        {"min": 8, "max": 8},
    )
    assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["lively", "a", "b"]
    assert http.get(f"/v1/models/{SERVED}").json()["version"] == SERVED
    metrics = http.get("/metrics").text
    assert 'model="(combined)"' in metrics
    assert SERVED not in metrics


def test_an_unloaded_part_takes_its_combinations_along(http):
    texts(http, SUM, "chat", stream=False)
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "a"}).status_code == 200
    for model in (SUM, SERVED):
        answer = http.post("/v1/chat/completions", json={"model": model, "messages": MESSAGES})
        assert answer.status_code == 404, model
        assert "adds 'a" in answer.json()["error"]["message"]
    left = http.get("/v1/adapters").json()
    assert [card["name"] for card in left["data"]] == ["b"], "nobody can ask for the sum"
    assert left["slots"]["taken"] == 1


def test_an_exact_name_comes_first(http, make_adapter):
    odd = "a:0.7+b:-0.3"
    body = {"lora_name": odd, "lora_path": str(make_adapter(4))}
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert texts(http, odd, "chat", stream=False)[1] == f"{odd}@1"
    assert texts(http, f"{odd}:0.5+a", "chat", stream=False)[1] == f"{odd}@1:0.5+a@1:1.0"
    http.post("/v1/unload_lora_adapter", json={"lora_name": odd})
    assert texts(http, odd, "chat", stream=False)[1] == SERVED


def test_variants_of_an_experiment_may_be_combinations(start, tmp_path):
    variants = [{"model": SUM, "name": "both"}, {"model": "a", "name": "one"}]
    http = start(experiments=[{"name": "test", "variants": variants}], store=f"sqlite:///{tmp_path}/e.sqlite")
    met = {}
    for user in range(12):
        body = {"model": "test", "messages": MESSAGES, "max_tokens": 1, "user": f"u{user}"}
        answer = http.post("/v1/chat/completions", json=body)
        met[answer.headers["x-lathe-variant"]] = answer.headers["x-lathe-model"]
    assert met == {"both": SERVED, "one": "a@1"}
    http.post("/v1/unload_lora_adapter", json={"lora_name": "b"})
    answers = {
        user: http.post(
            "/v1/chat/completions",
            json={"model": "test", "messages": MESSAGES, "max_tokens": 1, "user": f"u{user}"},
        )
        for user in range(12)
    }
    assert {answer.status_code for answer in answers.values()} == {200, 503}


def test_parts_are_looked_up_where_adapters_may_be(start, make_adapter):
    folder = make_adapter(1).parent
    names = [make_adapter(number).name for number in (1, 2)]
    http = start(adapters=[], adapter_dirs=[str(folder)])
    _, served = texts(http, f"{names[0]}:0.5+{names[1]}:0.25", "chat", stream=False)
    assert served == "+".join(sorted([f"{names[0]}@1:0.5", f"{names[1]}@1:0.25"]))


REFUSED = [
    ("a:nan+b", 400, "the weight of 'a' is 'nan'; expected a finite number"),
    ("a:inf", 400, "the weight of 'a' is 'inf'"),
    ("a:1e999+b", 400, "the weight of 'a' is '1e999'"),
    ("a:+b", 400, "the weight of 'a' is missing"),
    ("a:half+b:0.5", 400, "the weight of 'a' is 'half'"),
    (":0.5+b", 400, "without a name"),
    ("a:0.5+nobody:0.5", 404, "adds 'nobody', which is not served here"),
    ("a:0.5+b@9", 404, "adds 'b@9', which is not served here"),
    ("lively:0.5+a", 400, "adds 'lively', which is the base"),
    ("nobody:latest", 404, "model 'nobody:latest' is not served here; there are lively, a, b"),
    ("a+", 404, "model 'a+' is not served here"),
    ("+".join(["a:1"] * (MOST_TERMS + 1)), 400, f"adds {MOST_TERMS + 1} adapters; at most {MOST_TERMS}"),
    ("a:1e30", 400, "its update, weighted so, may be"),
    ("a:1e20+b:-1e20", 400, "up to 1e+15 was expected"),
    ("a:1e39", 400, "lora_b, weighted so, has values that float32, which the model computes in, cannot hold"),
    ("+".join([f"a:{n}" for n in ("1.7e308", "1.7e308")]), 400, "add up to inf"),
]


@pytest.mark.parametrize("endpoint", BODIES)
def test_what_adds_up_to_nothing_that_can_be_is_refused_precisely(endpoint, http):
    path, body = BODIES[endpoint]
    for model, status, said in REFUSED:
        answer = http.post(path, json={**body, "model": model, "max_tokens": 2})
        assert answer.status_code == status, (model, answer.text)
        assert said in answer.json()["error"]["message"], model
    assert [card["name"] for card in http.get("/v1/adapters").json()["data"]] == ["a", "b"]


def test_a_weight_may_be_large(http):
    _, served = texts(http, "a:1e9+b:-1e-9", "chat", stream=False)
    assert served == "a@1:1000000000.0+b@1:-1e-09"


def test_ranks_beyond_what_the_server_takes_are_refused(start, make_adapter):
    http = start(max_rank=8)
    for name, number in (("c", 3), ("copy", 1)):
        body = {"lora_name": name, "lora_path": str(make_adapter(number))}
        assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert texts(http, SUM, "chat", stream=False)[1] == SERVED
    body = {"model": "a:0.5+b:0.5+c:0.5", "messages": MESSAGES}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "adds up to rank 12 at" in answer.json()["error"]["message"]
    assert "up to 8 (max_rank)" in answer.json()["error"]["message"]
    # What does the same is one, and its ranks are not added.
    assert texts(http, "a:0.5+b:0.5+copy:0.25", "chat", stream=False)[1] == "a@1:0.75+b@1:0.5"
