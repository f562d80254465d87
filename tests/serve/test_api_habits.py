"""What clients do that no specification says, and other servers got wrong: where, says each test's first line."""

from __future__ import annotations

import re
from typing import Any

import anthropic
import httpx
import pytest
from tiny import QWEN3, running

from serve.api.app import create_app

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
