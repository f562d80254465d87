"""One streamed request to an OpenAI-compatible server, with the times at which its tokens arrived.

It knows HTTP and the streaming format, and nothing of what serves: any server is measured the same way.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import httpx

from serve.remote import EventData, message_of

Endpoint = Literal["chat", "completions"]
PATHS: Mapping[Endpoint, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True)
class Ask:
    """One request: a greedy answer of `max_tokens` tokens to `prompt`."""

    model: str
    prompt: str
    max_tokens: int
    endpoint: Endpoint = "chat"
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields added to the body as they are, for servers that know more than OpenAI's."""
    history: tuple[Mapping[str, str], ...] = ()
    """Messages of the chat before `prompt`: role and content."""
    shown: tuple[Mapping[str, Any], ...] = ()
    """Parts of the message before `prompt`: pictures, clips."""

    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        text: dict[str, Any] = {"prompt": self.prompt}
        if self.endpoint == "chat":
            content: Any = self.prompt
            if self.shown:
                content = [*self.shown, {"type": "text", "text": self.prompt}]
            text = {"messages": [*self.history, {"role": "user", "content": content}]}
        return {
            "model": self.model,
            **text,
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }


@dataclass(frozen=True)
class Answer:
    """What came back. Times are seconds after the request was sent; None where nothing came."""

    model: str
    first_s: float | None
    """Until the first piece of text: TTFT."""
    last_s: float | None
    """Until the last piece of text."""
    num_prompt_tokens: int | None
    """As the server counts them; None if it gave no usage."""
    num_tokens: int
    counted_by: Literal["usage", "chunks"]
    text: str
    finish: str | None
    error: str | None = None
    num_cached_tokens: int | None = None
    """Of the prompt, those that a prefix cache had, as the server counts them; None if it does not say."""
    arrivals_s: tuple[float, ...] = ()
    """When each piece of text came, by `time.perf_counter`."""
    error_kind: str | None = None
    """The error's kind, for counting: a status, how the connection failed, `stream`, `unfinished`, `cut off`."""
    start_s: float = 0.0
    """When the request was sent, by `time.perf_counter`."""

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Seconds between pieces of text that follow each other: inter-token gaps, where a token is a piece."""
        return tuple(later - earlier for earlier, later in pairwise(self.arrivals_s))

    @property
    def tpot_s(self) -> float | None:
        """Seconds between tokens after the first one."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


async def ask(
    http: httpx.AsyncClient,
    request: Ask,
    begun: asyncio.Event | None = None,
    until_s: float | None = None,
) -> Answer:
    """Send `request` and read its stream to the end. A failure is an Answer with `error`, not an exception.

    begun    set once the answer's first text is there, or once there will be none
    until_s  by the event loop's clock: a stream that has not ended by then is cut off
    """
    reading = _Reading(request.model, begun)
    try:
        async with asyncio.timeout_at(until_s):
            return await _read(http, request, reading)
    except TimeoutError:
        return reading.answer("cut off by the time limit", "cut off")
    finally:
        reading.tell()


async def _read(http: httpx.AsyncClient, request: Ask, reading: _Reading) -> Answer:
    try:
        async with http.stream("POST", PATHS[request.endpoint], json=request.body()) as response:
            if response.status_code != 200:
                await response.aread()
                kind = f"HTTP {response.status_code}"
                return reading.answer(f"{kind}: {message_of(response.text)}", kind)
            async for chunk in _chunks(response):
                reading.take(chunk)
    except (httpx.HTTPError, ValueError, AttributeError) as error:
        kind = type(error).__name__
        return reading.answer(f"{kind}: {error}".removesuffix(": "), kind)
    return reading.answer(reading.error, "stream")


class _Reading:
    """What is known of a stream so far."""

    def __init__(self, model: str, begun: asyncio.Event | None) -> None:
        self.model = model
        self.begun = begun
        self.start_s = time.perf_counter()
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.pieces: list[str] = []
        self.arrivals_s: list[float] = []
        self.usage: Mapping[str, Any] | None = None
        self.finish: str | None = None
        self.error: str | None = None

    def take(self, chunk: Mapping[str, Any]) -> None:
        if chunk.get("error"):
            self.error = message_of(json.dumps(chunk))
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices") or ():
            self.finish = choice.get("finish_reason") or self.finish
            piece = _text_of(choice)
            if piece:
                self.arrivals_s.append(time.perf_counter())
                self.last_s = self.arrivals_s[-1] - self.start_s
                self.first_s = self.last_s if self.first_s is None else self.first_s
                self.pieces.append(piece)
                self.tell()

    def tell(self) -> None:
        if self.begun is not None:
            self.begun.set()

    def answer(self, error: str | None, kind: str) -> Answer:
        """What has come so far; `kind` is that of the error, if there is one."""
        if error is None and self.finish is None:
            error, kind = "the stream ended without a finish_reason", "unfinished"
        usage = self.usage or {}
        counted = usage.get("completion_tokens")
        return Answer(
            model=self.model,
            first_s=self.first_s,
            last_s=self.last_s,
            num_prompt_tokens=usage.get("prompt_tokens"),
            num_tokens=len(self.pieces) if counted is None else int(counted),
            counted_by="chunks" if counted is None else "usage",
            text="".join(self.pieces),
            finish=self.finish,
            error=error,
            num_cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
            arrivals_s=tuple(self.arrivals_s),
            error_kind=None if error is None else kind,
            start_s=self.start_s,
        )


async def _chunks(response: httpx.Response) -> AsyncIterator[Mapping[str, Any]]:
    """The JSON objects of a server-sent event stream, up to [DONE]."""
    events = EventData()
    async for some in response.aiter_bytes():
        for data in events.feed(some):
            yield json.loads(data)


def _text_of(choice: Mapping[str, Any]) -> str:
    """The text of one streamed choice; reasoning counts, it is made of tokens too."""
    delta = choice.get("delta") or {}
    reasoning = delta.get("reasoning_content") or delta.get("reasoning") or ""
    return (delta.get("content") or "") + reasoning + (choice.get("text") or "")
