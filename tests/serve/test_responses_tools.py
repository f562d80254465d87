"""Items of conversations, and tools, over /v1/responses: told to the template, called, and answered.

What agents send habitually is answered; faults that others had stand here by what went wrong in them.
"""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from openai.types import responses
from pydantic import BaseModel, ConfigDict
from response_events import check, nameless
from tiny import QWEN3
from transformers import AutoTokenizer

from serve.api.responses.items import packed_thought
from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{{ reasoning_effort }}{{ verbosity }}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}{% endfor %}" + TEMPLATE
)
"""As Qwen's newer templates are."""
CONFIG = {**QWEN3, "vocab_size": 261, "max_position_embeddings": 8192}
LOOK = {
    "name": "look",
    "description": "What is there.",
    "parameters": {
        "type": "object",
        "properties": {"at": {"type": "string", "maxLength": 6}},
        "required": ["at"],
        "additionalProperties": False,
    },
}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS = [{"type": "function", **LOOK}, {"type": "function", **NOW}]
CHAT_TOOLS = [{"type": "function", "function": LOOK}, {"type": "function", "function": NOW}]
EXTRAS = {"seed": 5, "ignore_eos": True, "logit_bias": {"259": -100}}
"""This model would begin calls anywhere."""
ASK = {"model": "m", "input": "Look around.", "max_output_tokens": 24}


