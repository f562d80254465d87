"""Guesses over HTTP: whoever makes them, answers are the same, and nobody is told of others'."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest
from drafting import Eager

from serve.api.server import serving
from serve.config import ServeConfig
from serve.model.loading import load
from serve.runtime import Runtime

PROMPT = "one two three, one two three, one two three, one two"
PATHS = ("/v1/chat/completions", "/v1/completions")
MOST = 6
ACCEPTED, REJECTED = "accepted_prediction_tokens", "rejected_prediction_tokens"


def start(folder: Any, **config: Any) -> Runtime:
    """A server that checks every guess, whatever it costs."""
    made = ServeConfig.model_validate({"model": str(folder), "name": "lively", "max_rows": 8, **config})
    return Runtime.around(load(str(folder), name="lively"), made, Eager(MOST))


@contextmanager
def browsing(runtime: Runtime):
    with closing(runtime), serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http


@pytest.fixture(scope="module")
def runtime(model_folder, make_adapter):
    adapters = [{"name": f"a{number}", "path": make_adapter(number)} for number in (1, 2)]
    found = start(model_folder, adapters=adapters)
    yield found
    found.close()


@pytest.fixture(scope="module")
def url(runtime):
    with serving(runtime) as found:
        yield found


@pytest.fixture
def tenant(request) -> dict[str, str]:
    """One that nobody else is."""
    return {"X-Tenant": re.sub(r"\W", "-", request.node.name)[:120]}


def body(path: str, **fields: Any) -> dict[str, Any]:
    said = {"prompt": PROMPT}
    if "chat" in path:
        said = {"messages": [{"role": "user", "content": PROMPT}]}
    return {
        **{"model": "lively", "max_tokens": 40, "temperature": 0, "seed": 3, "ignore_eos": True},
        **said,
        **fields,
    }


def ask(http: httpx.Client, path: str, headers: Mapping[str, str] = {}, **fields: Any) -> dict[str, Any]:
    answer = http.post(path, json=body(path, **fields), headers=dict(headers))
    assert answer.status_code == 200, answer.text
    return answer.json()


def numbers_apart(value: Any) -> tuple[Any, list[float]]:
    """The same without its log-probabilities, and those."""
    numbers: list[float] = []

    def without(inner: Any) -> Any:
        if isinstance(inner, float):
            numbers.append(inner)
            return None
        if isinstance(inner, list):
            return [without(each) for each in inner]
        if isinstance(inner, dict):
            return {key: without(each) for key, each in inner.items()}
        return inner

    return without(value), numbers


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    (told, numbers), (wanted, others) = numbers_apart(found["choices"]), numbers_apart(expected["choices"])
    assert told == wanted
    assert numbers == pytest.approx(others, abs=1e-4)
    assert found["usage"]["completion_tokens"] == expected["usage"]["completion_tokens"]


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "filtered": {"temperature": 0.9, "top_p": 0.8, "top_k": 40, "min_p": 0.01},
    "penalties": {"frequency_penalty": 0.7, "presence_penalty": 0.4, "repetition_penalty": 1.2},
    "penalized_and_sampled": {"temperature": 1.1, "repetition_penalty": 1.3, "repetition_context_size": 9},
    "biased": {"logit_bias": {"70": 5, "80": -50}, "temperature": 0.7},
    "xtc": {"temperature": 1.2, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    "top_n_sigma": {"temperature": 1.4, "top_n_sigma": 1.0},
    "several": {"n": 3, "temperature": 1.0},
    "adapter": {"model": "a1"},
    "adapter_sampled": {"model": "a2", "temperature": 1.0},
    "constrained": {"structured_outputs": {"regex": "[a-z ]{60,}"}, "temperature": 1.0},
    **{f"max_tokens_{count}": {"max_tokens": count} for count in (1, 2, 3, 7, 8, 9)},
}
MORE = {
    "/v1/chat/completions": {"logprobs": {"logprobs": True, "top_logprobs": 3, "temperature": 1.0}},
    "/v1/completions": {
        "logprobs": {"logprobs": 3, "temperature": 1.0},
        "best_of": {"n": 1, "best_of": 3, "temperature": 1.0},
        "echo": {"echo": True, "logprobs": 1},
        "prompts": {"prompt": [PROMPT, "four five six, four five"]},
    },
}


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in PATHS for name in (*ASKED, *MORE[path])],
)
def test_an_answer_is_the_same_whoever_guesses_it(http, tenant, path, name):
    """Nobody, one who knows the prompt alone, and one who has heard the answer before."""
    fields = {**ASKED, **MORE[path]}[name]
    plain = ask(http, path, tenant, drafter="none", **fields)
    assert "completion_tokens_details" not in plain["usage"]
    first = ask(http, path, tenant, drafter="ngram", **fields)
    again = ask(http, path, tenant, drafter="ngram", **fields)
    assert_same(first, plain)
    assert_same(again, plain)
    num_tokens = plain["usage"]["completion_tokens"]
    accepted = again["usage"]["completion_tokens_details"][ACCEPTED]
    assert accepted >= num_tokens / 2 or num_tokens < 10
    assert accepted < num_tokens
    assert len(set(json.dumps(plain["choices"]))) > 12, "it says something"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_an_answer_ends_where_it_would_end_also_inside_of_a_block_of_guesses(http, tenant, path, temperature):
    """Wherever that is: by its length, by a stop string there, and by a stop token."""
    fields = {"temperature": temperature, "drafter": "ngram", "max_tokens": 24}
    whole = ask(http, path, tenant, **fields)
    logprobs = {"logprobs": 1} if path == "/v1/completions" else {"logprobs": True}
    ends = [{"max_tokens": count} for count in (1, 2, 5, 8, 16, 23)]
    choice = whole["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    ends += [{"stop": [text[at : at + 2]]} for at in range(2, len(text) - 2, 4)]
    ends += [{"stop_token_ids": [number]} for number in range(60, 250, 50)]
    ends += [{"stop": [text[5:7]], "min_tokens": 9}]
    num_stopped = 0
    for end in ends:
        found = ask(http, path, tenant, **{**fields, **logprobs, **end})
        expected = ask(http, path, tenant, **{**fields, **logprobs, **end, "drafter": "none"})
        assert_same(found, expected)
        num_stopped += found["choices"][0]["finish_reason"] == "stop"
    assert num_stopped >= 4


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_says_the_same_and_ends_with_the_same_usage(http, tenant, path):
    fields = {"drafter": "ngram", "temperature": 1.0, "n": 2}
    ask(http, path, tenant, **fields)
    whole = ask(http, path, tenant, **fields)
    for options in ({"include_usage": True}, {"continuous_usage_stats": True}):
        streamed = body(path, stream=True, stream_options=options, **fields)
        texts, usages = ["", ""], []
        with http.stream("POST", path, json=streamed, headers=tenant) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    usages.append(chunk.get("usage"))
                    for choice in chunk["choices"]:
                        delta = choice.get("delta", choice)
                        texts[choice["index"]] += delta.get("text") or delta.get("content") or ""
        said = [choice.get("text") or choice["message"]["content"] for choice in whole["choices"]]
        assert texts == said
        found, expected = usages[-1], whole["usage"]
        assert found["completion_tokens"] == expected["completion_tokens"]
        assert set(found["completion_tokens_details"]) == {ACCEPTED, REJECTED}
        assert found["completion_tokens_details"][ACCEPTED] > 20


def test_who_cancels_frees_the_row_and_the_others_go_on(http, runtime, tenant):
    fields = {"drafter": "ngram", "max_tokens": 900}
    for _ in range(3):
        streamed = body("/v1/completions", stream=True, **fields)
        with http.stream("POST", "/v1/completions", json=streamed, headers=tenant) as answer:
            lines = answer.iter_lines()
            for _ in range(5):
                next(lines)
        beside = ask(http, "/v1/completions", tenant, drafter="ngram")
        assert_same(beside, ask(http, "/v1/completions", tenant, drafter="none"))
    assert runtime.worker.failure is None


def accepted(answer: dict[str, Any]) -> int:
    return answer["usage"]["completion_tokens_details"][ACCEPTED]


APART: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
    "tenant": lambda tenant: {"headers": {"X-Tenant": tenant["X-Tenant"][:-1] + "_"}},
    "salt": lambda tenant: {"headers": tenant, "cache_salt": "s"},
    "adapter": lambda tenant: {"headers": tenant, "model": "a1"},
    "nobody": lambda tenant: {"headers": {}},
}


@pytest.mark.parametrize("apart", APART)
def test_nobody_is_helped_by_what_another_one_heard(http, runtime, tenant, apart):
    """What helps can be seen in usage and in time: for others it is as if the answer had never been given. The prompt
    has nothing to copy, so that whatever is right was heard."""
    runtime.worker.call(lambda: runtime.engine.forget(None))
    fields = {"prompt": "abcdefgh ijkl", "temperature": 1.0, "drafter": "ngram", "seed": 11}
    other = APART[apart](tenant)
    untold = accepted(ask(http, "/v1/completions", **{**fields, **other}))
    runtime.worker.call(lambda: runtime.engine.forget(None))
    for _ in range(3):
        told = accepted(ask(http, "/v1/completions", tenant, **fields))
    assert told > untold + 20
    assert accepted(ask(http, "/v1/completions", **{**fields, **other})) == untold
    assert accepted(ask(http, "/v1/completions", tenant, **fields)) == told


def test_what_is_reset_was_never_heard(http, tenant):
    fields = {"prompt": "mnopqrstuv wxyz", "temperature": 1.0, "drafter": "ngram", "seed": 12}
    untold, told = (accepted(ask(http, "/v1/completions", tenant, **fields)) for _ in range(2))
    assert told > untold + 20
    assert http.post("/v1/cache/reset", headers={"X-Tenant": "somebody-else"}).status_code == 200
    assert accepted(ask(http, "/v1/completions", tenant, **fields)) == told
    assert http.post("/v1/cache/reset", headers=tenant).status_code == 200
    assert accepted(ask(http, "/v1/completions", tenant, **fields)) == untold


def test_usage_counts_every_guess_and_metrics_count_them_by_adapter(http, tenant):
    names = ("drafts", "draft_tokens", "accepted_tokens")

    def counted(label: str) -> list[float]:
        text = http.get("/metrics").text
        lines = [f'lathe_spec_decode_num_{name}_total{{model="{label}"}} ' for name in names]
        found = [
            next((each for each in text.splitlines() if each.startswith(line)), f"{line}0") for line in lines
        ]
        return [float(each.rpartition(" ")[2]) for each in found]

    for model, label in (("lively", "lively"), ("a1", "a1"), ("a1+a2", "(combined)"), ("a1@1", "a1")):
        before, beside = counted(label), counted("a2")
        details = [
            ask(http, path, tenant, model=model, drafter="ngram", n=2, temperature=1.0)["usage"]
            for path in PATHS
            for _ in range(2)
        ]
        drafts, drafted, right = (now - was for now, was in zip(counted(label), before, strict=True))
        told = [each["completion_tokens_details"] for each in details]
        assert right == sum(each[ACCEPTED] for each in told) > 0
        assert drafted == sum(each[ACCEPTED] + each[REJECTED] for each in told)
        assert drafted / MOST <= drafts <= drafted
        assert counted("a2") == beside
    undrafted = counted("lively")
    ask(http, "/v1/completions", tenant)
    assert counted("lively") == undrafted
    assert 'model="a1+a2"' not in http.get("/metrics").text


BAD: dict[str, Any] = {
    "drafter": ["eagle", "", "Ngram", "none ", 3, True, ["ngram"], {"kind": "ngram"}, "x" * 10_000, "a\x00"],
    "prediction": [
        *("text", 3, [], {}, {"type": "content"}, {"content": "x"}, {"type": "text", "content": "x"}),
        *({"type": "content", "content": 3}, {"type": "content", "content": [3]}),
        {"type": "content", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"type": "content", "content": "x", "more": 1},
    ],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("field", "value"), [(field, value) for field in BAD for value in BAD[field]])
def test_a_bad_value_is_a_400_that_names_it_and_the_next_request_is_answered(http, path, field, value):
    answer = http.post(path, json=body(path, **{field: value}))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"].startswith(field) or error["param"].startswith(field)
    assert len(error["message"]) < 600
    ask(http, path, max_tokens=1)


def test_who_names_no_drafter_there_is_hears_which_there_are(http):
    answer = http.post("/v1/completions", json=body("/v1/completions", drafter="eagle"))
    assert answer.json()["error"]["message"] == "drafter is 'eagle'; this server has 'ngram', 'none'"
    assert answer.json()["error"]["param"] == "drafter"
    for drafter in ("none", "model"):
        fields = {"drafter": drafter, "prediction": {"type": "content", "content": "x"}}
        answer = http.post("/v1/completions", json=body("/v1/completions", **fields))
        assert answer.status_code == 400
        assert "does not look it up; send 'ngram' or leave drafter out" in answer.json()["error"]["message"]


def test_a_server_that_was_told_to_guesses_for_all_who_do_not_say(model_folder):
    with browsing(start(model_folder, drafter="ngram")) as http:
        for _ in range(2):
            answer = ask(http, "/v1/completions")
        assert accepted(answer) > 10
        assert accepted(ask(http, "/v1/completions", drafter="ngram")) > 10
        plain = ask(http, "/v1/completions", drafter="none")
        assert "completion_tokens_details" not in plain["usage"]
        assert_same(answer, plain)
    with browsing(start(model_folder, drafter={"kind": "ngram", "remembered_tokens": 0})) as http:
        told = [
            accepted(ask(http, "/v1/completions", prompt="abcdefgh", seed=1, temperature=1)) for _ in range(3)
        ]
        assert len(set(told)) == 1, "nothing is remembered"


def test_a_server_checks_only_guesses_that_pay_and_says_the_same(model_folder):
    """With gains as a server has them."""
    config = {"model": str(model_folder), "name": "lively", "drafter": "ngram"}
    runtime = Runtime.start(ServeConfig.model_validate(config))
    with browsing(runtime) as http:
        for fields in ({}, {"temperature": 1.0, "n": 3}):
            plain = ask(http, "/v1/completions", drafter="none", max_tokens=80, **fields)
            for _ in range(2):
                assert_same(ask(http, "/v1/completions", max_tokens=80, **fields), plain)


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_that_was_predicted_comes_in_few_steps(embedded, path):
    """OpenAI's field asks for it by itself; what is right and what is not is told."""
    fields = {"model": "tickets", "max_tokens": 60, "ignore_eos": True}
    plain = ask(embedded, path, **fields)
    assert "completion_tokens_details" not in plain["usage"]
    choice = plain["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    parts = [
        {"type": "text", "text": text[: len(text) // 2]},
        {"type": "text", "text": text[len(text) // 2 :]},
    ]
    wrong = text[: len(text) // 3] + " and something else 12345 " + text[len(text) // 3 :]
    found = {}
    for name, content in {"right": text, "parts": parts, "wrong": wrong, "nothing": ""}.items():
        prediction = {"type": "content", "content": content}
        answer = ask(embedded, path, {"X-Tenant": name}, prediction=prediction, **fields)
        assert_same(answer, plain)
        found[name] = answer["usage"]["completion_tokens_details"]
    assert found["right"][ACCEPTED] >= 60 / 2
    assert found["right"] == found["parts"]
    assert 10 < found["wrong"][ACCEPTED] < 60
    assert found["wrong"][REJECTED] > found["right"][REJECTED]
    null = ask(embedded, path, prediction=None, drafter=None, **fields)
    assert "completion_tokens_details" not in null["usage"]
    long = ask(embedded, path, prediction={"type": "content", "content": text * 9000}, **fields)
    assert_same(long, plain)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    from serve.commands.options import EMBEDDED_MODEL

    folder = tmp_path_factory.mktemp("embedded") / "tickets"
    shutil.copytree(EMBEDDED_MODEL, folder)
    config = ServeConfig(model=str(folder), name="tickets")
    with browsing(Runtime.around(load(str(folder), name="tickets"), config, Eager(MOST))) as http:
        yield http


@pytest.mark.parametrize("asked", ["greedy", "sampled", "several", "constrained", "penalties"])
def test_a_model_that_keeps_a_state_drafts_and_says_the_same(asked, lively):
    fields = ASKED[asked]
    with browsing(start(lively.folder("hybrid"))) as http:
        plain = ask(http, "/v1/completions", drafter="none", **fields)
        text = plain["choices"][0]["text"]
        for guesser in (
            {"drafter": "ngram"},
            {"prediction": {"type": "content", "content": text[:40] + "?" + text}},
        ):
            found = ask(http, "/v1/completions", **guesser, **fields)
            assert_same(found, plain)
            assert found["usage"]["completion_tokens_details"][REJECTED] >= 0
        assert found["usage"]["completion_tokens_details"][ACCEPTED] > 0
        assert "lathe_spec_decode_num_accepted_tokens_total" in http.get("/metrics").text


def test_metrics_tell_what_drafters_hold_beside_the_rows(model_folder):
    def held(http: httpx.Client) -> float:
        found = re.search(r"^lathe_drafter_bytes (\S+)$", http.get("/metrics").text, re.MULTILINE)
        return float(found[1])

    with browsing(start(model_folder)) as http:
        assert held(http) == 0
        ask(http, "/v1/completions", drafter="ngram")
        assert held(http) > 0  # its text is remembered
        http.post("/v1/cache/reset", json={})
        assert held(http) == 0
    with browsing(start(model_folder, drafter={"kind": "model", "model": str(model_folder)})) as http:
        ask(http, "/v1/completions", max_tokens=60)
        assert held(http) > 10_000  # prefixes of the draft model
