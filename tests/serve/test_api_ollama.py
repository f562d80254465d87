"""Ollama's API over real HTTP with the official client: whole, in lines, with options, tools, thoughts and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import jsonschema
import ollama
import pytest
from embedders import write_embedder
from tiny import QWEN3
from transformers import AutoTokenizer

from serve import device
from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
CONFIG = {**QWEN3, "vocab_size": 263, "max_position_embeddings": 2048}
HELLO = [{"role": "user", "content": "hello there"}]
OPTIONS = {"seed": 4, "temperature": 1.0, "num_predict": 12, "num_ctx": 8192, "repeat_penalty": 1.1}
QUIET = {"enable_thinking": False}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "How warm.", "parameters": SCHEMA},
}


@pytest.fixture(scope="module")
def folder(make_model):
    folder = make_model("llama-like", CONFIG, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(folder) -> Iterator[str]:
    runtime = Runtime.start(ServeConfig(model=str(folder), name="m", max_rows=8, default_max_tokens=40))
    with closing(runtime), serving(runtime) as url:
        yield url


@pytest.fixture(scope="module")
def llama(url) -> ollama.Client:
    return ollama.Client(host=url)


def asked(**fields) -> dict[str, Any]:
    options = {**OPTIONS, **fields.pop("options", {})}
    return {"model": "m", "messages": HELLO, "options": options, "think": False, **fields}


def alike(llama: ollama.Client, **fields) -> ollama.ChatResponse:
    """The whole answer, which the lines join to."""
    whole = llama.chat(**fields)
    parts = list(llama.chat(**fields, stream=True))
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert "".join(part.message.thinking or "" for part in parts) == (whole.message.thinking or "")
    calls = [call for part in parts for call in part.message.tool_calls or ()]
    assert calls == list(whole.message.tool_calls or ())
    last = parts[-1]
    for name in ("done_reason", "prompt_eval_count", "eval_count"):
        assert getattr(last, name) == getattr(whole, name)
    for part in (last, whole):
        assert part.total_duration >= part.eval_duration > 0
    return whole


def chat(url: str, **fields) -> dict[str, Any]:
    body = {"model": "m", "messages": HELLO, "max_tokens": 12, "temperature": 1.0, "seed": 4, **fields}
    found = httpx.post(f"{url}/v1/chat/completions", json={"repetition_penalty": 1.1, **body}, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()


def test_an_answer_is_the_chats_of_the_same_words_and_seed(llama, url):
    for fields, same in [
        ({}, QUIET),
        ({"think": True}, {"enable_thinking": True}),
        ({"think": "high"}, {"enable_thinking": True}),
        ({"options": {"top_k": 4, "top_p": 0.9, "min_p": 0.01}}, {**QUIET, "top_k": 4, "top_p": 0.9, "min_p": 0.01}),
        ({"options": {"repeat_last_n": 0}}, {**QUIET, "repetition_penalty": None}),
        ({"options": {"repeat_last_n": 9}}, {**QUIET, "repetition_context_size": 9}),
    ]:  # fmt: skip
        found, expected = alike(llama, **asked(**fields)), chat(url, **same)
        said = expected["choices"][0]["message"]
        assert found.message.content == said["content"]
        assert (found.message.thinking or None) == said["reasoning_content"]
        assert bool(found.message.thinking) == bool(fields.get("think"))
        assert found.prompt_eval_count == expected["usage"]["prompt_tokens"]
        assert found.eval_count == expected["usage"]["completion_tokens"] == 12
        assert found.done_reason == "length"


def test_a_prompt_is_a_chat_of_one_turn_and_a_raw_one_is_continued(llama, url):
    found = llama.generate(model="m", prompt="hello there", system="Be kind.", options=OPTIONS, think=False)
    messages = [{"role": "system", "content": "Be kind."}, *HELLO]
    assert (
        found.response
        == chat(url, messages=messages, enable_thinking=False)["choices"][0]["message"]["content"]
    )
    parts = list(llama.generate(model="m", prompt="def f(", raw=True, options=OPTIONS, stream=True))
    body = {
        "model": "m",
        "prompt": "def f(",
        "max_tokens": 12,
        "temperature": 1.0,
        "seed": 4,
        "repetition_penalty": 1.1,
    }
    expected = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert "".join(part.response for part in parts) == expected["choices"][0]["text"]
    assert parts[-1].prompt_eval_count == len("def f(")
    assert (
        llama.generate(model="m", prompt="def f(", raw=True, options=OPTIONS).response
        == expected["choices"][0]["text"]
    )


@pytest.mark.parametrize("form", ["json", SCHEMA])
def test_answers_keep_to_a_form(llama, form):
    found = alike(
        llama, **asked(format=form, options={"num_predict": 80, "repeat_penalty": 1.0, "stop": ["\n\n"]})
    )
    if form == SCHEMA:
        jsonschema.validate(json.loads(found.message.content), SCHEMA)
        assert found.done_reason == "stop"
    assert found.message.content.lstrip().startswith("{")


def test_calls_are_told_whole_and_their_results_are_told_back(llama):
    # A random model calls where it must: an answer of nothing but a call.
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    }
    history = [*HELLO, answer, {"role": "tool", "tool_name": "weather", "content": "12 degrees"}]
    count = llama.chat(**asked(messages=history, tools=[WEATHER])).prompt_eval_count
    written = f"<|im_start|>assistant\n{call}<|im_end|>\n<|im_start|>tool\n12 degrees<|im_end|>\n"
    marks = sum(written.count(mark) for mark in ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"))
    letters = len(written.encode()) - sum(
        written.count(mark) * len(mark)
        for mark in ("<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>")
    )
    alone = llama.chat(**asked(tools=[WEATHER])).prompt_eval_count
    assert count == alone + letters + marks
    assert alone > llama.chat(**asked()).prompt_eval_count


def test_thoughts_that_are_sent_back_are_told_to_the_template(llama):
    answer = {"role": "assistant", "content": "Yes."}
    silent = llama.chat(**asked(messages=[*HELLO, answer, *HELLO])).prompt_eval_count
    told = llama.chat(**asked(messages=[*HELLO, {**answer, "thinking": "Is it?"}, *HELLO])).prompt_eval_count
    assert told == silent + len("\nIs it?\n\n\n") + 2


def test_log_probabilities_come_with_their_tokens(llama):
    whole = llama.chat(**asked(logprobs=True, top_logprobs=2))
    assert len(whole.logprobs) == 12
    assert all(len(entry.top_logprobs) == 2 for entry in whole.logprobs)
    parts = llama.chat(**asked(logprobs=True, top_logprobs=2), stream=True)
    streamed = [entry.token for part in parts for entry in part.logprobs or ()]
    assert streamed == [entry.token for entry in whole.logprobs]


def test_models_are_listed_and_shown(llama, url):
    (model,) = llama.list().models
    assert (model.model, model.details.family, model.details.format) == ("m", "qwen3", "mlx")
    assert model.size > 100_000
    shown = llama.show("m")
    assert shown.modelinfo["qwen3.context_length"] == 2048
    assert {"completion", "tools", "thinking"} == set(shown.capabilities)
    (running,) = llama.ps().models
    assert (running.model, running.context_length) == ("m", 2048)
    assert 100_000 < running.size < 100_000_000  # what it takes, and not what it may
    assert running.size_vram == (0 if device.backend() == "cpu" else running.size)
    assert httpx.get(f"{url}/api/version").json()["version"].count(".") == 2


def test_a_tag_that_clients_append_is_no_part_of_the_name(llama):
    found = llama.chat(**asked(model="m:latest"))
    assert found.model == "m:latest"
    assert found.message.content == llama.chat(**asked()).message.content
    assert llama.show("m:latest").details.family == "qwen3"


def test_nothing_said_loads_the_model(llama):
    assert llama.chat(model="m", keep_alive="5m").done_reason == "load"
    assert llama.generate(model="m").done_reason == "load"


@pytest.mark.parametrize(
    ("fields", "status", "named"),
    [
        ({"model": "nope"}, 404, "nope"),
        ({"options": {"mirostat": 2}}, 400, "options.mirostat"),
        ({"options": {"temprature": 1}}, 400, "options.temprature"),
        ({"options": {"num_predict": -3}}, 400, "num_predict"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, 400, "maximum context length"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aGVsbG8="]}]}, 400, "reads text only"),
        ({"tools": [WEATHER, WEATHER]}, 400, "twice"),
    ],
)
def test_errors_are_worded_as_the_official_client_reads_them(llama, fields, status, named):
    for ask in (llama.chat, lambda **said: list(llama.chat(**said, stream=True))):
        with pytest.raises(ollama.ResponseError, match=named) as caught:
            ask(**asked(**fields))
        assert caught.value.status_code == status


def test_a_raw_prompt_takes_no_template(llama):
    with pytest.raises(ollama.ResponseError, match="system"):
        llama.generate(model="m", prompt="x", raw=True, system="y")


def test_a_stream_that_waits_says_so_in_lines_that_bring_nothing(folder):
    runtime = Runtime.start(ServeConfig(model=str(folder), name="m", max_rows=1, stream_keep_alive_s=0.01))
    with closing(runtime), serving(runtime) as url:
        body = {"model": "m", "prompt": "x", "max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as first:
            busy = first.iter_lines()
            next(busy)
            llama = ollama.Client(host=url)
            waiting = llama.chat(**asked(), stream=True)
            silent = [next(waiting) for _ in range(3)]
            assert [(part.message.content, part.done) for part in silent] == [("", False)] * 3
            first.close()
            said = "".join(part.message.content for part in waiting)
        assert said == llama.chat(**asked()).message.content


def test_texts_become_the_vectors_of_openais_endpoint(model_folder, tmp_path):
    write_embedder(tmp_path / "tiny", "bert")
    blocks = [{"name": "tiny", "model": str(tmp_path / "tiny")}]
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="m", embedding_models=blocks))
    with closing(runtime):
        texts = ["The lamp arrived broken.", "a", "word " * 2000]
        with serving(runtime) as url:
            llama = ollama.Client(host=url)
            found = llama.embed(model="tiny:latest", input=texts)
            body = {"model": "tiny", "input": texts, "truncate_prompt_tokens": -1}
            expected = httpx.post(f"{url}/v1/embeddings", json=body, timeout=60).json()
            assert [list(vector) for vector in found.embeddings] == [
                each["embedding"] for each in expected["data"]
            ]
            assert found.prompt_eval_count == expected["usage"]["prompt_tokens"]
            one = llama.embeddings(model="tiny", prompt=texts[0])
            # A row of another batch is rounded otherwise.
            assert one.embedding == pytest.approx(expected["data"][0]["embedding"], abs=1e-5)
            with pytest.raises(ollama.ResponseError) as caught:
                llama.embed(model="tiny", input=texts[2], truncate=False)
            assert caught.value.status_code == 400
            listed = {model.model: model.details.family for model in llama.list().models}
            assert listed == {"m": "qwen3", "tiny": "bert"}
            assert llama.show("tiny").capabilities == ["embedding"]