@contextmanager
def running(make_model, name: str, template: str, **keys: Any) -> Iterator[str]:
    folder = make_model(name, CONFIG, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    runtime = Runtime.start(ServeConfig(model=str(folder), name="m", max_rows=8, **keys))
    try:
        with serving(runtime) as url:
            yield url
    finally:
        runtime.close()


@pytest.fixture(scope="module")
def url(make_model) -> Iterator[str]:
    with running(make_model, "responds", TEMPLATE) as found:
        yield found


@pytest.fixture(scope="module")
def strict(make_model) -> Iterator[httpx.Client]:
    """A server whose template takes a system's message first alone."""
    with running(make_model, "strict", STRICT) as url, httpx.Client(base_url=url, timeout=60) as opened:
        yield opened


def ask(http: httpx.Client, **changes: Any) -> dict:
    answer = http.post("/v1/responses", json={**ASK, **EXTRAS, **changes})
    assert answer.status_code == 200, answer.text
    responses.Response.model_validate(answer.json())
    return answer.json()


def text_of(response: dict) -> str:
    messages = [item for item in response["output"] if item["type"] == "message"]
    return "".join(part["text"] for item in messages for part in item["content"])


def chat(http: httpx.Client, messages: list[dict], **changes: Any) -> dict:
    fields = {"model": "m", "messages": messages, "max_tokens": 24, **EXTRAS, **changes}
    answer = http.post("/v1/chat/completions", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def streamed(http: httpx.Client, **changes: Any) -> list[dict]:
    with http.stream("POST", "/v1/responses", json={**ASK, **EXTRAS, "stream": True, **changes}) as answer:
        assert answer.status_code == 200, answer.read()
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]


def refused(http: httpx.Client, **changes: Any) -> tuple[str, str]:
    answer = http.post("/v1/responses", json={**ASK, **EXTRAS, **changes})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


def saying(text: str, **fields: Any) -> dict:
    """A request whose answer is this text, for nothing else is allowed."""
    only = {"structured_outputs": {"choice": [text]}, "ignore_eos": False, "logit_bias": None}
    return {"tools": TOOLS, "max_output_tokens": 400, **only, **fields}


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def user(words: str) -> dict:
    return {"role": "user", "content": words}


CALLED = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"at": "sea"}'}
CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
SAME: dict[str, tuple[dict, list[dict]]] = {
    # of a response's body, and the messages of the chat that it is
    "a text": ({"input": "Hello"}, [user("Hello")]),
    "parts": (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": t} for t in ("Hel", "lo")]}]},
        [user("Hello")],
    ),
    "instructions before developers": (
        {
            "instructions": "One.",
            "input": [{"type": "message", "role": "developer", "content": "Two."}, user("Hello")],
        },
        [{"role": "system", "content": "One.\n\nTwo."}, user("Hello")],
    ),
    "a developer later": (
        {"input": [user("Hello"), {"role": "developer", "content": "Now."}, user("So?")]},
        [user("Hello"), {"role": "system", "content": "Now."}, user("So?")],
    ),
    "an answer as it was given": (
        {
            "input": [
                user("Hello"),
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [],
                    "encrypted_content": None,
                    "status": None,
                    "content": [{"type": "reasoning_text", "text": "hm"}],
                },
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "phase": None,
                    "content": [{"type": "output_text", "text": "Yes.", "annotations": [], "logprobs": []}],
                },
                user("So?"),
            ]
        },
        [user("Hello"), {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}, user("So?")],
    ),
    "thoughts, words and calls are one turn": (
        {
            "input": [
                user("Hello"),
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
                {"role": "assistant", "content": "Let me see."},
                CALLED,
                {**CALLED, "call_id": "c2"},
                {"type": "function_call_output", "call_id": "c1", "output": "blue"},
                {
                    "type": "function_call_output",
                    "call_id": "c2",
                    "output": [{"type": "input_text", "text": "wet"}],
                },
            ]
        },
        [
            user("Hello"),
            {
                "role": "assistant",
                "content": "Let me see.",
                "reasoning_content": "hm",
                "tool_calls": [CHAT_CALL, {**CHAT_CALL, "id": "c2"}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "blue"},
            {"role": "tool", "tool_call_id": "c2", "content": "wet"},
        ],
    ),
    "two answers are two turns": (
        {
            "input": [
                user("Hello"),
                *({"role": "assistant", "content": w} for w in ("One.", "Two.")),
                user("So?"),
            ]
        },
        [user("Hello"), *({"role": "assistant", "content": w} for w in ("One.", "Two.")), user("So?")],
    ),
    "a refusal": (
        {
            "input": [
                user("Hi"),
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                user("So?"),
            ]
        },
        [user("Hi"), {"role": "assistant", "content": "No."}, user("So?")],
    ),
    "a file of text": (
        {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "input_file",
                            "filename": "a.txt",
                            "file_data": f"data:text/plain;base64,{base64.b64encode('blå'.encode()).decode()}",
                        },
                        {"type": "input_text", "text": " What?"},
                    ],
                }
            ]
        },
        [user("a.txt:\nblå What?")],
    ),
    "calls of other kinds": (
        {
            "input": [
                user("Hello"),
                {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "***"},
                {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
                {
                    "type": "local_shell_call",
                    "id": "ls_1",
                    "call_id": "c2",
                    "status": "completed",
                    "action": {"type": "exec", "command": ["ls"], "env": {}},
                },
                {"type": "local_shell_call_output", "id": "c2", "output": "a.txt"},
                {
                    "type": "function_call",
                    "call_id": "c3",
                    "name": "read",
                    "namespace": "mcp__disk__",
                    "arguments": "{}",
                },
                {"type": "function_call_output", "call_id": "c3", "output": "x"},
                {
                    "type": "web_search_call",
                    "id": "ws_1",
                    "status": "completed",
                    "action": {"type": "search"},
                },
                {
                    "type": "mcp_call",
                    "id": "c4",
                    "name": "read",
                    "server_label": "disk",
                    "arguments": "{}",
                    "output": "y",
                },
            ]
        },
        [
            user("Hello"),
            *(
                message
                for number, name, arguments, output in (
                    (1, "patch", '{"input": "***"}', "done"),
                    (2, "local_shell", '{"type": "exec", "command": ["ls"], "env": {}}', "a.txt"),
                    (3, "mcp__disk__read", "{}", "x"),
                    (4, "read", "{}", "y"),
                )
                for message in (
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [
                            {
                                "id": f"c{number}",
                                "type": "function",
                                "function": {"name": name, "arguments": arguments},
                            }
                        ],
                    },
                    {"role": "tool", "tool_call_id": f"c{number}", "content": output},
                )
            ),
        ],
    ),
    "arguments that are no JSON": (
        {
            "input": [
                user("Hi"),
                {**CALLED, "arguments": '{"at": '},
                {"type": "function_call_output", "call_id": "c1", "output": "?"},
            ]
        },
        [
            user("Hi"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{**CHAT_CALL, "function": {"name": "look", "arguments": '{"at": '}}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "?"},
        ],
    ),
    "an effort": ({"input": "Hello", "reasoning": {"effort": "high"}}, [user("Hello")]),
    "a verbosity": ({"input": "Hello", "text": {"verbosity": "high"}}, [user("Hello")]),
}


