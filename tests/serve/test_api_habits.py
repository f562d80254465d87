"""What clients do that no specification says, and other servers got wrong: where, says each test's first line."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, get_args

import anthropic
import httpx
import pytest
import zstandard
from anthropic.types.beta import BetaContentBlockParam
from openai.types.chat import ChatCompletionContentPartParam, ChatCompletionMessageParam
from openai.types.responses.response_input_item_param import ResponseInputItemParam
from tiny import QWEN3, running
from typing_extensions import get_type_hints, is_typeddict

from serve.api.app import create_app
from serve.api.message_bodies import Message
from serve.api.messages.blocks import Block
from serve.api.parts import Part
from serve.api.responses.items import Item, PassedItem
from serve.api.strict import Body
from serve.remote_answer import RemoteAnswer

ASKED = {"role": "user", "content": "Hi"}
SHORT = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(make_model):
    with running(make_model("habits", QWEN3), tool_call_parser="hermes", max_context=192) as started:
        yield started


@pytest.fixture(scope="module")
def url(served):
    return served[1]


def test_what_answers_get_answers_head_without_the_body(served, http):
    """Ollama's own command line asks HEAD / before anything else, and load balancers their probes."""
    app = create_app(served[0])
    described = [path for path, methods in app.openapi()["paths"].items() if "get" in methods]
    paths = [re.sub(r"\{\w+\}", "m", path) for path in described] + [
        "/",
        "/ui/",
        "/ui/app.js",
        "/openapi.json",
    ]
    assert len(paths) > 15
    for path in paths:
        whole, head = http.get(path), http.head(path)
        assert (head.status_code, head.content) == (whole.status_code, b""), path
        assert head.headers["content-type"] == whole.headers["content-type"], path
    assert http.head("/v1/completions").status_code == 405


def test_at_the_root_a_browser_finds_the_page_and_a_client_a_sign_of_life(http):
    """llama.cpp's users look for its page there, Ollama's clients for a 200."""
    page = http.get("/", headers={"accept": "text/html,*/*"}, follow_redirects=True)
    assert (page.url.path, page.status_code) == ("/ui/", 200)
    assert http.get("/").text == "Lathe is running"


def num_tokens(http: httpx.Client, api: str, call: dict[str, Any], result: dict[str, Any]) -> int:
    """Of the prompt of a history in which something was called."""
    if api == "messages":
        turns = [
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "look", **call}]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c", "content": "seen", **result}],
            },
        ]
        body = {"model": "m", "messages": [ASKED, *turns]}
        return http.post("/v1/messages/count_tokens", json=body).raise_for_status().json()["input_tokens"]
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", **call}}]}
    body = {
        "model": "m",
        "stream": False,
        "messages": [ASKED, calls, {"role": "tool", "content": "seen", **result}],
    }
    if api == "ollama":
        told = http.post("/api/chat", json={**body, "options": {"num_predict": 1}})
        return told.raise_for_status().json()["prompt_eval_count"]
    told = http.post("/v1/chat/completions", json={**body, **SHORT})
    return told.raise_for_status().json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("api", "field"), [("chat", "arguments"), ("ollama", "arguments"), ("messages", "input")]
)
def test_a_call_without_arguments_goes_back_as_one_of_none(http, api, field):
    """vLLM lost the `{}` of tools without parameters; clients keep null, and send it with every later request."""
    assert num_tokens(http, api, {field: None}, {}) == num_tokens(http, api, {field: {}}, {})
    assert num_tokens(http, api, {field: {}}, {}) != num_tokens(http, api, {field: {"at": 1}}, {})


def test_a_result_is_named_in_ollamas_older_word_too(http):
    """Ollama itself reads over what it does not know, so clients of before `tool_name` go on."""
    (one, other) = (
        num_tokens(http, "ollama", {"arguments": {}}, {word: "look"}) for word in ("name", "tool_name")
    )
    assert one == other


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_limit_of_minus_one_is_none(http, path, stream):
    """LM Studio's examples say max_tokens: -1, and so do clients that were written for it."""
    asked = {"messages": [ASKED]} if "chat" in path else {"prompt": "Hi"}
    body = {"model": "m", "temperature": 0, "ignore_eos": True, "stream": stream, **asked}
    free, limited = (http.post(path, json={**body, **limit}) for limit in ({}, {"max_tokens": -1}))
    assert limited.status_code == 200
    if stream:
        assert limited.text.count("data:") == free.text.count("data:") > 100
    else:
        assert limited.json()["usage"]["completion_tokens"] == free.json()["usage"]["completion_tokens"] > 100
    assert http.post(path, json={**body, "max_tokens": -2}).status_code == 400


