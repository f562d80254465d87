"""Formats whose calls are not JSON objects between two marks, over HTTP by official clients: calls that must be made
are made, keep to their schema, and are streamed as they are told whole."""

from __future__ import annotations

import json

import anthropic
import jsonschema
import openai
import pytest
from thinkers import HARMONY
from tiny import QWEN3, running
from transformers import AutoTokenizer

from serve.tools.formats import FORMATS

MESSAGES = [{"role": "user", "content": "How warm is it in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"anyOf": [{"enum": [1, 2, 3]}, {"type": "null"}]},
        "kind": {"enum": ["air", "sea"]},
    },
    "required": ["city", "days", "kind"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": True}}
NOW = {"type": "function", "function": {"name": "now"}}
CHATML = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
START = "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
CHANNELS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{# <|channel|>commentary <|call|> #}"
    f"{{% for m in messages %}}{START}{{% endfor %}}{{% if add_generation_prompt %}}<|start|>assistant{{% endif %}}"
)


@pytest.fixture(scope="module", params=["gpt_oss", "kimi_k3", "minimax_m3", "muse_spark", "deepseek_v32"])
def url(request, make_model):
    """A random model in whose vocabulary the family's marks are special tokens."""
    name = request.param
    folder = make_model(name, {**QWEN3, "vocab_size": 280, "max_position_embeddings": 2048}, seed=5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = HARMONY if name == "gpt_oss" else FORMATS[name].vocabulary
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.chat_template = CHANNELS if name == "gpt_oss" else CHATML
    tokenizer.save_pretrained(folder)
    keys = {"thinking_budget": 6} if name == "gpt_oss" else {"tool_call_parser": name}
    with running(folder, **keys) as (_, opened):
        yield opened


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", timeout=60, max_retries=0) as opened:
        yield opened


def asked(**fields) -> dict:
    random = {"temperature": 1.0, "max_tokens": 600, "parallel_tool_calls": False}
    return {"model": "m", "messages": MESSAGES, "tools": [WEATHER, NOW], **random, **fields}


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.large)])
def test_a_call_that_must_be_made_is_made_and_streamed_as_it_is_told_whole(client, seed):
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in (named, "required"):
        fields = asked(tool_choice=choice, seed=seed)
        answer = client.chat.completions.create(**fields).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("tool_calls", None), answer
        (call,) = answer.message.tool_calls
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_weather":
            jsonschema.validate(arguments, SCHEMA)
        else:
            assert (choice, arguments) == ("required", {})
        with client.chat.completions.stream(**fields) as stream:
            final = stream.get_final_completion().choices[0]
        (streamed,) = final.message.tool_calls
        assert (streamed.function.name, streamed.function.arguments) == (
            call.function.name,
            call.function.arguments,
        )


def test_strict_tools_leave_text_free_and_so_does_a_schema_beside_tools(client):
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    for seed in range(3):
        free = client.chat.completions.create(**asked(seed=seed, max_tokens=40)).choices[0]
        assert free.message.content or free.message.tool_calls or free.message.reasoning_content
        held = client.chat.completions.create(**asked(seed=seed, response_format=wanted)).choices[0]
        if held.message.tool_calls:
            (call,) = held.message.tool_calls
            known = SCHEMA if call.function.name == "get_weather" else {}  # which is not strict
            jsonschema.validate(json.loads(call.function.arguments), known)
        else:
            jsonschema.validate(json.loads(held.message.content), schema)


def test_anthropics_client_gets_the_calls_that_it_demands(url):
    tool = {"name": "get_weather", "input_schema": SCHEMA}
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as client:
        choice = {"type": "any", "disable_parallel_tool_use": True}
        fields = {"model": "m", "max_tokens": 600, "messages": MESSAGES, "tools": [tool]}
        with client.messages.stream(**fields, tool_choice=choice) as stream:
            message = stream.get_final_message()
    assert message.stop_reason == "tool_use"
    call = next(block for block in message.content if block.type == "tool_use")
    jsonschema.validate(call.input, SCHEMA)