@pytest.mark.parametrize("how", SAME)
def test_a_conversation_of_items_is_the_chat_of_its_messages(http, how):
    fields, messages = SAME[how]
    answer = ask(http, **fields)
    wishes = {
        "reasoning_effort": fields.get("reasoning", {}).get("effort"),
        "verbosity": fields.get("text", {}).get("verbosity"),
    }
    expected = chat(http, messages, **wishes)
    assert text_of(answer) == expected["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert len(set(text_of(answer))) > 6


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": 5}, "input", "valid string"),
        ({"input": []}, "input", "found none"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input", "input.0.type: found 'computer_call'"),
        (
            {"input": [{"type": "compaction", "encrypted_content": "x"}]},
            "input",
            "input.0.type: found 'compaction'",
        ),
        (
            {"input": [user("x"), {"role": "user", "content": [{"type": "nope"}]}]},
            "input",
            "input.1.content.0",
        ),
        ({"input": [{"role": "user", "content": "x", "wrong": 1}]}, "input", "input.0.wrong: unknown field"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input", "input.0.role"),
        ({"input": [{**CALLED, "call_id": None}]}, "input", "input.0.call_id"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input", "input.0.call_id: missing"),
        (
            {
                "input": [
                    {
                        "role": "user",
                        "content": [{"type": "input_file", "file_id": "file_1", "file_data": "eA=="}],
                    }
                ]
            },
            "input",
            "input.0.content.0.file_id",
        ),
        (
            {
                "input": [
                    {
                        "role": "user",
                        "content": [{"type": "input_file", "file_data": "data:application/pdf;base64,eA=="}],
                    }
                ]
            },
            "input",
            "input.0.content.0.file_data: found a file of type 'application/pdf'",
        ),
        (
            {
                "input": [
                    user("x"),
                    {
                        "role": "user",
                        "content": [{"type": "input_image", "image_url": "data:image/png;base64,eA=="}],
                    },
                ]
            },
            "input.1.content.0",
            "images are not accepted",
        ),
        (
            {"input": [user("x"), {"type": "item_reference", "id": "msg_9"}]},
            "input",
            "input.1.id: there is no item",
        ),
        ({"background": True, "store": False}, "background", "beside store: false"),
        ({"background": True, "stream": True}, "background", "beside stream: true"),
        ({"conversation": "conv_1"}, "conversation", "Lathe does not do this"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "Lathe does not do this"),
        ({"max_tokens": 4}, "max_tokens", "send max_output_tokens"),
        ({"messages": [user("x")]}, "messages", "send input"),
        ({"response_format": {"type": "json_object"}}, "response_format", "send text.format"),
        ({"n": 2}, "n", "a request for each answer"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"min_tokens": 30}, "min_tokens", "at most 24"),
        ({"metadata": {"a": "b" * 600}}, "metadata", "512"),
        ({"include": ["everything"]}, "include", "include.0"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "text",
            "text.format.schema",
        ),
        ({"text": {"format": {"type": "grammar"}}}, "text", "text.format"),
        ({"reasoning": {"effort": "most"}}, "reasoning", "reasoning.effort"),
        ({"chat_template_kwargs": {"nobody": 1}}, "chat_template_kwargs", "reads these variables"),
        ({"tools": [{"type": "nope"}]}, "tools", "tools.0.type: found 'nope'"),
        ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools", "none is configured"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "tools.1.name: found 'look' twice"),
        ({"tools": [{"type": "web_search"}, {"type": "function", "name": "a b"}]}, "tools", "tools.1.name"),
        ({"tools": CHAT_TOOLS}, "tools", "tools.0"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "nope"}}, "tool_choice", "look, now"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice", "no tool is offered"),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, "tool_choice", "web_search"),
        (
            {"stream_options": {"include_obfuscation": True}, "stream": True},
            "stream_options",
            "include_obfuscation",
        ),
        ({"stream_options": {}}, "stream_options", "stream: true only"),
        ({"wrong": 1}, "wrong", "unknown field"),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name_in_the_body(http, fields, param, words):
    told = refused(http, **fields)
    assert told[0] == param, told
    assert words in told[1], told


# Tools


ANSWERS = {
    "a call": call("look", at="sea"),
    "words and calls": "Let me see.\n" + call("look", at="sea") + "\n" + call("now"),
    "words between calls": "First.\n" + call("look", at="sea") + "Then.\n" + call("now"),
    "words alone": "Nothing is there.",
}


@pytest.mark.parametrize("how", ANSWERS)
def test_calls_are_items_whole_and_streamed(http, how):
    whole = ask(http, **saying(ANSWERS[how]))
    told = check(streamed(http, **saying(ANSWERS[how])))
    assert nameless(told) == nameless(whole)
    assert whole["status"] == "completed"
    calls = [item for item in whole["output"] if item["type"] == "function_call"]
    assert [item["name"] for item in calls] == ["look", "now"][: ANSWERS[how].count("<tool_call>")]
    assert len({item["call_id"] for item in calls}) == len(calls)
    if calls:
        assert json.loads(calls[0]["arguments"]) == {"at": "sea"}


def test_a_call_is_answered_and_the_chat_goes_on_as_the_same_messages_would(http):
    first = ask(http, **saying("Let me see.\n" + call("look", at="sea")), instructions="Be brief.")
    [made] = [item for item in first["output"] if item["type"] == "function_call"]
    output = {"type": "function_call_output", "call_id": made["call_id"], "output": '{"colour": "blue"}'}
    chained = ask(http, input=[output], previous_response_id=first["id"], tools=TOOLS)
    written = ask(http, input=[user(ASK["input"]), *first["output"], output], tools=TOOLS, store=False)
    messages = [
        user(ASK["input"]),
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [
                {
                    "id": made["call_id"],
                    "type": "function",
                    "function": {"name": "look", "arguments": made["arguments"]},
                }
            ],
        },
        {"role": "tool", "tool_call_id": made["call_id"], "content": '{"colour": "blue"}'},
    ]
    expected = chat(http, messages, tools=CHAT_TOOLS)
    assert text_of(chained) == text_of(written) == expected["choices"][0]["message"]["content"]
    assert chained["usage"]["input_tokens"] == expected["usage"]["prompt_tokens"]
    assert chained["usage"]["input_tokens_details"]["cached_tokens"] > 100


def test_choices_are_kept_to(http):
    said = {"max_output_tokens": 200, "temperature": 1.0, "tools": TOOLS, "logit_bias": None}

    def called(**fields: Any) -> list[str]:
        answer = ask(http, **said, **fields)
        return [item["name"] for item in answer["output"] if item["type"] == "function_call"]

    assert called(tool_choice="required", parallel_tool_calls=False)
    assert set(called(tool_choice={"type": "function", "name": "now"})) == {"now"}
    allowed = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "now"}, {"type": "web_search"}],
    }
    assert set(called(tool_choice=allowed)) == {"now"}
    kept = ask(http, **saying(call("look", at="sea"), tool_choice="none"))
    assert [item["type"] for item in kept["output"]] == ["message"]
    one = ask(http, **saying(call("look", at="sea") + call("now"), parallel_tool_calls=False))
    assert [item["type"] for item in one["output"]] == ["function_call"]
    assert one["parallel_tool_calls"] is False


