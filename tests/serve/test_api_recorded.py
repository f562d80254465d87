"""What agents and editors send, in the shapes that their public documentation and sources show: no answer is a 4xx.

Each file of recorded/ is one client's conversation: requests in their order. "$id" is the answer before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tiny import QWEN3

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

RECORDED = sorted((Path(__file__).parent / "recorded").glob("*.json"))
ENDS = {
    "/v1/chat/completions": ("data: [DONE]",),
    "/v1/completions": ("data: [DONE]",),
    "/v1/messages": ("event: message_stop",),
    "/v1/responses": ("event: response.completed", "event: response.incomplete"),
}
"""What a stream ends with."""


QWEN3 = {**QWEN3, "max_position_embeddings": 16384}
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
SHORT = 24
"""Tokens of an answer: the model is random, and would go on for as long as it may."""


@pytest.fixture(scope="module")
def http(make_model: Callable[..., Path]) -> Iterator[httpx.Client]:
    folder = make_model("recorded", QWEN3)
    runtime = Runtime.start(
        ServeConfig(model=str(folder), name="lively", default_max_tokens=SHORT, max_rows=8)
    )
    try:
        with serving(runtime) as url, httpx.Client(base_url=url, timeout=120) as client:
            yield client
        assert runtime.worker.failure is None
    finally:
        runtime.close()


def test_there_are_recordings() -> None:
    assert {file.stem for file in RECORDED} >= {"claude_code", "codex", "zed", "continue", "aider"}


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_a_clients_conversation_is_answered(file: Path, http: httpx.Client) -> None:
    conversation = json.loads(file.read_text())
    last_id = ""
    for number, request in enumerate(conversation["requests"]):
        body = _shortened(_with_id(request.get("body"), last_id))
        method = request.get("method", "POST")
        answer = http.request(method, request["path"], headers=request.get("headers"), json=body)
        where = f"{file.name}, request {number}: {request['path']}"
        assert answer.status_code == 200, f"{where}: {answer.text}"
        if body is not None and body.get("stream"):
            ends = ENDS[request["path"].partition("?")[0]]
            assert any(end in answer.text for end in ends), f"{where}: {answer.text[-400:]}"
            assert '"error"' not in answer.text.replace('"error":null', ""), where
        last_id = _id_in(answer.text)


def _with_id(value: Any, last_id: str) -> Any:
    """The body, with the id of the answer before where it asks for that."""
    return json.loads(json.dumps(value).replace('"$id"', json.dumps(last_id))) if value is not None else None


def _shortened(body: Any) -> Any:
    return (
        {name: min(value, SHORT) if name in LIMITS else value for name, value in body.items()}
        if body
        else body
    )


def _id_in(text: str) -> str:
    """The first id that an answer tells."""
    for line in text.splitlines():
        found = line.removeprefix("data: ")
        if not found.startswith("{"):
            continue
        told = json.loads(found)
        told = told.get("response", told.get("message", told))
        if isinstance(told, dict) and isinstance(told.get("id"), str):
            return told["id"]
    return ""