def test_anthropics_client_lists_models_and_reads_their_fields(url):
    """Claude Code finds a gateway's models by this list; servers with OpenAI's alone leave it empty names."""
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as claude:
        page = claude.models.list(limit=1000)
        (model,) = page
        assert (page.has_more, page.first_id, page.last_id) == (False, "m", "m")
        for one in (model, claude.models.retrieve("m")):
            assert (one.type, one.id, one.display_name, one.max_input_tokens) == ("model", "m", "m", 192)
            assert one.created_at.year >= 2025


@pytest.mark.parametrize(("path", "meant"), [("/v1//models", "/v1/models"), ("//v1/models", "/v1/models")])
def test_a_base_url_that_ends_in_a_slash_is_told(url, path, meant):
    """Clients that join by hand ask for two slashes, and were told 404 and no more."""
    answer = httpx.get(f"{url}{path}")
    assert answer.status_code == 404
    assert f"but there is {meant}: the client's base_url ends in a slash" in answer.json()["error"]["message"]


def test_an_empty_suffix_asks_for_nothing(http):
    """Completion plugins send one suffix field always; it is empty at the end of a file."""
    body = {"model": "m", "prompt": "Hi", **SHORT}
    plain, ended = (http.post("/v1/completions", json={**body, **end}) for end in ({}, {"suffix": ""}))
    assert ended.json()["choices"] == plain.json()["choices"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("caf\udcc3\udca9", "café"),
        ("caf\udce9 \udcff!", "caf\ufffd \ufffd!"),
        ("é \udce2\udc98\udc83", "é ☃"),
        ("\ud83d x \ude00", "\ufffd x \ufffd"),
    ],
    ids=["ascii locale", "latin-1", "both", "halves"],
)
def test_bytes_of_arguments_that_the_locale_cannot_read_are_sent_as_text(url, typed, meant):
    """shell_gpt 667: arguments and pipes of other encodings ended in a traceback of the client's."""

    def said(text: str) -> tuple[str, Any]:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}],
            **SHORT,
        }
        answer = RemoteAnswer(
            url, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}}
        )
        return "".join(answer), (answer.usage or {})["prompt_tokens"]

    assert said(typed) == said(meant)


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "zstd": zstandard.ZstdCompressor(level=3).compress,
}
ASKS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": [ASKED], **SHORT},
    "/v1/responses": {"model": "m", "input": "Hi", "max_output_tokens": 3, "temperature": 0},
    "/v1/messages/count_tokens": {"model": "m", "messages": [ASKED]},
    "/tokenize": {"model": "m", "prompt": "Hi"},
}


def packed_post(http: httpx.Client, path: str, raw: bytes, coding: str) -> httpx.Response:
    headers = {"content-type": b"application/json", "content-encoding": coding.encode("latin-1")}
    return http.post(path, content=raw, headers=headers)


@pytest.mark.parametrize("path", ASKS)
@pytest.mark.parametrize("coding", PACKED)
def test_a_packed_body_is_read_as_the_plain_one(http, path, coding):
    """Codex packs long requests by zstd; gateways told of a syntax error at the first byte."""
    plain = packed_post(http, path, json.dumps(ASKS[path]).encode(), "identity")
    packed = packed_post(http, path, PACKED[coding](json.dumps(ASKS[path]).encode()), coding.upper())
    assert packed.status_code == plain.status_code == 200
    for told in ("choices", "input_tokens", "tokens", "status"):
        assert packed.json().get(told) == plain.json().get(told), told