def test_tools_of_any_text_and_of_namespaces_are_offered_and_called_by_their_own_names(http):
    tools = [
        {
            "type": "custom",
            "name": "patch",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: /x/"},
        },
        {
            "type": "namespace",
            "name": "mcp__disk__",
            "description": "Files.",
            "tools": [{"type": "function", "name": "read"}],
        },
        {"type": "local_shell"},
    ]
    text = call("patch", input="*** Begin\n+a") + call("mcp__disk__read", path="a.txt")
    whole = ask(http, **saying(text, tools=tools))
    assert nameless(check(streamed(http, **saying(text, tools=tools)))) == nameless(whole)
    patch, read = whole["output"]
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "patch", "*** Begin\n+a")
    assert (read["name"], read["namespace"], json.loads(read["arguments"])) == (
        "read",
        "mcp__disk__",
        {"path": "a.txt"},
    )
    outputs = [
        {"type": "custom_tool_call_output", "call_id": patch["call_id"], "output": "done"},
        {"type": "function_call_output", "call_id": read["call_id"], "output": "x"},
    ]
    going_on = ask(http, input=outputs, previous_response_id=whole["id"], tools=tools)
    assert going_on["usage"]["input_tokens_details"]["cached_tokens"] > whole["usage"]["input_tokens"]


