"""Tools in Anthropic's Messages with the official client, and the requests of agents that speak it."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import anthropic
import httpx
import jsonschema
import pytest
from anthropic.types import Message
from PIL import Image
from tiny import QWEN3, running
from transformers import AutoTokenizer

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CONFIG = {**QWEN3, "vocab_size": 263, "max_position_embeddings": 16384}
ASKED = [{"role": "user", "content": "How warm is it in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_weather", "description": "How warm it is.", "input_schema": SCHEMA}
NOW = {"name": "now", "input_schema": {"type": "object", "properties": {}}}
CALLED = (
    'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
QUIET = {"type": "disabled"}
SERVER_TOOLS = [
    {"type": "web_search_20250305", "name": "web_search", "max_uses": 8},
    {"type": "bash_20250124", "name": "bash"},
    {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool", "max_characters": 9},
    {"type": "computer_20250124", "name": "computer", "display_width_px": 9, "display_height_px": 9},
    {"type": "memory_20250818", "name": "memory"},
    {"type": "mcp_toolset", "mcp_server_name": "x"},
]


@pytest.fixture(scope="module")
def url(make_model):
    folder = make_model("agent", CONFIG, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    with running(folder) as (_, opened):
        yield opened


@pytest.fixture(scope="module")
def claude(url):
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        yield client


def said(text: str, **fields) -> dict[str, Any]:
    """A request whose answer is this text, for nothing else is allowed."""
    extra = {"structured_outputs": {"choice": [text]}, "temperature": 0, **fields.pop("extra_body", {})}
    body = {"model": "m", "max_tokens": 400, "messages": ASKED, "tools": [WEATHER, NOW], "thinking": QUIET}
    return {**body, **fields, "extra_body": extra}


def asked(**fields) -> dict[str, Any]:
    """A request whose answer is the model's own: random, as far as it is allowed to be."""
    extra = {"temperature": 1.0, "seed": fields.pop("seed", 7), **fields.pop("extra_body", {})}
    body = {"model": "m", "max_tokens": 300, "messages": ASKED, "tools": [WEATHER, NOW], "thinking": QUIET}
    return {**body, **fields, "extra_body": extra}


def plain(message: Message) -> dict[str, Any]:
    """What must be the same of an answer however it came: ids of calls are drawn."""
    found = message.to_dict(mode="json", exclude_none=True) | {"id": "", "usage": {}}
    for block in found["content"]:
        block.pop("id", None)
    return found


def alike(claude: anthropic.Anthropic, **fields) -> Message:
    """The whole answer, which the streamed one equals."""
    whole = claude.messages.create(**fields)
    with claude.messages.stream(**fields) as stream:
        events = [event.to_dict() for event in stream]
        final = stream.get_final_message()
    assert plain(final) == plain(whole)
    starts = [event for event in events if event["type"] == "content_block_start"]
    assert [event["index"] for event in starts] == list(range(len(whole.content)))
    ids = [block.id for block in whole.content if block.type == "tool_use"]
    assert len(set(ids)) == len(ids)
    return whole


def test_calls_are_blocks_of_their_own_whole_and_streamed(claude):
    message = alike(claude, **said(CALLED))
    assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
    assert message.content[0].text == "Let me see."
    assert [(block.name, block.input) for block in message.content[1:]] == [
        ("get_weather", {"city": "Paris", "days": 2}),
        ("now", {}),
    ]
    assert message.stop_reason == "tool_use"
    with claude.messages.stream(**said(CALLED)) as stream:
        deltas = [event.partial_json for event in stream if event.type == "input_json"]
    assert len(deltas) > 8, "arguments come as they are written"


def test_an_answer_of_calls_alone_has_no_empty_text(claude):
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    message = alike(claude, **said(call))
    assert [block.type for block in message.content] == ["tool_use"]
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize(
    "text", [CALLED + "\nThat is it.", CALLED.replace("</tool_call>\n<", "</tool_call>\nAnd:\n<")]
)
@pytest.mark.parametrize("drafter", ["none", "ngram"])
def test_blocks_stand_in_the_order_of_the_words_also_where_many_tokens_come_at_once(claude, text, drafter):
    guessed = {"drafter": drafter}
    if drafter == "ngram":
        guessed["prediction"] = {"type": "content", "content": text}
    message = alike(claude, **said(text, extra_body=guessed))
    kinds = [block.type for block in message.content]
    last = "That is it." in text
    assert (
        kinds == ["text", "tool_use", "tool_use", "text"]
        if last
        else ["text", "tool_use", "text", "tool_use"]
    )
    assert [block.input for block in message.content if block.type == "tool_use"] == [
        {"city": "Paris", "days": 2},
        {},
    ]


