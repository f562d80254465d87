"""/tokenize and /detokenize: the tokens that an answer would be computed from, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from embedders import write_backbone

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Wo? ☂ <|im_end|>"}]
OTHER_TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def http(
    model_folder: Path, make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    encoder = write_backbone(tmp_path_factory.mktemp("encoders") / "bert", "bert")
    config = ServeConfig(
        model=str(model_folder), name="lively", embedding_models=[{"name": "tiny", "model": str(encoder)}]
    )
    runtime = Runtime.start(config)
    try:
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=60) as client:
            yield client
    finally:
        runtime.close()


def tokens(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/tokenize", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["count"] == len(told["tokens"])
    return told


def text(http: httpx.Client, tokens: list[int], **body: Any) -> str:
    answer = http.post("/detokenize", json={"tokens": tokens, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["prompt"]


@pytest.mark.parametrize("prompt", ["Hello", "", "Ünïcode ☂", "<|im_start|>user\nHi<|im_end|>", " spaces  "])
def test_a_prompt_s_tokens_say_the_prompt(prompt: str, http: httpx.Client) -> None:
    told = tokens(http, model="lively", prompt=prompt)
    assert text(http, told["tokens"], model="lively") == prompt
    assert told["max_model_len"] == 1024
    assert told["token_strs"] is None


def test_a_prompt_s_tokens_are_those_that_a_completion_counts(http: httpx.Client) -> None:
    body = {"model": "lively", "prompt": "Once upon a time", "max_tokens": 1}
    usage = http.post("/v1/completions", json=body).json()["usage"]
    assert tokens(http, prompt="Once upon a time")["count"] == usage["prompt_tokens"]


@pytest.mark.parametrize("fields", [{}, {"add_generation_prompt": False}, {"enable_thinking": None}], ids=str)
def test_a_chat_s_tokens_are_those_that_its_answer_counts(fields: dict[str, Any], http: httpx.Client) -> None:
    body = {"model": "lively", "messages": MESSAGES, "max_tokens": 1, **fields}
    usage = http.post("/v1/chat/completions", json=body).json()["usage"]
    told = tokens(http, **body)
    assert told["count"] == usage["prompt_tokens"]
    said = text(http, told["tokens"])
    assert said.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert said.endswith("assistant\n") == (fields.get("add_generation_prompt") is not False)


def test_words_of_special_tokens_inside_a_message_are_characters(http: httpx.Client) -> None:
    told = tokens(http, messages=MESSAGES, return_token_strs=True)
    assert told["token_strs"].count("<|im_end|>") == len(MESSAGES)
    assert len(told["token_strs"]) == told["count"]


def test_an_embedding_model_s_tokens_have_their_ends_unless_they_are_left_out(http: httpx.Client) -> None:
    told = tokens(http, model="tiny", prompt="ab", return_token_strs=True)
    assert told["token_strs"] == ["<s>", "a", "b", "</s>"]
    assert told["max_model_len"] == 128
    assert tokens(http, model="tiny", prompt="ab", add_special_tokens=False)["tokens"] == told["tokens"][1:3]
    assert text(http, told["tokens"], model="tiny") == "<s>ab</s>"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"model": "nobody", "prompt": "a"}, "model"),
        ("/tokenize", {"model": "tiny", "messages": MESSAGES}, "messages"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"prompt": "a", "text": "b"}, "text"),
        ("/tokenize", {"prompt": "word " * 20_000}, "prompt"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/detokenize", {"tokens": [259]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"model": "tiny", "tokens": [260]}, "tokens"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_has_no_tokens_is_refused_by_the_field(
    path: str, body: dict[str, Any], param: str, http: httpx.Client
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param, answer.text


def test_an_empty_body_says_what_to_send(http: httpx.Client) -> None:
    assert "prompt" in http.post("/tokenize", json={}).json()["error"]["message"]


def test_no_tokens_are_no_text(http: httpx.Client) -> None:
    assert text(http, []) == ""
