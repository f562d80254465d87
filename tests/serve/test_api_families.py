"""Every family over HTTP with the official client: what its template, its processor and its network make of a chat,
together, is what mlx-vlm's own make of it."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import openai
import pytest
from PIL import Image
from vlm_families import FAMILIES, Reference, chats_of, message, sound

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

FAMILIES_OVER_HTTP = [
    pytest.param(family, marks=() if family == "qwen3_omni_moe" else pytest.mark.large) for family in FAMILIES
]
RATE = 16_000
WAIT_S = 120


def part_of(part: Mapping[str, Any]) -> dict[str, Any]:
    """As OpenAI's clients send it."""
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_png(part['image'])}"}}
    if part["type"] == "audio":
        return {"type": "input_audio", "input_audio": {"data": _wav(part["audio"]), "format": "wav"}}
    return dict(part)


def _png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _wav(samples: np.ndarray) -> str:
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setnchannels(1)
        written.setsampwidth(2)
        written.setframerate(RATE)
        written.writeframes((samples * 32768).round().clip(-32768, 32767).astype("<i2").tobytes())
    return base64.b64encode(file.getvalue()).decode()


def heard(seed: int, seconds: float) -> np.ndarray:
    """A sound whose samples are numbers of 16 bits."""
    return ((sound(seed, seconds) * 32768).round().clip(-32768, 32767) / 32768).astype(np.float32)


def chats(family: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for name, chat in chats_of(family).items():
        if name == "sounds":
            yield name, [message(heard(1, 1.3), "and", heard(2, 0.7), "what do you hear?")]
        elif name != "clip":  # what a clip's frames are is said otherwise over HTTP
            yield name, chat


def said(client: openai.OpenAI, chat: Sequence[Mapping[str, Any]]) -> tuple[int, list[float]]:
    """Tokens of the prompt, and the log-probabilities of a greedy answer's."""
    messages: Any = [{**turn, "content": [part_of(part) for part in turn["content"]]} for turn in chat]
    answer = client.chat.completions.create(
        model="sees",
        messages=messages,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    return answer.usage.prompt_tokens, [each.logprob for each in logprobs.content]


@pytest.mark.parametrize("family", FAMILIES_OVER_HTTP)
def test_every_family_answers_over_http_as_in_mlx_vlm(family, vlm_folder, vlm_reference):
    reference: Reference = vlm_reference(family)
    runtime = Runtime.start(ServeConfig(model=str(vlm_folder(family)), name="sees"))
    try:
        with (
            serving(runtime) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client,
        ):
            for _, chat in chats(family):
                row = reference.row(chat)
                tokens = reference.greedy(row, 6)
                logits = reference.logits(row, tokens[:-1])
                logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                num_prompt_tokens, found = said(client, chat)
                assert num_prompt_tokens == len(row.token_ids)
                expected = [float(logprobs[index, token].item()) for index, token in enumerate(tokens)]
                np.testing.assert_allclose(found, expected, atol=1e-2)
    finally:
        runtime.close()