def test_a_call_that_is_cut_is_what_is_certain_of_it(claude):
    message = alike(claude, **said(CALLED, max_tokens=70))
    assert message.stop_reason == "max_tokens"
    assert message.content[-1].type == "tool_use"
    assert message.content[-1].input in ({}, {"city": "Paris"}, {"city": "Paris", "days": 2})


@pytest.mark.parametrize("seed", range(3))
def test_tools_that_must_be_called_are_with_input_of_their_schema(claude, seed):
    one = {"disable_parallel_tool_use": True}
    named = alike(claude, **asked(tool_choice={"type": "tool", "name": "get_weather", **one}, seed=seed))
    (block,) = named.content
    assert (block.name, named.stop_reason) == ("get_weather", "tool_use")
    jsonschema.validate(block.input, SCHEMA)
    (block,) = alike(claude, **asked(tool_choice={"type": "any", **one}, seed=seed)).content
    assert block.name in ("get_weather", "now")


def test_tools_that_may_not_be_called_are_told_of_and_not_called(claude):
    message = alike(claude, **said(CALLED, tool_choice={"type": "none"}))
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == CALLED


def test_a_conversation_with_tools_goes_on(claude, url):
    message = claude.messages.create(**said(CALLED))
    first, second = message.content[1:]
    results = [
        {"type": "tool_result", "tool_use_id": first.id, "content": [{"type": "text", "text": "12 degrees"}]},
        {"type": "tool_result", "tool_use_id": second.id, "content": "no clock", "is_error": True},
        {"type": "text", "text": "Well?"},
    ]
    history = [
        *ASKED,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": results},
    ]
    answer = alike(claude, **asked(messages=history, max_tokens=10))
    usage = answer.usage
    count = claude.messages.count_tokens(model="m", messages=history, tools=[WEATHER, NOW], thinking=QUIET)
    assert usage.input_tokens + usage.cache_read_input_tokens == count.input_tokens
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": json.dumps(block.input)},
        }
        for block in (first, second)
    ]
    tools = [
        {
            "type": "function",
            "function": {"name": tool["name"], "parameters": tool["input_schema"]}
            | ({"description": tool["description"]} if "description" in tool else {}),
        }
        for tool in (WEATHER, NOW)
    ]
    turns = [
        *ASKED,
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": first.id, "content": "12 degrees"},
        {"role": "tool", "tool_call_id": second.id, "content": "Error: no clock"},
        {"role": "user", "content": "Well?"},
    ]
    body = {"model": "m", "messages": turns, "tools": tools, "max_tokens": 1, "enable_thinking": False}
    same = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    assert same["usage"]["prompt_tokens"] == count.input_tokens


def count(claude: anthropic.Anthropic, tools: list[dict], messages: list[dict] = ASKED) -> int:
    return claude.messages.count_tokens(model="m", messages=messages, tools=tools).input_tokens


def test_tools_that_are_not_the_clients_own_are_left_out(claude):
    assert count(claude, [WEATHER, *SERVER_TOOLS]) == count(claude, [WEATHER]) > count(claude, [])
    assert count(claude, SERVER_TOOLS) == count(claude, [])
    message = alike(claude, **said("Yes.", tools=SERVER_TOOLS))
    assert message.content[0].text == "Yes."
    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        claude.messages.create(**asked(tools=SERVER_TOOLS, tool_choice={"type": "any"}))


def test_a_tool_that_is_kept_back_is_told_of_once_it_is_referred_to(claude):
    search = {"name": "ToolSearch", "input_schema": {"type": "object"}}
    late = {**WEATHER, "defer_loading": True}
    assert count(claude, [search, late]) == count(claude, [search])
    use = {"type": "tool_use", "id": "t1", "name": "ToolSearch", "input": {}}
    found = {"type": "tool_result", "tool_use_id": "t1"}

    def history(content: list[dict]) -> list[dict]:
        return [
            *ASKED,
            {"role": "assistant", "content": [use]},
            {"role": "user", "content": [{**found, "content": content}]},
        ]

    told = history([{"type": "text", "text": "The tool get_weather is there now."}])
    referred = history([{"type": "tool_reference", "tool_name": "get_weather"}])
    assert count(claude, [search, late], referred) == count(claude, [search, WEATHER], told)
    # Where their server would search, everything is told of at once.
    by_them = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}
    assert count(claude, [late, by_them]) == count(claude, [WEATHER])


