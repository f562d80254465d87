"""A Generation in, an HTTP response out, whole or as server-sent events. A client that goes away frees its rows."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from serve.api.body import CLIENT_CLOSED_REQUEST
from serve.api.errors import body_of
from serve.api.generation import Generation
from serve.engine.request import Event, FinishReason, TokenLogprob
from serve.errors import LatheError

T = TypeVar("T")
EVENT_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What a route that can stream adds to its OpenAPI description."""
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which readers of server-sent events skip."""


@dataclass
class Answer:
    """One row's whole answer, as it grows."""

    text: str = ""
    reasoning: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()

    def add(self, event: Event) -> None:
        """Append what an event brought."""
        self.text += event.text
        self.reasoning += event.reasoning
        self.logprobs += event.logprobs
        self.finish = event.finish
        self.stop_reason = event.stop_reason
        self.prompt_logprobs = self.prompt_logprobs or event.prompt_logprobs


def best_of(answers: Mapping[int, Answer], num_drawn: int, num_kept: int | None) -> list[int]:
    """Rows of the answers to send, by prompt, and of each the best first if some are left out: those of the highest
    log-probability a token."""
    if num_kept is None or num_kept == num_drawn:
        return sorted(answers)

    def score(row: int) -> float:
        values = [entry.logprob for entry in answers[row].logprobs]
        return sum(values) / len(values) if values else 0.0

    prompts = range(0, len(answers), num_drawn)
    ranked = [sorted(range(first, first + num_drawn), key=score, reverse=True) for first in prompts]
    return [row for rows in ranked for row in rows[:num_kept]]


class Format(Protocol):
    """How one endpoint writes its answers. Made for one response; it may count what it has written."""

    kind: str
    chunk_kind: str

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """An entry of `choices` in a whole response."""

    def extra(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """What a whole response says beside its choices."""

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
    keep_alive_s: float = 0
    """Longest silence of a stream; 0: no matter how long."""
    num_kept: int | None = None
    """Of the answers to one prompt, the best so many are sent; None: all."""
    has_answer: bool = True
    """False: the prompt is given back alone, and no token counts as an answer."""

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
        kept = best_of(answers, self.generation.num_choices, self.num_kept)
        choices = [
            {**self.format.choice(row, answers[row]), "index": index} for index, row in enumerate(kept)
        ]
        return JSONResponse(
            {
                **self._envelope(self.format.kind),
                "choices": choices,
                "usage": self._whole_usage(),
                **self.format.extra([answers[row] for row in kept]),
            },
            headers=self.generation.target.headers,
        )

    async def stream(self, *, wants_usage: bool, is_continuous: bool = False) -> Response:
        """Events as they come. A refusal that comes before the first keep-alive has its own HTTP status.

        wants_usage    a last chunk says what the whole request used
        is_continuous  every chunk says what its choice has used so far
        """
        first = asyncio.ensure_future(self.generation.next())
        try:
            await unless_gone(self.receive, asyncio.wait({first}, timeout=self.keep_alive_s or None))
            if first.done():
                first.result()
        except BaseException as error:
            await _cancelled(first)
            self.generation.close()
            if isinstance(error, ClientGoneError):
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            raise
        pieces = self._pieces(first, wants_usage, is_continuous)
        return EventStream(self.generation, pieces, self.keep_alive_s)

    async def _pieces(
        self, first: asyncio.Task[tuple[int, Event]], wants_usage: bool, is_continuous: bool
    ) -> AsyncIterator[bytes]:
        envelope = self._envelope(self.format.chunk_kind)
        if wants_usage:
            envelope["usage"] = None
        num_tokens: dict[int, int] = {}
        num_thought: dict[int, int] = {}
        try:
            if not first.done():
                yield KEEP_ALIVE
            index, event = await first
            while True:
                before, thought_before = num_tokens.get(index, 0), num_thought.get(index, 0)
                num_tokens[index] = before + len(event.token_ids)
                num_thought[index] = event.num_reasoning_tokens
                for delta in self.format.deltas(index, event):
                    if is_continuous:
                        # The chunk that opens a chat's choice brings no token yet.
                        is_opening = "role" in delta.get("delta", ())
                        envelope["usage"] = (
                            self._usage(before, thought_before)
                            if is_opening
                            else self._usage(num_tokens[index], num_thought[index])
                        )
                    yield _sse({**envelope, "choices": [delta]})
                if self.generation.is_done:
                    break
                index, event = await self.generation.next()
        except LatheError as error:
            yield _sse(body_of(error))
            return
        finally:
            await _cancelled(first)
        if wants_usage:
            yield _sse({**envelope, "choices": [], "usage": self._whole_usage()})
        yield b"data: [DONE]\n\n"

    def _envelope(self, kind: str) -> dict[str, Any]:
        generation = self.generation
        return {
            "id": generation.id,
            "object": kind,
            "created": generation.created,
            "model": generation.target.asked,
        }

    def _whole_usage(self) -> dict[str, Any]:
        return self._usage(self.generation.num_answer_tokens, self.generation.num_reasoning_tokens)

    def _usage(self, num_answer_tokens: int, num_reasoning_tokens: int) -> dict[str, Any]:
        num_answer_tokens *= self.has_answer
        details = self._answer_details(num_reasoning_tokens)
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_answer_tokens,
            "total_tokens": self.num_prompt_tokens + num_answer_tokens,
            "prompt_tokens_details": {"cached_tokens": self.generation.num_cached_tokens},
            **({"completion_tokens_details": details} if details else {}),
        }

    def _answer_details(self, num_reasoning_tokens: int) -> dict[str, int]:
        """What is said of the answers' tokens: how many think, where they are told apart, and how many were guessed,
        as far as rows have ended, where somebody guesses."""
        generation = self.generation
        details = {"reasoning_tokens": num_reasoning_tokens} if generation.has_thoughts else {}
        if not generation.has_drafter:
            return details
        return details | {
            "accepted_prediction_tokens": generation.num_accepted,
            "rejected_prediction_tokens": generation.num_drafted - generation.num_accepted,
        }


