"""What may stand in a body: every field of every body against edges, odd types and broken text."""

import itertools
import json
import socket
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
from odd_values import EDGES, ODD, edges_of, is_number, is_switch, places, with_

from serve.api import adapters, chat, completions, models
from serve.api.body import MAX_DEPTH
from serve.api.constraints import ConstrainedBody
from serve.api.direct import direct_of
from serve.api.messages import endpoints as messages
from serve.api.ollama import endpoints as ollama
from serve.api.responses import endpoints as responses
from serve.api.server import serving
from serve.api.tool_bodies import ToolsBody
from serve.config import ServeConfig
from serve.runtime import Runtime

DIRECT = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/api/chat")
ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.name }} {{ call.function.arguments | tojson }}>"
    "{% endfor %}<|im_end|>\n{% endfor %}{{ mood }} {{ reasoning_effort }} {{ verbosity }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Reads everything that a message can say, and three variables."""

SHARED = {
    "model": "lively",
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "repetition_context_size": 20,
    "presence_penalty": 0.5,
    "presence_context_size": 20,
    "frequency_penalty": 0.5,
    "frequency_context_size": 20,
    "logit_bias": {"70": 2.5},
    "min_tokens": 1,
    "stop_token_ids": [90],
    "top_n_sigma": 2.0,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.1,
    "prompt_logprobs": 1,
    "seed": 1,
    "stop": ["never said"],
    "max_tokens": 2,
    "n": 1,
    "stream": False,
    "user": "maria",
    "ignore_eos": True,
    "kv_bits": 8,
    "kv_value_bits": 4,
    "kv_scheme": "affine",
    "kv_quant_scheme": "uniform",
    "kv_group_size": 32,
    "kv_quantize_after": 3,
    "quantized_kv_start": 3,
    "kv_plain_layers": 1,
    "cache_salt": "pepper",
    "drafter": "ngram",
    "prediction": {"type": "content", "content": [{"type": "text", "text": "hello"}]},
    "priority": 1,
    "timeout": 60,
}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
CHAT = {
    **SHARED,
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "maria"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "reasoning": "hm",
            "tool_calls": [CALL],
        },
        {"role": "tool", "content": "seen", "tool_call_id": "c1"},
    ],
    "max_completion_tokens": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "chat_template_kwargs": {"mood": "calm"},
    "reasoning_effort": "low",
    "verbosity": "low",
    "enable_thinking": True,
    "thinking_budget": 1,
    "thinking_token_budget": 1,
    "thinking_start_token": "((",
    "thinking_end_token": "))",
    "include_reasoning": True,
    "context_overflow": "error",
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "x", "description": "d", "schema": {"type": "string", "minLength": 1}},
    },
}
OWN = {"model": "lively", "temperature": 0.5, "top_p": 0.9, "seed": 1, "stream": False}
FUNCTION = {"name": "look", "description": "d", "parameters": {"type": "object"}}
CLAUDE = {
    "model": "lively",
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "c1", "name": "look", "input": {"at": "here"}}],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "seen"}]},
    ],
    "stop_sequences": ["never said"],
    "thinking": {"type": "disabled"},
    "tools": [{"name": "look", "description": "d", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto"},
    "metadata": {"user_id": "maria"},
    "output_config": {"effort": "low"},
    "output_format": {"type": "json_schema", "schema": {"type": "string", "minLength": 1}},
    "chat_template_kwargs": {"mood": "calm"},
}
OLLAMA = {
    "model": "lively",
    "stream": False,
    "options": {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "num_predict": 2, "seed": 1, "stop": ["never"]},
    "format": "json",
    "think": False,
    "keep_alive": "5m",
    "logprobs": True,
    "top_logprobs": 1,
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {
        **SHARED,
        "prompt": "hello",
        "logprobs": 2,
        "echo": True,
        "best_of": 1,
        "guided_regex": "[a-z]+",
    },
    "/v1/responses": {
        **OWN,
        "input": [
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {
                "type": "reasoning",
                "id": "rs_1",
                "summary": [{"type": "summary_text", "text": "hm"}],
                "content": [{"type": "reasoning_text", "text": "hm"}],
                "encrypted_content": "lathe.aG0=",
            },
            {
                "type": "function_call",
                "id": "fc_1",
                "call_id": "c1",
                "name": "look",
                "namespace": "sea__",
                "arguments": '{"at": 1}',
            },
            {
                "type": "function_call_output",
                "call_id": "c1",
                "output": [{"type": "input_text", "text": "seen"}],
            },
            {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "x"},
            {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"},
            {"type": "local_shell_call", "call_id": "c3", "action": {"command": ["ls"]}},
            {"type": "shell_call_output", "call_id": "c3", "output": [{"stdout": "a", "stderr": "b"}]},
            {
                "type": "mcp_call",
                "id": "m1",
                "name": "read",
                "server_label": "s",
                "arguments": "{}",
                "output": "y",
            },
            {"role": "user", "content": [{"type": "input_file", "file_data": "eA==", "filename": "a"}]},
        ],
        "instructions": "Be brief.",
        "previous_response_id": "resp_1",
        "max_output_tokens": 2,
        "max_tool_calls": 1,
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": "low"},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
        "truncation": "auto",
        "metadata": {"a": "b"},
        "safety_identifier": "maria",
        "prompt_cache_key": "k",
    },
    "/v1/messages": {**OWN, **CLAUDE, "max_tokens": 2},
    # Nothing is answered, so no grammar is made.
    "/v1/messages/count_tokens": {
        **CLAUDE,
        "output_format": {"type": "json_schema", "schema": {"type": "object"}},
    },
    "/api/chat": {
        **OLLAMA,
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": FUNCTION}],
    },
    "/api/generate": {**OLLAMA, "prompt": "Hi", "system": "Be brief."},
    "/api/embed": {"model": "nobody", "input": ["Hi"], "prompt": "Hi", "dimensions": 8},
    "/api/embeddings": {"model": "nobody", "prompt": "Hi", "input": ["Hi"], "dimensions": 8},
    "/api/show": {"model": "lively", "name": "lively"},
    "/v1/models/load": {"model": "lively"},
    "/v1/models/unload": {"model": "nobody"},
    "/v1/embeddings": {
        "model": "nobody",
        "input": ["Hi", "there"],
        "encoding_format": "float",
        "dimensions": 8,
        "truncate_prompt_tokens": 4,
        "truncation_side": "left",
        "prompt_name": "query",
        "normalize": True,
    },
    "/v1/rerank": {
        "model": "nobody",
        "query": "Hi",
        "documents": ["a", "b"],
        "top_n": 1,
        "instruction": "Find.",
        "max_tokens_per_doc": 8,
        "max_tokens_per_query": 8,
        "truncate_prompt_tokens": 4,
        "truncation_side": "left",
    },
    "/v1/score": {
        "model": "nobody",
        "text_1": "Hi",
        "text_2": ["a", "b"],
        "queries": "Hi",
        "documents": ["a"],
        "instruction": "Find.",
        "max_tokens_per_doc": 8,
        "max_tokens_per_query": 8,
        "truncate_prompt_tokens": 4,
        "truncation_side": "left",
    },
    "/tokenize": {"model": "lively", "prompt": "Hi", "add_special_tokens": True},
    "/detokenize": {"model": "lively", "tokens": [70, 71]},
    "/v1/load_lora_adapter": {
        "lora_name": "x",
        "lora_path": "nowhere",
        "load_inplace": True,
        "base_model_name": "lively",
    },
    "/v1/unload_lora_adapter": {"lora_name": "x"},
    "/v1/feedback": {"id": "chatcmpl-1", "name": "correct", "value": 1.0},
    "/v1/adapters/{name}/rollback": {"version": 1},
    "/v1/adapters/{name}/pin": {},
    "/v1/adapters/{name}/unpin": {},
}
"""One body of each endpoint that takes one, with every field in it."""
BODIES["/v1/responses/input_tokens"] = {**BODIES["/v1/responses"], "input": "Hi"}
STREAMED = {
    "stream": True,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "prompt_logprobs": None,
}
HALF = "a\ud83d"


@pytest.fixture(scope="module")
def folder(model_folder, make_model):
    """A lively model with heads wide enough to quantize, and a template that reads all there is."""
    config = json.loads((model_folder / "config.json").read_text())
    folder = make_model("reads-all", {**config, "head_dim": 32})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def runtime(folder, tmp_path_factory):
    experiment = {"name": "ab", "variants": [{"model": "lively"}, {"model": "lively", "name": "twin"}]}
    started = Runtime.start(
        ServeConfig(
            model=str(folder),
            name="lively",
            max_rows=8,
            max_waiting=8,
            max_context=256,
            experiments=[experiment],
            store=f"sqlite:///{tmp_path_factory.mktemp('store')}/s.sqlite",
        )
    )
    yield started
    started.close()


@pytest.fixture(scope="module")
def http(runtime):
    with serving(runtime) as url, httpx.Client(base_url=url, timeout=120) as opened:
        yield opened


@pytest.fixture(scope="module")
def quiet(http):
    """quiet() asserts that a quiet client is answered as it was at first."""

    def ask() -> dict:
        fields = {"model": "lively", "prompt": "hello there", "max_tokens": 8, "seed": 3, "ignore_eos": True}
        answer = http.post("/v1/completions", json=fields)
        assert answer.status_code == 200
        return answer.json()["choices"]

    first = ask()
    assert len(set(first[0]["text"])) > 3

    def check() -> None:
        assert ask() == first

    return check


def post(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(path, content=content, headers={"content-type": "application/json"})


def assert_told(answer: httpx.Response, context: object) -> dict:
    """A deliberate answer: success, or an error of the client's in its API's shape, or its own `timeout` that has
    passed. Returns what it says of the error."""
    path = answer.request.url.path
    if answer.status_code >= 400 and path.startswith("/api/"):
        assert answer.status_code < 500, (context, answer.text)
        return {"message": answer.json()["error"]}
    if answer.status_code >= 400 and path.startswith("/v1/messages"):
        told = answer.json()
        assert (told["type"], set(told["error"])) == ("error", {"type", "message"})
        assert answer.status_code in (504, *range(400, 500)), (context, answer.text)
        return dict(told["error"])
    if answer.status_code == 504:
        error = answer.json()["error"]
        assert error["code"] == "deadline_exceeded", (context, error)
        return error
    assert answer.status_code < 500, (context, answer.text)
    if answer.status_code < 400:
        return {}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


def test_the_bodies_above_have_every_field_there_is_and_are_valid(http):
    schema = http.get("/openapi.json").json()
    parts = schema["components"]["schemas"]

    def fields(name: str) -> set[str]:
        # A switch holds no number and no text.
        listed = [item for item in parts[name].get("properties", {}).items() if not is_switch(item[1])]
        return {
            field for field, how in listed if "enum" not in how and how.get("description", "")[:6] != "A hint"
        }

    taken = {path for path, methods in schema["paths"].items() if "requestBody" in methods.get("post", {})}
    assert taken == set(BODIES)
    for path, body in BODIES.items():
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        left_out = {"stream_options", "mm_processor_kwargs"}  # the second is of models that see
        # Of constraints a body has one, and tools have tests of their own.
        left_out |= {*ConstrainedBody.model_fields, *ToolsBody.model_fields}
        if not path.endswith("completions"):
            left_out |= {*SHARED, *CHAT, "images", "stop"}
        if "$ref" in content["schema"]:  # /tokenize takes two kinds
            assert fields(content["schema"]["$ref"].split("/")[-1]) - set(body) <= left_out
        if path.endswith("completions"):
            assert post(http, path, body).status_code == 200
            assert "[DONE]" in post(http, path, {**body, **STREAMED}).text
    assert set(chain(*CHAT["messages"])) == (fields("Message") | {"role"}) - {"function_call"}
    assert set(CALL["function"]) == fields("FunctionCall")


NUMBERS = [(path, at) for path, body in BODIES.items() for at, value in places(body) if is_number(value)]


@pytest.mark.parametrize(
    ("path", "at", "edges"),
    [(*each, edges_of(number)) for number, each in enumerate(NUMBERS)]
    + [pytest.param(*each, EDGES, marks=pytest.mark.large) for each in NUMBERS],
    ids=lambda v: v if isinstance(v, str) else ".".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_no_number_brings_the_server_down(http, quiet, path, at, edges):
    statuses = set()
    for edge in edges:
        answer = post(http, path, with_(BODIES[path], at, edge))
        error = assert_told(answer, edge)
        statuses.add(answer.status_code)
        if "NaN" in answer.text or "Infinity" in answer.text:
            assert error, "no answer holds what is no JSON"
    assert 400 in statuses
    quiet()


@pytest.mark.parametrize("values", [ODD[:4], pytest.param(ODD[4:], marks=pytest.mark.large)])
def test_no_odd_value_anywhere_brings_the_server_down(http, quiet, values):
    for path, body in BODIES.items():
        for at, _ in places(body):
            for odd in values:
                assert_told(post(http, path, with_(body, at, odd)), (at, odd))
        for odd in values:
            assert_told(post(http, path, odd), odd)
    quiet()


@pytest.mark.parametrize("path", [path for path, body in BODIES.items() if body])
def test_half_a_surrogate_pair_is_refused_wherever_it_stands_and_its_field_is_named(http, path):
    body = BODIES[path] | (STREAMED if "completions" in path else {})
    for at, value in places(body):
        if isinstance(value, str):
            error = assert_told(post(http, path, with_(body, at, HALF)), at)
            assert ".".join(map(str, at)) + ": found half a surrogate pair" in error["message"]
            assert error.get("param", at[0]) == at[0]
        if isinstance(value, dict):
            error = assert_told(post(http, path, with_(body, (*at, HALF), 1)), at)
            assert "a\\ud83d: found half a surrogate pair" in error["message"]
    error = assert_told(post(http, path, {**body, HALF: 1}), "a field of the body itself")
    assert error.get("param", "a\\ud83d") == "a\\ud83d"
    # A whole pair is a character, and so is an escape that only looks like half a one.
    for whole in ("\U0001f600", "\\ud83d"):
        answer = post(http, path, with_(body, ("model" if "model" in body else next(iter(body)),), whole))
        assert "surrogate" not in answer.text


def test_a_path_or_a_query_that_is_not_utf8_is_400(http):
    for target, param in (
        ("/v1/models/%ED%A0%BD", "path"),
        ("/v1/models/%FF", "path"),
        ("/health?a=%80", "query"),
    ):
        answer = http.get(target)
        assert answer.status_code == 400
        assert assert_told(answer, target)["param"] == param
    assert http.get("/v1/models/%F0%9F%98%80").status_code == 404
    assert http.get("/health?a=%C3%A9").status_code == 200


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "nested more than"),
        (b'{"a":' * 100_000, "nested more than"),
        (b'{"model": ' + b"[" * 500 + b"]" * 500 + b"}", "model: nested more than"),
        (
            b'{"chat_template_kwargs": ' + b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH + b"}",
            "nested more than",
        ),
        (b'{"model": "a", "model": "b"}', "model: found twice"),
        (b'{"messages": [{"role": "user", "role": "system"}]}', "role: found twice"),
        (b'{"temperature": NaN}', "NaN is no JSON number"),
        (b'{"temperature": Infinity}', "Infinity is no JSON number"),
        (b'{"chat_template_kwargs": {"a": -Infinity}}', "-Infinity is no JSON number"),
        (b'{"temperature": 1e400}', "too large"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b'{"model": "\xed\xa0\xbd"}', "not UTF-8"),
        ('{"model": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"model": "a\nb"}', "not JSON"),
        (b"null", "the body"),
        (b'"text"', "the body"),
        (b"1", "the body"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_json_object_is_400_and_says_why(http, raw, told):
    for path in BODIES:
        answer = post(http, path, raw)
        assert answer.status_code == 400
        assert told in assert_told(answer, raw)["message"]


def test_deep_but_sane_values_and_a_byte_order_mark_are_read(http):
    depth = MAX_DEPTH - 3
    kwargs = {"mood": json.loads("[" * depth + "]" * depth)}
    fields = {"model": "lively", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert post(http, "/v1/chat/completions", {**fields, "chat_template_kwargs": kwargs}).status_code == 200
    assert (
        post(http, "/v1/chat/completions", b"\xef\xbb\xbf" + json.dumps(fields).encode()).status_code == 200
    )


@pytest.mark.parametrize(
    "kind",
    [
        None,
        "application/x-www-form-urlencoded",
        "text/plain",
        "application/jsonp",
        "json",
        "multipart/form-data",
    ],
)
def test_another_content_type_is_415_and_says_which_to_send(http, kind):
    headers = {} if kind is None else {"content-type": kind}
    for path, body in BODIES.items():
        answer = http.post(path, content=json.dumps(body).encode(), headers=headers)
        error = assert_told(answer, kind)
        told = error.get("code", "unsupported_media_type")  # not every API has codes
        assert (answer.status_code, told) == (415, "unsupported_media_type")
        assert (
            f"found {kind or 'none'}; send the body with 'Content-Type: application/json'" in error["message"]
        )


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"]
)
def test_json_by_its_other_names_is_read(http, kind):
    body = json.dumps(BODIES["/v1/completions"]).encode()
    assert http.post("/v1/completions", content=body, headers={"content-type": kind}).status_code == 200


def test_wrong_entries_by_the_thousand_are_told_briefly(http):
    for path, body in [
        ("/v1/completions", {"model": "lively", "prompt": [None] * 200_000}),
        ("/v1/completions", {"model": "lively", "prompt": [[{}]] * 100_000}),
        ("/v1/completions", {"model": "lively", "prompt": "x", "stop": [0] * 200_000}),
        ("/v1/chat/completions", {"model": "lively", "messages": [None] * 200_000}),
        ("/v1/chat/completions", {**CHAT, **{str(i): i for i in range(100_000)}}),
        ("/v1/chat/completions", {"model": "m" * 1_000_000, "messages": [{"role": "user", "content": "x"}]}),
    ]:
        answer = post(http, path, body)
        assert 400 <= answer.status_code < 500
        assert_told(answer, path)
        assert len(answer.content) < 10_000


def test_a_body_that_is_too_large_is_413_and_one_that_does_not_come_is_408(folder):
    runtime = Runtime.start(
        ServeConfig(model=str(folder), name="lively", max_body_mib=0.1, body_timeout_s=0.3)
    )
    with closing(runtime), serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as http:
        pieces = (b" " * 65536 for _ in range(1600))  # 100 MB, without saying so before
        for content in (b" " * 200_000, pieces):
            answer = http.post(
                "/v1/completions", content=content, headers={"content-type": "application/json"}
            )
            assert (answer.status_code, assert_told(answer, "large")["code"]) == (413, "request_too_large")
            assert "at most 0.1 MiB are read (max_body_mib)" in answer.text
        head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        for length, told in ((10**9, b"413"), (100, b"408")):
            with socket.create_connection((http.base_url.host, http.base_url.port)) as slow:
                slow.sendall(f"{head}content-length: {length}\r\n\r\n{{".encode())
                assert told in slow.recv(1000).split(b"\r\n")[0]
        small = {"model": "lively", "prompt": "x", "max_tokens": 1}
        assert http.post("/v1/completions", json=small).status_code == 200


def test_no_path_of_an_adapter_is_worse_than_a_4xx(http, quiet, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "file").write_text("x")
    paths = ["", ".", "/", "\x00", "a\x00b", "~nosuchuser", "~nosuchuser/x", "~", "x" * 10_000, "x/" * 5000]
    paths += [
        str(loop),
        str(tmp_path),
        str(tmp_path / "file"),
        "/dev/zero",
        "/dev/null",
        "/dev/stdin",
        "/dev",
    ]
    paths += ["/proc/self/mem", "/proc", "//", "\n", "\U0001f600", "file:///etc", "~root", "\u202e", "con:"]
    for path in paths:
        for replace in (False, True):
            fields = {"lora_name": "x", "lora_path": path, "load_inplace": replace}
            answer = post(http, "/v1/load_lora_adapter", fields)
            assert 400 <= answer.status_code < 500, (path, answer.text)
            assert_told(answer, path)
    quiet()


HINTED = {
    "guided_decoding_backend": "outlines",
    "metadata": {"a": "b"},
    "store": True,
    "prompt_cache_key": "k",
    "prompt_cache_options": {"x": 1},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "flex",
}


def test_hints_change_nothing_and_stand_in_the_readme(http, model_folder):
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="plain"))
    with closing(runtime):
        readme = (ROOT / "README.md").read_text()
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as plain:

            def ask(turn: dict, **fields) -> Any:
                body = {
                    "model": "plain",
                    "messages": [turn, turn],
                    "max_tokens": 6,
                    "seed": 1,
                    "ignore_eos": True,
                }
                answer = plain.post("/v1/chat/completions", json={**body, **fields})
                assert answer.status_code == 200, answer.text
                return answer.json()["choices"]

            turn = {"role": "assistant", "content": "Hi"}
            asked = ask(turn)
            for name, value in {
                **HINTED,
                "reasoning_effort": "high",
                "verbosity": "high",
                "top_logprobs": 0,
            }.items():
                assert ask(turn, **{name: value}) == asked
            assert ask(turn, max_tokens=6.0, seed=1.0, top_k=0.0, n=1.0) == asked
            turns = {
                "name": "bob",
                "reasoning_content": "hm",
                "reasoning": "hm",
                "reasoning_details": [{"x": 1}],
            }
            turns |= {
                "refusal": "no",
                "annotations": [{}],
                "cache_control": {"type": "ephemeral"},
                "tool_calls": [],
            }
            for name, value in turns.items():
                assert ask({**turn, name: value}) == asked
            part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
            assert ask({**turn, "content": [part]}) == asked
            for name in [*HINTED, *turns, "reasoning_effort", "verbosity"]:
                assert f"`{name}`" in readme


def test_what_the_template_reads_of_a_message_reaches_it(http):
    salts = map(str, itertools.count())  # no answer finds another's prefix, so all are computed alike

    def ask(**fields) -> Any:
        answer = post(http, "/v1/chat/completions", {**CHAT, **fields, "cache_salt": next(salts)})
        assert answer.status_code == 200, answer.text
        return answer.json()

    asked = ask()
    for at, value in [
        ((0, "name"), "bob"),
        ((1, "reasoning_content"), "well"),
        ((1, "tool_calls", 0, "function", "name"), "peek at"),
        ((1, "tool_calls", 0, "function", "arguments"), '{"at": 22}'),
        ((2, "content"), "nothing"),
    ]:
        other = ask(messages=with_({"m": CHAT["messages"]}, ("m", *at), value)["m"])
        assert other["usage"]["prompt_tokens"] != asked["usage"]["prompt_tokens"]
    for name in ("reasoning_effort", "verbosity"):
        assert ask(**{name: "medium"})["usage"] != asked["usage"] != ask(**{name: None})["usage"]
    arguments = with_({"m": CHAT["messages"]}, ("m", 1, "tool_calls", 0, "function", "arguments"), {"at": 1})
    assert ask(messages=arguments["m"])["choices"] == asked["choices"]
    thought = {"role": "assistant", "content": "x"}
    names = [ask(messages=[{**thought, name: "hm"}])["usage"] for name in ("reasoning", "reasoning_content")]
    assert names[0] == names[1] != ask(messages=[thought])["usage"]


@pytest.mark.parametrize(
    ("turn", "told"),
    [
        ({"role": "system", "content": None}, "messages.0.content: found null"),
        ({"role": "user"}, "messages.0.content: found null"),
        (
            {"role": "user", "content": "x", "tool_calls": [CALL]},
            "messages.0.tool_calls: found in a turn of 'user'",
        ),
        (
            {"role": "user", "content": "x", "tool_call_id": "c1"},
            "messages.0.tool_call_id: found in a turn of",
        ),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "messages.0.tool_calls.0.type"),
        ({"role": "assistant", "content": "x", "audio": {"id": "a"}}, "messages.0.audio: found"),
    ],
)
def test_a_turn_that_says_something_else_than_its_role_may_is_400(http, turn, told):
    error = assert_told(post(http, "/v1/chat/completions", {**CHAT, "messages": [turn]}), turn)
    assert told in error["message"]
    assert error["param"] == "messages"


def test_a_history_with_tools_is_told_in_words_where_the_template_would_drop_it(model_folder):
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="plain"))
    with closing(runtime), serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as plain:

        def num_tokens(*turns: dict) -> int:
            messages = [{"role": "user", "content": "x"}, *turns]
            answer = post(
                plain, "/v1/chat/completions", {"model": "plain", "max_tokens": 1, "messages": messages}
            )
            return answer.json()["usage"]["prompt_tokens"]

        called = '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call>'
        calling = {"role": "assistant", "content": "x", "tool_calls": [CALL]}
        assert num_tokens(calling) == num_tokens({"role": "assistant", "content": f"x\n{called}"})
        # It writes any role and its content.
        result = {"role": "tool", "content": "seen", "tool_call_id": "c1"}
        assert num_tokens(calling, result) == num_tokens(calling, {"role": "tool", "content": "seen"})


@pytest.mark.parametrize("name", ["reasoning_effort", "verbosity"])
def test_both_ways_to_say_a_wish_at_once_are_refused(http, name):
    kwargs = {name: "high"}
    error = assert_told(post(http, "/v1/chat/completions", {**CHAT, "chat_template_kwargs": kwargs}), kwargs)
    assert error["param"] == name


def test_endpoints_that_generate_are_called_directly_and_those_with_more_parameters_by_fastapi():
    parts = (chat, completions, messages, responses, ollama, adapters, models)
    routes = {route.path: route for part in parts for route in part.router.routes}
    assert [path for path in DIRECT if direct_of(routes[path].dependant) is None] == []
    assert direct_of(routes["/v1/adapters/{name:path}/pin"].dependant) is None, "its path says more"
    assert direct_of(routes["/v1/models/load"].dependant) is None, "its answer is made by FastAPI"
