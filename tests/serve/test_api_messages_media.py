"""Pictures in Anthropic's and Ollama's words: the model sees what a chat shows it, and counts it so."""

from __future__ import annotations

import base64
import io
from contextlib import closing
from typing import Any

import anthropic
import httpx
import numpy as np
import ollama
import pytest
from PIL import Image

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

FREE = {"ignore_eos": True, "seed": 3, "temperature": 1.0}


def picture(seed: int) -> str:
    written = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8)
    Image.fromarray(noise).save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


ONE, TWO = picture(1), picture(2)


def block(data: str) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}


def part(data: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def url(vlm_folder):
    runtime = Runtime.start(ServeConfig(model=str(vlm_folder("qwen2_vl")), name="sees", max_rows=4))
    with closing(runtime), serving(runtime) as opened:
        yield opened


def chat(url: str, *messages: dict[str, Any]) -> tuple[str, int]:
    """The answer of a chat, and its prompt's tokens."""
    body = {"model": "sees", "messages": list(messages), "max_tokens": 8, **FREE}
    found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert found.status_code == 200, found.text
    answer = found.json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def message(url: str, *messages: dict[str, Any], system: str | None = None) -> tuple[str, int]:
    """The same of Messages, counted by both endpoints."""
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as claude:
        said = {"model": "sees", "messages": list(messages), **({} if system is None else {"system": system})}
        found = claude.messages.create(**said, max_tokens=8, extra_body=FREE)
        usage = found.usage
        count = claude.messages.count_tokens(**said).input_tokens
        assert count == usage.input_tokens + usage.cache_read_input_tokens
        with claude.messages.stream(**said, max_tokens=8, extra_body=FREE) as stream:
            assert stream.get_final_text() == found.content[0].text
        return found.content[0].text, count


def test_a_picture_is_the_chats(url):
    content = [text("What is it?"), block(ONE), text("And this?"), block(TWO)]
    same = [text("What is it?"), part(ONE), text("And this?"), part(TWO)]
    found = message(url, {"role": "user", "content": content}, system="Look.")
    assert found == chat(url, {"role": "system", "content": "Look."}, {"role": "user", "content": same})
    other = [text("What is it?"), block(TWO), text("And this?"), block(ONE)]
    assert message(url, {"role": "user", "content": other}, system="Look.") != found


def test_a_picture_that_a_tool_shows_is_seen_after_its_result(url):
    use = {"type": "tool_use", "id": "t1", "name": "shot", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [text("done"), block(ONE)]}
    asked = {"role": "user", "content": "Look."}
    found = message(
        url,
        asked,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result, text("Well?")]},
    )
    call = {"id": "t1", "type": "function", "function": {"name": "shot", "arguments": {}}}
    expected = chat(
        url,
        asked,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t1", "name": "shot", "content": "done\n\n[image: see below]"},
        {"role": "user", "content": [part(ONE), text("Well?")]},
    )
    assert found == expected


def test_a_bad_picture_is_named_by_its_place_in_what_was_sent(url):
    with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0) as claude:
        shown = [text("x"), block(ONE), block("aGVsbG8=")]
        with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.2"):
            claude.messages.create(
                model="sees", max_tokens=1, system="s", messages=[{"role": "user", "content": shown}]
            )


def test_ollamas_pictures_are_the_chats(url):
    llama = ollama.Client(host=url)
    options = {"seed": 3, "temperature": 1.0, "num_predict": 8}
    found = llama.chat(
        model="sees", messages=[{"role": "user", "content": "What is it?", "images": [ONE]}], options=options
    )
    _, count = chat(url, {"role": "user", "content": [part(ONE), text("What is it?")]})
    assert found.prompt_eval_count == count
    generated = llama.generate(model="sees", prompt="What is it?", images=[ONE], options=options)
    assert generated.response == found.message.content
    assert "vision" in llama.show("sees").capabilities