class Look(BaseModel):
    """Arguments of a tool, as the client's user writes them."""

    model_config = ConfigDict(extra="forbid")

    at: Literal["sea", "sky"]


def test_the_clients_helpers_parse_calls(client):
    tool = {"type": "function", "name": "look", "parameters": Look.model_json_schema(), "strict": True}
    said = {
        "model": "m",
        "input": "Look.",
        "tools": [tool],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    parsed = client.responses.parse(**said, extra_body={"seed": 1})
    assert parsed.output[0].type == "function_call"
    assert Look.model_validate(parsed.output[0].parsed_arguments)
    with client.responses.stream(**said, extra_body={"seed": 1}) as stream:
        deltas = [event for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert deltas[-1].snapshot == "".join(event.delta for event in deltas) == final.output[0].arguments
    assert final.output[0].arguments == parsed.output[0].arguments


def test_tools_of_the_servers_own_mcp_servers_are_run_and_told_as_items(make_model, tmp_path):
    program = {
        "command": sys.executable,
        "args": [str(Path(__file__).parents[1] / "support" / "mcp_server.py")],
    }
    servers = tmp_path / "servers.json"
    servers.write_text(json.dumps({"mcpServers": {"sums": program}}))
    tool = {"type": "mcp", "server_label": "sums", "require_approval": "never", "allowed_tools": ["add"]}
    with (
        running(make_model, "sums", TEMPLATE, mcp_servers=servers, mcp_max_rounds=2) as url,
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        asked = saying("So.\n" + call("add", a=1, b=2), tools=[tool])
        whole = ask(http, **asked)
        assert nameless(check(streamed(http, **asked))) == nameless(whole)
        kinds = [item["type"] for item in whole["output"]]
        assert kinds == ["message", "mcp_call", "message", "mcp_call", "message"]
        ran = whole["output"][1]
        assert (ran["name"], ran["server_label"], ran["output"]) == ("add", "sums", "the sum is 3")
        assert json.loads(ran["arguments"]) == {"a": 1, "b": 2}
        assert whole["tools"][0]["server_label"] == "sums"
        count = http.post("/v1/responses/input_tokens", json={"model": "m", "input": "So.", "tools": [tool]})
        chat_body = {"messages": [user("So.")], "tools": [tool]}
        counts = [count.json()["input_tokens"], http.post("/tokenize", json=chat_body).json()["count"]]
        offered = ask(http, input="So.", tools=[{**tool, "allowed_tools": []}])["usage"]["input_tokens"]
        assert counts[0] == counts[1] > offered
        going_on = ask(http, input="And?", previous_response_id=whole["id"], tools=[tool])
        assert going_on["usage"]["input_tokens_details"]["cached_tokens"] > 100


# What agents send, and what went wrong elsewhere


CODEX_TOOLS = [
    {
        "type": "function", "name": "shell_command", "strict": False, "description": "Runs a shell command.",
        "parameters": {
            "type": "object",
            "properties": {
                "command": {"type": "string", "description": "The script"},
                "workdir": {"type": "string"},
                "timeout_ms": {"type": "number"},
            },
            "required": ["command"],
            "additionalProperties": False,
        },
    },
    {
        "type": "function", "name": "update_plan", "strict": False, "description": "Updates the plan.",
        "parameters": {
            "type": "object",
            "properties": {
                "plan": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"step": {"type": "string"}, "status": {"type": "string"}},
                        "required": ["step", "status"],
                        "additionalProperties": False,
                    },
                }
            },
            "required": ["plan"],
            "additionalProperties": False,
        },
    },
    {
        "type": "custom", "name": "apply_patch", "description": "Edits files.",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: begin_patch hunk+ end_patch"},
    },
    {
        "type": "namespace", "name": "mcp__docs__", "description": "Documents.",
        "tools": [{"type": "function", "name": "search", "parameters": {"type": "object", "properties": {}}}],
    },
    {"type": "web_search", "external_web_access": False},
    {"type": "image_generation", "output_format": "png"},
    {"type": "tool_search", "execution": "client", "description": "Finds tools.", "parameters": {"type": "object"}},
    {"type": "local_shell"},
]  # fmt: skip
CODEX = {
    "model": "m",
    "instructions": "You are Codex, a coding agent that runs in a terminal.",
    "input": [
        {
            "type": "message", "role": "developer",
            "content": [{"type": "input_text", "text": "<permissions>read only</permissions>"}],
        },
        {
            "type": "message", "role": "user",
            "content": [{"type": "input_text", "text": "<environment_context><cwd>/src</cwd></environment_context>"}],
        },
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Which files are there?"}]},
    ],
    "tools": CODEX_TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "7c9b8f2e-0000-4c00-8000-000000000002",
    "text": {"verbosity": "low"},
    "client_metadata": {"x-codex-installation-id": "9c1a2b3c"},
}  # fmt: skip
"""A request as Codex's source has it."""


