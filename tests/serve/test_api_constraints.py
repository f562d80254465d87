"""Constraints over HTTP: in every word for them, in every form of answer; and what cannot be kept to is a 400."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai
import pydantic
import pytest
from constrained import BAD_OTHERS, BAD_SCHEMAS, PERSON, SUMS, is_sum

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

PATHS = ("/v1/chat/completions", "/v1/completions")
CHOICES = ["yes", "no", "maybe"]


@pytest.fixture(scope="module")
def runtime(model_folder, make_adapter):
    adapters = [{"name": "a1", "path": make_adapter(1)}]
    found = Runtime.start(ServeConfig(model=str(model_folder), name="lively", adapters=adapters, max_rows=8))
    yield found
    found.close()


@pytest.fixture(scope="module")
def url(runtime):
    with serving(runtime) as found:
        yield found


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def body(path: str, **fields) -> dict:
    said = {"prompt": "hello there"}
    if "chat" in path:
        said = {"messages": [{"role": "user", "content": "hello there"}]}
    return {"model": "lively", "max_tokens": 120, "temperature": 1, "seed": 3, **said, **fields}


def text_of(choice: dict) -> str:
    return choice["message"]["content"] if "message" in choice else choice["text"]


def of_schema(schema: object, **more: object) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


def is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


def is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


WORDS = [
    ({"response_format": of_schema(PERSON, strict=True)}, is_person),
    ({"response_format": of_schema(PERSON, strict=False, description="who")}, is_person),
    ({"structured_outputs": {"json": PERSON}}, is_person),
    ({"structured_outputs": {"json": json.dumps(PERSON), "regex": None}}, is_person),
    ({"guided_json": PERSON}, is_person),
    ({"guided_json": json.dumps(PERSON)}, is_person),
    ({"response_format": {"type": "json_object"}}, is_object),
    ({"structured_outputs": {"json_object": True}}, is_object),
    ({"structured_outputs": {"regex": "[a-f]{6}"}}, lambda text: re.fullmatch("[a-f]{6}", text)),
    ({"guided_regex": "[a-f]{6}", "guided_decoding_backend": "guidance"}, lambda text: len(text) == 6),
    ({"structured_outputs": {"choice": CHOICES}}, CHOICES.__contains__),
    ({"guided_choice": CHOICES, "response_format": {"type": "text"}}, CHOICES.__contains__),
    ({"structured_outputs": {"grammar": SUMS}}, is_sum),
    ({"guided_grammar": SUMS}, is_sum),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("asked", "is_right"), WORDS)
def test_answers_are_what_was_asked_streamed_and_whole(http, path, asked, is_right):
    # Of three choices one at least is short enough to end; each of them follows the grammar from its beginning.
    fields = body(path, n=3, **asked)
    answer = http.post(path, json=fields)
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    ended = [text_of(choice) for choice in choices if choice["finish_reason"] == "stop"]
    assert ended
    assert all(map(is_right, ended)), ended
    streamed = [""] * 3
    with http.stream("POST", path, json={**fields, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    delta = choice["delta"].get("content") if "delta" in choice else choice["text"]
                    streamed[choice["index"]] += delta or ""
    assert streamed == [text_of(choice) for choice in choices]


class Person(pydantic.BaseModel):
    """What the client turns into a schema by itself."""

    model_config = pydantic.ConfigDict(extra="forbid")

    mood: bool
    letter: str = pydantic.Field(pattern="^[a-z]$")
    years: list[int] = pydantic.Field(max_length=2)


def test_openais_client_parses_what_it_asked_for(client):
    asked = {
        "model": "lively",
        "messages": [{"role": "user", "content": "who?"}],
        "max_tokens": 200,
        "seed": 1,
    }
    parsed = client.chat.completions.parse(**asked, response_format=Person).choices[0]
    assert isinstance(parsed.message.parsed, Person)
    plain = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0]
    assert plain.finish_reason == "length" or is_object(plain.message.content)
    extra = client.chat.completions.create(**asked, extra_body={"structured_outputs": {"choice": CHOICES}})
    assert extra.choices[0].message.content in CHOICES
    with client.chat.completions.stream(**asked, response_format=Person) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Person)


def test_constrained_rows_of_an_adapter_with_log_probabilities_and_penalties_beside_free_ones(http):
    path = PATHS[0]
    asked = [
        {"model": "a1", "response_format": of_schema(PERSON), "logprobs": True, "top_logprobs": 2},
        {"model": "a1", "guided_regex": "[a-z]{8}", "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"model": "lively"},
        {"model": "lively", "guided_choice": CHOICES, "logit_bias": {"70": 100}},
        {"model": "a1", "ignore_eos": True},
    ]
    alone = [http.post(path, json=body(path, **each)).json()["choices"][0] for each in asked]
    with ThreadPoolExecutor(5) as pool:
        sent = [pool.submit(http.post, path, json=body(path, **each)) for each in asked]
        together = [each.result().json()["choices"][0] for each in sent]
    assert [text_of(each) for each in together] == [text_of(each) for each in alone]
    first = together[0]
    assert is_person(text_of(first))
    pieces = [bytes(entry["bytes"]) for entry in first["logprobs"]["content"]]
    assert b"".join(pieces).decode() == text_of(first)


@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_kept_to_is_a_400_that_names_the_place_before_and_after_good_ones(http, path):
    schema_place = "response_format.json_schema.schema"
    bad = [
        ({"response_format": of_schema(schema)}, place.replace("response_format", schema_place), told)
        for schema, place, told in BAD_SCHEMAS
    ]
    bad += [({f"guided_{kind}": value}, place, told) for kind, value, place, told in BAD_OTHERS]
    bad += [({"structured_outputs": {"json": "{"}}, "structured_outputs.json: ", "not JSON")]
    good = body(path, guided_choice=CHOICES)
    for fields, place, told in bad:
        answer = http.post(path, json=body(path, **fields))
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["message"].startswith(place), error
        assert told in error["message"], error
        assert error["param"] == next(iter(fields))
        assert text_of(http.post(path, json=good).json()["choices"][0]) in CHOICES


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"guided_regex": "x{9}", "stop_token_ids": [90], "min_tokens": 2}, ""),
        ({"guided_regex": "abcx{9}", "stop_token_ids": [90], "min_tokens": 9}, "abc"),
        (
            {
                "guided_regex": "abcx{9}",
                "stop_token_ids": [90],
                "min_tokens": 9,
                "drafter": "ngram",
                "temperature": 0,
            },
            "abc",
        ),
    ],
)
def test_constraints_that_leave_nothing_to_draw_are_the_requests_own_fault(http, path, fields, said):
    """Whole, and in a stream behind what has come; others go on."""
    asked = body(path, **fields)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(http.post, path, json=body(path, guided_regex="[a-f]{20}"))
        answer = http.post(path, json=asked)
        streamed = http.post(path, json=asked | {"stream": True})
        assert re.fullmatch("[a-f]{20}", text_of(good.result().json()["choices"][0]))
    assert answer.status_code == 400, answer.text
    assert "as min_tokens keeps ends and stop_token_ids" in answer.json()["error"]["message"]
    *pieces, last = [
        json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")
    ] or [streamed.json()]
    assert last["error"] == answer.json()["error"]
    texts = [
        choice.get("text") or choice.get("delta", {}).get("content")
        for each in pieces
        for choice in each["choices"]
    ]
    assert "".join(filter(None, texts)) == said


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        ({"response_format": {"type": "structural_tag"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "missing"),
        ({"response_format": of_schema(PERSON, name="a b")}, "response_format", "match pattern"),
        ({"response_format": {"type": "json_object", "schema": 5}}, "response_format", "valid dictionary"),
        ({"response_format": "json"}, "response_format", "valid dictionary"),
        ({"structured_outputs": {}}, "structured_outputs", "found none"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "regex and choice"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs", "valid string"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs", "at least 1"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag", "does not do this"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "whitespace_pattern",
            "only null",
        ),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "only null"),
        ({"guided_regex": ""}, "guided_regex", "at least 1"),
        ({"guided_choice": ["a", 5]}, "guided_choice", "valid string"),
        ({"guided_json": "{"}, "guided_json", "not JSON"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "found beside guided_regex"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "found beside response_format",
        ),
    ],
)
def test_a_constraint_that_is_none_or_two_is_refused_by_name(http, path, fields, param, told):
    answer = http.post(path, json=body(path, **fields))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert told in error["message"], error
    assert param in (error["param"], *re.findall(r"[a-z_]+", error["message"]))


def test_an_echo_without_an_answer_has_nothing_to_constrain(http):
    answer = http.post(PATHS[1], json=body(PATHS[1], max_tokens=0, echo=True, guided_regex="a"))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "guided_regex"


@pytest.mark.parametrize("path", PATHS)
def test_neutral_values_constrain_nothing(http, path):
    plain = text_of(http.post(path, json=body(path)).json()["choices"][0])
    neutral = dict.fromkeys(
        (
            "response_format",
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
        )
    )
    for fields in (neutral, {"response_format": {"type": "text"}}):
        assert text_of(http.post(path, json=body(path, **fields)).json()["choices"][0]) == plain


def test_metrics_tell_of_grammars_compiled_found_and_refused(http):
    def counts() -> dict[str, float]:
        lines = http.get("/metrics").text.splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("lathe_grammar")}

    before = counts()
    asked = [{"guided_regex": "new[0-9]"}, {"guided_regex": "new[0-9]"}, {"guided_regex": "a(b"}, {}]
    answers = [http.post(PATHS[1], json=body(PATHS[1], **each)).status_code for each in asked]
    assert answers == [200, 200, 400, 200]
    now = counts()
    more = {name: now[name] - before[name] for name in now}
    assert more.pop("lathe_grammar_compile_seconds_total") > 0
    assert more == {
        "lathe_grammar_queries_total": 3,
        "lathe_grammar_hits_total": 1,
        "lathe_grammar_compiled_total": 1,
        "lathe_grammar_refused_total": 1,
        "lathe_grammars": 1,
    }