class EventStream(StreamingResponse):
    """Server-sent events that end, and end the generation, when the client goes away. No silence is longer than
    `keep_alive_s`, unless that is 0."""

    def __init__(self, generation: Generation, pieces: AsyncIterator[bytes], keep_alive_s: float = 0) -> None:
        headers = {**generation.target.headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self._generation = generation
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs as ASGI."""
        try:
            await unless_gone(receive, self._respond(send))
        except (ClientGoneError, OSError):
            return
        finally:
            self._generation.close()

    async def _respond(self, send: Send) -> None:
        if not self._keep_alive_s:
            return await self.stream_response(send)
        steady = _SteadySend(send, self._keep_alive_s)
        beating = asyncio.ensure_future(steady.beat())
        try:
            await self.stream_response(steady)
        finally:
            await _cancelled(beating)


class _SteadySend:
    """A `send` of ASGI beside which a comment goes out whenever nothing else has for `every_s`.

    Each message holds whole events, so a comment may stand between any two.
    """

    def __init__(self, send: Send, every_s: float) -> None:
        self._send = send
        self._every_s = every_s
        self._lock = asyncio.Lock()
        self._last_s = time.monotonic()
        self._is_over = False

    async def __call__(self, message: Message) -> None:
        async with self._lock:
            await self._send(message)
            self._is_over = message["type"] == "http.response.body" and not message.get("more_body")
            self._last_s = time.monotonic()

    async def beat(self) -> None:
        """Send comments until the response is over, or until cancelled."""
        while not self._is_over:
            await asyncio.sleep(max(self._last_s + self._every_s - time.monotonic(), 0.001))
            async with self._lock:
                if not self._is_over and time.monotonic() - self._last_s >= self._every_s:
                    await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
                    self._last_s = time.monotonic()


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


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """Wait until `task` has ended, now; what it would have given or raised is dropped."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _sse(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