def codex_items(events: list[dict]) -> list[dict]:
    """What Codex keeps of a stream and sends back: items as they are done, without their ids."""
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    [completed] = [event["response"] for event in events if event["type"] == "response.completed"]
    assert completed["usage"]["total_tokens"] > 0
    return [{name: value for name, value in item.items() if name not in ("id", "status")} for item in done]


def test_codex_is_answered_call_by_call(strict):
    """dynamo 10206 and litellm 39282: instructions and a developer's message were two messages of the system, which
    Qwen's templates refuse. llama.cpp 20156 and 22389, codex 10635, LM Studio 1812: tools that are no functions, and
    namespaces, were refused. llama.cpp 23465: a result in parts was."""
    items = list(CODEX["input"])
    answers = (
        "I shall look.\n" + call("shell_command", command="ls"),
        call("mcp__docs__search") + call("apply_patch", input="*** Begin Patch\n*** End Patch"),
        "There is a.txt.",
    )
    outputs = iter(
        [
            {"type": "function_call_output", "output": "a.txt\n"},
            {"type": "function_call_output", "output": [{"type": "input_text", "text": "nothing"}]},
            {"type": "custom_tool_call_output", "output": "Done!"},
        ]
    )
    for answer in answers:
        only = {"structured_outputs": {"choice": [answer]}, "max_output_tokens": 400}
        events = streamed_whole(strict, {**CODEX, "input": items, **only})
        check(events)
        new = codex_items(events)
        results = [{**next(outputs), "call_id": item["call_id"]} for item in new if "call_id" in item]
        items = [*items, *new, *results]
    kinds = [item["type"] for item in items[3:]]
    assert kinds == [
        *("message", "function_call", "function_call_output"),
        *("function_call", "custom_tool_call", "function_call_output", "custom_tool_call_output", "message"),
    ]
    assert items[6]["namespace"] == "mcp__docs__"
    assert items[7]["input"] == "*** Begin Patch\n*** End Patch"


