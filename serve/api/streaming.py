"""A Generation in, an HTTP response out, whole or as server-sent events. A client that goes away frees its rows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from serve.api.errors import body_of
from serve.api.generation import Generation
from serve.engine.request import Event, FinishReason, TokenLogprob
from serve.errors import LatheError

T = TypeVar("T")
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; nobody reads it, logs do."""


@dataclass
class Answer:
    """One row's whole answer, as it grows."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_reason: str | None = None

    def add(self, event: Event) -> None:
        """Append what an event brought."""
        self.text += event.text
        self.logprobs += event.logprobs
        self.finish = event.finish
        self.stop_reason = event.stop_reason


class Format(Protocol):
    """How one endpoint writes its answers. Made for one response; it may count what it has written."""

    kind: str
    chunk_kind: str

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """An entry of `choices` in a whole response."""

    def deltas(self, index: int, event: Event) -> Sequence[dict[str, Any]]:
        """Entries of `choices` that an event becomes in a stream, each in a chunk of its own."""


class ClientGoneError(Exception):
    """The client has closed the connection; never leaves this package."""


@dataclass(frozen=True)
class Responder:
    """Answers one request."""

    generation: Generation
    format: Format
    num_prompt_tokens: int
    receive: Receive

    async def whole(self) -> Response:
        """Everything at once, when all rows have ended."""
        answers: dict[int, Answer] = {}

        async def collect() -> None:
            while not self.generation.is_done:
                index, event = await self.generation.next()
                answers.setdefault(index, Answer()).add(event)

        try:
            await unless_gone(self.receive, collect())
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            self.generation.close()
        choices = [self.format.choice(index, answer) for index, answer in sorted(answers.items())]
        return JSONResponse(
            {**self._envelope(self.format.kind), "choices": choices, "usage": self._usage()},
            headers=self.generation.target.headers,
        )

    async def stream(self, *, wants_usage: bool) -> Response:
        """Events as they come. Waits for the first one, so that a refusal has its own HTTP status."""
        try:
            first = await unless_gone(self.receive, self.generation.next())
        except ClientGoneError:
            self.generation.close()
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        except BaseException:
            self.generation.close()
            raise
        return EventStream(self.generation, self._pieces(first, wants_usage))

    async def _pieces(self, first: tuple[int, Event], wants_usage: bool) -> AsyncIterator[bytes]:
        envelope = self._envelope(self.format.chunk_kind)
        if wants_usage:
            envelope["usage"] = None
        try:
            index, event = first
            while True:
                for delta in self.format.deltas(index, event):
                    yield _sse({**envelope, "choices": [delta]})
                if self.generation.is_done:
                    break
                index, event = await self.generation.next()
        except LatheError as error:
            yield _sse(body_of(error))
            return
        if wants_usage:
            yield _sse({**envelope, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    def _envelope(self, kind: str) -> dict[str, Any]:
        generation = self.generation
        return {
            "id": generation.id,
            "object": kind,
            "created": generation.created,
            "model": generation.target.asked,
        }

    def _usage(self) -> dict[str, int]:
        answer = self.generation.num_answer_tokens
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": answer,
            "total_tokens": self.num_prompt_tokens + answer,
        }


class EventStream(StreamingResponse):
    """Server-sent events that end, and end the generation, when the client goes away."""

    def __init__(self, generation: Generation, pieces: AsyncIterator[bytes]) -> None:
        headers = {**generation.target.headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs as ASGI."""
        try:
            await unless_gone(receive, self.stream_response(send))
        except (ClientGoneError, OSError):
            return
        finally:
            self._generation.close()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled with ClientGoneError as soon as the client closes the connection."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
