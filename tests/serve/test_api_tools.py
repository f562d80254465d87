"""Tools over HTTP, by OpenAI's own client: told to the template, called, read whole and streamed, and required."""

from __future__ import annotations

import json
from contextlib import contextmanager

import openai
import pytest
from transformers import AutoTokenizer

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "vocab_size": 263,
    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
MESSAGES = [{"role": "user", "content": "How warm is it in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "How warm it is.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def caller(make_model):
    """A random model whose template knows tools, and whose vocabulary has a token for each mark."""
    folder = make_model("caller", CONFIG, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool_call>", "<tool_call|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def running(folder, **keys):
    runtime = Runtime.start(ServeConfig(model=str(folder), name="m", max_rows=8, **keys))
    try:
        with serving(runtime) as url:
            yield url
    finally:
        runtime.close()


@pytest.fixture(scope="module")
def url(caller):
    with running(caller) as opened:
        yield opened


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0) as opened:
        yield opened


def said(text: str, **fields) -> dict:
    """A request whose answer is this text, for nothing else is allowed."""
    allowed = {"structured_outputs": {"choice": [text]}}
    return {
        **{"model": "m", "messages": MESSAGES, "tools": [WEATHER, NOW], "temperature": 0, "max_tokens": 400},
        **fields,
        "extra_body": {**allowed, **fields.get("extra_body", {})},
    }


def streamed(client, **fields) -> tuple[dict, str, list]:
    """The message that the deltas of a stream join to, its finish reason, and the deltas of its calls."""
    message: dict = {"content": "", "tool_calls": []}
    deltas, finish = [], None
    for chunk in client.chat.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            message["content"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                deltas.append(call)
                if call.id is not None:
                    assert call.index == len(message["tool_calls"])
                    assert call.type == "function"
                    message["tool_calls"].append({"name": call.function.name, "arguments": ""})
                message["tool_calls"][call.index]["arguments"] += call.function.arguments
            finish = choice.finish_reason or finish
    return message, finish, deltas


def test_calls_are_told_from_the_text_whole_and_streamed(client):
    choice = client.chat.completions.create(**said(CALLS)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert calls == [("get_weather", {"city": "Paris", "days": 2}), ("now", {})]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    message, finish, deltas = streamed(client, **said(CALLS))
    assert finish == "tool_calls"
    assert message == {
        "content": choice.message.content,
        "tool_calls": [
            {"name": call.function.name, "arguments": call.function.arguments}
            for call in choice.message.tool_calls
        ],
    }
    assert len(deltas) > 8, "arguments come as they are written"


def test_without_tools_the_same_answer_is_text(client):
    choice = client.chat.completions.create(**said(CALLS, tools=openai.omit)).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (CALLS, "stop", None)
    none = client.chat.completions.create(**said(CALLS, tool_choice="none")).choices[0]
    assert (none.message.content, none.message.tool_calls) == (CALLS, None)
