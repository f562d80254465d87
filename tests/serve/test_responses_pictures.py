"""Pictures in /v1/responses: those that were sent are seen, from users and from tools, and found again."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

NEAR = 5e-3
"""Of log-probabilities: products of other shapes round otherwise."""
APART = 0.05
SAYS_A_WORD = {"ignore_eos": True, "logit_bias": {"70": 50}}
"""An answer of no words is no turn of the history."""
LOOK = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}


def shown(seed: int, size: int = 56) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


@pytest.fixture(scope="module")
def url(vlm_folder: Callable[[str], Path]) -> Iterator[str]:
    runtime = Runtime.start(ServeConfig(model=str(vlm_folder("qwen2_vl")), name="sees"))
    with closing(runtime):
        with serving(runtime) as found:
            yield found
        assert runtime.worker.failure is None


def seen(client: openai.OpenAI, items: list[dict], **changes) -> list[float]:
    """Log-probabilities of the five likeliest first tokens."""
    fields = {"model": "sees", "input": items, "max_output_tokens": 1, "top_logprobs": 5, "temperature": 0}
    answer = client.responses.create(**fields, **changes, extra_body=SAYS_A_WORD)
    [entry] = answer.output[0].content[0].logprobs
    return sorted((each.logprob for each in entry.top_logprobs), reverse=True)


def seen_by_chat(client: openai.OpenAI, messages: list[dict]) -> list[float]:
    fields = {"model": "sees", "messages": messages, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    answer = client.chat.completions.create(**fields, temperature=0, extra_body=SAYS_A_WORD)
    [entry] = answer.choices[0].logprobs.content
    return sorted((each.logprob for each in entry.top_logprobs), reverse=True)


def asking(url: str, **more) -> dict:
    return {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "What is "},
            {"type": "input_image", "image_url": url, **more},
            {"type": "input_text", "text": "it?"},
        ],
    }


def test_a_picture_is_the_chats(client):
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is "},
                {"type": "image_url", "image_url": {"url": shown(1)}},
                {"type": "text", "text": "it?"},
            ],
        }
    ]
    one = seen(client, [asking(shown(1), detail="auto")])
    np.testing.assert_allclose(one, seen_by_chat(client, chat), atol=NEAR)
    assert np.abs(np.subtract(one, seen(client, [asking(shown(2))]))).max() > APART


def test_a_tools_picture_is_seen(client):
    """llama.cpp 23465: a result that shows something was refused, or lost what it shows."""

    def looking(url: str) -> list[dict]:
        output = [{"type": "input_text", "text": "here:"}, {"type": "input_image", "image_url": url}]
        result = {"type": "function_call_output", "call_id": "c1", "output": output}
        return [{"role": "user", "content": "Look."}, LOOK, result]

    one = seen(client, looking(shown(1)))
    assert np.abs(np.subtract(one, seen(client, looking(shown(2))))).max() > APART


def test_a_second_turn_finds_the_picture_of_the_first(client):
    said = {"model": "sees", "max_output_tokens": 1, "extra_body": SAYS_A_WORD}
    first = client.responses.create(input=[asking(shown(3, 112))], **said)
    second = client.responses.create(input="And now?", previous_response_id=first.id, **said)
    assert second.usage.input_tokens_details.cached_tokens >= first.usage.input_tokens - 1
    kept = client.responses.input_items.list(first.id).data[0]
    assert kept.content[1].image_url == shown(3, 112)


def test_a_broken_picture_is_named_where_it_stands(client):
    items = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        asking("data:image/png;base64,eA=="),
    ]
    with pytest.raises(openai.BadRequestError) as error:
        seen(client, items, instructions="Be brief.")
    assert error.value.body["param"] == "input.2.content.1.image_url"
    assert error.value.body["message"].startswith("input.2.content.1")