CLAUDE_CODE_HEADERS = {
    "accept": "application/json",
    "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
    "anthropic-dangerous-direct-browser-access": "true",
    "anthropic-version": "2023-06-01",
    "authorization": "Bearer none",
    "user-agent": "claude-cli/2.1.280 (external, cli)",
    "x-app": "cli",
    "x-stainless-helper-method": "stream",
    "x-stainless-lang": "js",
    "x-stainless-retry-count": "0",
    "x-stainless-timeout": "600",
}
USE = {"type": "tool_use", "id": "toolu_01", "name": "Read", "input": {"file_path": "/a"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_01", "content": "1\thello"}
TITLE = {
    "type": "object",
    "properties": {"title": {"type": "string", "maxLength": 9}},
    "required": ["title"],
    "additionalProperties": False,
}
TOPIC = [{"role": "user", "content": "topic?"}, {"role": "assistant", "content": "{"}]
CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def claude_code(**fields) -> dict[str, Any]:
    """As Claude Code asks, by its public descriptions."""
    tool = {
        "name": "Read",
        "description": "Reads a file.",
        "input_schema": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {
                "file_path": {"type": "string", "description": "Absolute path"},
                "limit": {"type": "number", "exclusiveMinimum": 0},
            },
            "required": ["file_path"],
            "additionalProperties": False,
        },
        "eager_input_streaming": True,
    }
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    return {
        "model": "m",
        "max_tokens": 32000,
        "stream": True,
        "temperature": 1,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.280.a1b; cch=fa690;"},
            {"type": "text", "text": "You are Claude Code.", **CACHED},
            {"type": "text", "text": "# Tone\nBe short.", **CACHED},
        ],
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "<system-reminder>\nCLAUDE.md\n</system-reminder>\n"},
                    {"type": "text", "text": "read it", **CACHED},
                ],
            },
            {"role": "system", "content": "# Environment\ncwd: /"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "A file.", "signature": ""},
                    {"type": "redacted_thinking", "data": "abc"},
                    {"type": "text", "text": "I read.", "citations": None},
                    {**USE, "caller": {"type": "direct"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {**RESULT, "is_error": False, **CACHED},
                    {"type": "text", "text": "[Request interrupted by user]"},
                ],
            },
            {"role": "system", "content": [{"type": "text", "text": "9 tokens left", **CACHED}]},
        ],
        "tools": [tool, {**tool, "name": "mcp__x__deferred", "defer_loading": True, **CACHED}, *SERVER_TOOLS],
        "tool_choice": {"type": "auto"},
        "thinking": {"type": "enabled", "budget_tokens": 31999},
        "metadata": {"user_id": '{"device_id":"d","account_uuid":"","session_id":"s"}'},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "diagnostics": {"previous_message_id": None},
        **fields,
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"thinking": {"type": "adaptive", "display": "summarized"}},
        {"thinking": {"type": "enabled"}},
        {"stream": False, "max_tokens": 1, "messages": [{"role": "user", "content": "quota"}], "system": []},
        {
            "tools": [],
            "thinking": {"type": "disabled"},
            "output_config": {"format": {"type": "json_schema", "schema": TITLE}},
        },
        {"messages": TOPIC, "tools": [], "tool_choice": None},
        {"tools": [SERVER_TOOLS[0]], "tool_choice": None},
    ],
)  # fmt: skip
def test_what_claude_code_sends_is_answered(url, fields):
    body = claude_code(**{"seed": 1, **fields})
    body["max_tokens"] = min(body["max_tokens"], 24 if "format" not in str(fields) else 60)
    with httpx.Client(base_url=url, timeout=120, headers=CLAUDE_CODE_HEADERS) as http:
        answer = http.post("/v1/messages?beta=true", json=body)
        assert answer.status_code == 200, answer.text
        if not body["stream"]:
            assert answer.json()["usage"]["input_tokens"] > 0
            return
        events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
        assert events[0]["message"]["usage"]["input_tokens"] > 0
        assert events[-1] == {"type": "message_stop"}
        counted = {
            name: body[name] for name in ("model", "messages", "system", "tools", "thinking") if name in body
        }
        answer = http.post("/v1/messages/count_tokens?beta=true", json=counted)
        assert answer.status_code == 200, answer.text
        usage = events[0]["message"]["usage"]
        if "output_config" not in fields:
            assert answer.json() == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


def test_an_answer_may_ask_for_more_tokens_than_the_context_has(url):
    body = claude_code(stream=False, max_tokens=64000, logit_bias={"2": 100}, thinking=QUIET, tools=[])
    answer = httpx.post(f"{url}/v1/messages", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.json()["stop_reason"] == "end_turn"


def test_a_screenshot_in_a_result_is_refused_by_its_own_name_where_nobody_sees(url):
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png.getvalue()).decode()}
    body = claude_code(stream=False)
    body["messages"][3]["content"][0]["content"] = [{"type": "image", "source": source}]
    answer = httpx.post(f"{url}/v1/messages", json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("messages.3.content.0.content.0: ")