def streamed_whole(http: httpx.Client, body: dict) -> list[dict]:
    with http.stream("POST", "/v1/responses", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]


def test_what_developers_say_later_reaches_templates_that_take_a_system_first_alone(strict, http):
    """litellm 39852: a developer's message after the first turn failed the whole request."""
    items = [
        user("Hello"),
        {"role": "assistant", "content": "Yes."},
        {"role": "developer", "content": "Now."},
        user("So?"),
    ]
    answer = ask(strict, input=items, instructions="Be brief.")
    messages = [{"role": "system", "content": "Be brief.\n\nNow."}, items[0], items[1], items[3]]
    expected = chat(strict, messages)
    assert text_of(answer) == expected["choices"][0]["message"]["content"]
    as_they_are = ask(http, input=items, instructions="Be brief.")
    assert as_they_are["usage"]["input_tokens"] > answer["usage"]["input_tokens"]  # a turn of its own
    told = refused(
        strict, input=[*items, {"role": "developer", "content": "x"}], chat_template_kwargs={"nobody": 1}
    )
    assert told[0] == "chat_template_kwargs"


def test_items_come_back_with_fields_missing_or_null(http):
    """vllm 54224 and 41355, litellm 13420: items without an id, or with null for one, and thoughts were refused."""
    given = ask(http, input="Hello")["output"]
    wanted = None
    for change in (
        {},
        {"id": None},
        {"id": None, "status": None, "phase": None},
        {"status": "in_progress", "internal_chat_message_metadata_passthrough": {"turn_id": "x"}},
    ):
        items = [{**item, **change} for item in given]
        answer = text_of(
            ask(
                http, input=[user("Hello"), {"type": "reasoning", "id": "", "summary": []}, *items, user("?")]
            )
        )
        wanted = wanted or answer
        assert answer == wanted
    bare = [{"role": "assistant", "content": text_of({"output": given})}]
    assert text_of(ask(http, input=[user("Hello"), *bare, user("?")])) == wanted


def test_thoughts_of_another_server_are_passed_over_and_name_nothing(http):
    """vllm 50256: encrypted thoughts were an error that named no field."""
    sealed = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAAABo"}
    with_it = ask(http, input=[user("Hello"), sealed, {"role": "assistant", "content": "Yes."}, user("?")])
    without = ask(http, input=[user("Hello"), {"role": "assistant", "content": "Yes."}, user("?")])
    assert text_of(with_it) == text_of(without)
    told = [
        user("Hello"),
        {**sealed, "encrypted_content": packed_thought("hm")},
        {"role": "assistant", "content": "Yes."},
    ]
    ours = ask(http, input=[*told, user("?")])
    assert ours["usage"]["input_tokens"] == without["usage"]["input_tokens"] + len("(hm)")


def test_indices_begin_at_zero_and_numbers_never_repeat(http):
    """sglang 12644: output_index began at 1. vllm 35184: content_index grew with each delta. litellm 28899, mlx-vlm
    494: sequence_number was missing or stood still. sglang 12652: a call had no end, and the last event no call."""
    events = streamed(http, **saying("Words.\n" + call("look", at="sea") + call("now")))
    check(events)
    added = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    done = [event["output_index"] for event in events if event["type"] == "response.output_item.done"]
    assert added == done == [0, 1, 2]
    assert {event.get("content_index", 0) for event in events} == {0}
    assert [item["type"] for item in events[-1]["response"]["output"]] == [
        "message",
        "function_call",
        "function_call",
    ]
    assert events[-1]["type"] == "response.completed"


def test_a_cut_answer_ends_with_its_own_event(http):
    """langchain 33840: readers wait for response.incomplete where an answer was cut, and for nothing behind it."""
    events = streamed(http, max_output_tokens=3)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    cut = ask(http, **{**saying(call("look", at="sea")), "max_output_tokens": 40})
    assert (cut["status"], cut["output"][-1]["type"]) == ("incomplete", "function_call")
    assert cut["output"][-1]["status"] == "incomplete"