@pytest.mark.parametrize("coding", PACKED)
def test_what_unpacks_to_too_much_or_to_nothing_is_told_as_that(http, coding):
    """A bomb costs no more than the longest body, and what is cut or no such packing is the client's mistake."""
    body = json.dumps(ASKS["/v1/chat/completions"]).encode()
    packed = PACKED[coding](body)
    for raw, status, told in [
        (PACKED[coding](b" " * (40 * 2**20)), 413, "more, unpacked; at most 16 MiB"),
        (PACKED[coding](b" " * (16 * 2**20)), 400, "the body is not JSON: it is empty"),
        (body, 400, f"the body is not {coding}, as its Content-Encoding says"),
        (packed[: len(packed) // 2], 400, "the body is not"),
        (packed + b"{}", 400, "the body is not"),
        (b"", 400, "the body is not"),
    ]:
        answer = packed_post(http, "/v1/chat/completions", raw, coding)
        assert (answer.status_code, told in answer.json()["error"]["message"]) == (status, True), answer.text
    for unknown in ("br", f"{coding}, {coding}", "gzip, zstd", "\xff"):
        answer = packed_post(http, "/v1/chat/completions", packed, unknown)
        assert (answer.status_code, answer.headers["accept-encoding"]) == (415, "gzip, x-gzip, deflate, zstd")
        assert answer.json()["error"]["message"].startswith("Content-Encoding: found ")


def test_a_turn_without_words_goes_back_as_one_of_none(http):
    """An answer that was cut inside its thought has none, and n8n's tools give null; a 400 ends the talk for good."""

    def tokens(*turns: dict[str, Any]) -> int:
        body = {"model": "m", "messages": [ASKED, *turns, ASKED], **SHORT}
        return (
            http.post("/v1/chat/completions", json=body).raise_for_status().json()["usage"]["prompt_tokens"]
        )

    empty = {"role": "assistant", "content": ""}
    for odd in (
        {"role": "assistant"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
        {"role": "assistant", "content": []},
    ):
        assert tokens(odd) == tokens(empty), odd
    thought = {"reasoning_content": "Hm."}
    assert tokens({"role": "assistant", "content": None, **thought}) == tokens({**empty, **thought})
    refused = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}
    assert tokens(refused) == tokens({**empty, "content": "No."})
    call = {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}
    nothing, silent = ({"role": "tool", "tool_call_id": "c", **said} for said in ({}, {"content": ""}))
    assert tokens(call, nothing) == tokens(call, {**nothing, "content": None}) == tokens(call, silent)
    body = {"model": "m", "messages": [{"role": "user", "content": refused["content"]}], **SHORT}
    assert "an assistant refuses" in http.post("/v1/chat/completions", json=body).json()["error"]["message"]


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_json_of_a_schema_is_asked_for_in_llama_cpps_words_too(http, api):
    """llama.cpp, Together and Fireworks have the schema beside json_object, and litellm rewrites OpenAI's to that."""
    schema = {"type": "object", "properties": {"ok": {"enum": ["yes", "no"]}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_object", "schema": schema}

    def ask(wanted: dict[str, Any]) -> httpx.Response:
        if api == "chat":
            asked = {
                "model": "m",
                "messages": [ASKED],
                "seed": 1,
                "max_tokens": 60,
                "response_format": wanted,
            }
            return http.post("/v1/chat/completions", json=asked)
        asked = {
            "model": "m",
            "input": "Hi",
            "seed": 1,
            "max_output_tokens": 60,
            "text": {"format": wanted},
        }
        return http.post("/v1/responses", json=asked)

    told = ask(wanted).raise_for_status().json()
    said = (
        told["choices"][0]["message"]["content"]
        if api == "chat"
        else told["output"][-1]["content"][0]["text"]
    )
    assert json.loads(said)["ok"] in ("yes", "no")
    error = ask({**wanted, "schema": {"not": {}}}).json()["error"]["message"]
    assert error.startswith("response_format.schema" if api == "chat" else "text.format.schema"), error


def members(annotation: Any, is_one: Callable[[Any], bool]) -> Iterator[Any]:
    """What a union is made of, whatever it is wrapped in."""
    if is_one(annotation):
        yield annotation
    for inner in () if is_one(annotation) else get_args(annotation):
        yield from members(inner, is_one)


def words(annotation: Any) -> set[str]:
    return set(members(annotation, lambda each: isinstance(each, str)))


@pytest.mark.parametrize(
    ("theirs", "ours", "by", "refused"),
    [
        (ChatCompletionMessageParam, Message, "role", set()),
        (ChatCompletionContentPartParam, Part, "type", {"file"}),
        (
            BetaContentBlockParam,
            Block,
            "type",
            {
                "compaction",
                "container_upload",
                "fallback",
                "mcp_tool_listing",
                "tool_addition",
                "tool_removal",
            },
        ),
        (
            ResponseInputItemParam,
            Item,
            "type",
            {
                *("additional_tools", "compaction", "compaction_trigger"),
                *("computer_call", "computer_call_output", "configuration_update"),
                *("image_generation_call", "mcp_approval_request", "mcp_approval_response"),
                *("program", "program_output"),
            },
        ),
    ],
    ids=["messages", "parts", "blocks", "items"],
)
def test_all_that_official_clients_can_say_in_a_turn_is_known_here(theirs, ours, by, refused):
    """Their types are the oracle: what they write is a hint at least, or of a kind that is refused by name."""
    known: dict[str, set[str]] = {}
    for body in members(ours, lambda each: isinstance(each, type) and issubclass(each, Body)):
        fields = {*body.model_fields, *body.neutral, *body.hints}
        for kind in words(body.model_fields[by].annotation):
            known.setdefault(kind, set()).update(["*"] if body is PassedItem else fields)
    unknown: set[str] = set()
    for typed in members(theirs, is_typeddict):
        hints = get_type_hints(typed, include_extras=True)
        for kind in words(hints.get(by)):
            if kind not in known:
                unknown.add(kind)
            elif "*" not in known[kind]:
                assert set(hints) <= known[kind], (kind, set(hints) - known[kind])
    assert unknown == refused
