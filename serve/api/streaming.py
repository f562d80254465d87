"""A Turn in, an HTTP response out, whole or as a stream, in the words of a Writer. A client that goes away frees its
rows."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from serve.api.answer import Answer, Piece
from serve.api.body import CLIENT_CLOSED_REQUEST
from serve.api.exchange import current
from serve.api.leaving import ClientGoneError, unless_gone
from serve.api.opening import KEEP_ALIVE
from serve.api.targets import Target
from serve.errors import LatheError

T = TypeVar("T")
EVENT_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
"""What a route that can stream adds to its OpenAPI description."""
as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Turn(Protocol):
    """Answers under way; serve/api/turn.py has them."""

    @property
    def target(self) -> Target:
        """What answers."""

    @property
    def is_done(self) -> bool:
        """True when every row has had its final piece."""

    async def next(self) -> tuple[int, Piece]:
        """What came next, with its row."""

    def close(self) -> None:
        """Cancel what still runs."""


class Writer(Protocol):
    """One API's words for the answers to one request. Made for one response; it may count what it has written.
    What a stream gets is whole events, or nothing."""

    def whole(self, answers: Mapping[int, Answer]) -> dict[str, Any]:
        """All of it at once."""

    def begin(self) -> bytes:
        """What a stream begins with, as its first piece comes."""

    def piece(self, row: int, piece: Piece) -> bytes:
        """What a piece becomes in a stream."""

    def end(self) -> bytes:
        """What a stream ends with, all rows having ended."""

    def error(self, error: LatheError) -> bytes:
        """What a stream ends with that broke."""


@dataclass(frozen=True)
class Responder:
    """Answers one request."""

    turn: Turn
    writer: Writer
    receive: Receive
    keep_alive_s: float = 0
    """Longest silence of a stream; 0: no matter how long."""
    keep_alive: bytes = KEEP_ALIVE
    """What breaks it."""
    media_type: str = "text/event-stream"
    """Of a stream."""

    async def whole(self) -> Response:
        """Everything at once, when all rows have ended."""
        answers: dict[int, Answer] = {}

        async def collect() -> None:
            while not self.turn.is_done:
                row, piece = await self.turn.next()
                answers.setdefault(row, Answer()).add(piece)

        try:
            await unless_gone(self.receive, collect())
        except ClientGoneError:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        finally:
            self.turn.close()
        return JSONResponse(self.writer.whole(answers), headers=self.turn.target.headers)

    async def stream(self) -> Response:
        """Events as they come. A refusal that comes before the first keep-alive has its own HTTP status."""
        return EventStream(self)


class EventStream(Response):
    """What is written ends, and ends the turn, when the client goes away. No silence is longer than the responder's
    `keep_alive_s`, unless that is 0. It begins with the first piece, or with the comment that breaks the silence
    before; what ends the turn earlier is raised.

    The task that waits for the first piece is the one that sends it: each that stood between would cost a turn of the
    loop, while the engine's next step waits.
    """

    def __init__(self, responder: Responder) -> None:
        headers = {**responder.turn.target.headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(media_type=responder.media_type, headers=headers)
        del self.headers["content-length"]
        self._responder = responder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs as ASGI."""
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        steady = _SteadySend(start, send, self._responder.keep_alive)
        try:
            last = await unless_gone(receive, self._respond(steady))
            await steady.end(last)  # here, lest the client's next request is noted before this one has ended
        except (ClientGoneError, OSError):
            if not steady.has_begun:
                await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send)
        finally:
            self._responder.turn.close()

    async def _respond(self, steady: _SteadySend) -> bytes:
        """All but what ends it, which is returned: one write less."""
        beating, every_s = None, self._responder.keep_alive_s
        if every_s:
            beating = asyncio.ensure_future(steady.beat(every_s))
            beating.add_done_callback(_drop)
        try:
            return await self._write(steady)
        except LatheError as error:
            if not steady.has_begun:
                raise
            return self._responder.writer.error(error)
        finally:
            if beating is not None:
                beating.cancel()

    async def _write(self, steady: _SteadySend) -> bytes:
        turn, writer = self._responder.turn, self._responder.writer
        row, piece = await turn.next()
        if begun := writer.begin():
            await steady.send(begun)
        while True:
            written = writer.piece(row, piece)
            if turn.is_done:
                return written + writer.end()
            if written:
                await steady.send(written)
            row, piece = await turn.next()


class _SteadySend:
    """Sends bytes, and a comment whenever nothing else has gone out for a while. The first of either begins the
    response.

    Each part holds whole events, so a comment may stand between any two.
    """

    def __init__(self, start: Message, send: Send, comment: bytes) -> None:
        exchange = current()
        self.has_begun = False
        self._start = start
        self._send = send
        self._send_body = exchange.send_body if exchange and exchange.send_body else send
        self._comment = comment
        self._last_s = time.monotonic()
        self._is_sending = False
        self._comment_sent: asyncio.Future[None] | None = None

    async def send(self, some: bytes) -> None:
        """Behind a comment that is on its way."""
        if self._comment_sent is not None:
            await self._comment_sent
        self._is_sending = True
        await self._put(some)
        self._is_sending = False
        self._last_s = time.monotonic()

    async def end(self, some: bytes) -> None:
        """Send what comes last. No comment follows."""
        if self._comment_sent is not None:
            await self._comment_sent
        self._is_sending = True
        await self._begin()
        await self._send({"type": "http.response.body", "body": some, "more_body": False})

    async def beat(self, every_s: float) -> None:
        """Send comments until cancelled, which is not done between two parts of one."""
        while True:
            await asyncio.sleep(max(self._last_s + every_s - time.monotonic(), 0.001))
            if self._is_sending or time.monotonic() - self._last_s < every_s:
                continue
            self._comment_sent = asyncio.get_running_loop().create_future()
            try:
                await self._put(self._comment)
            finally:
                self._comment_sent.set_result(None)
                self._comment_sent = None
                self._last_s = time.monotonic()

    async def _put(self, some: bytes) -> None:
        await self._begin()
        await self._send_body({"type": "http.response.body", "body": some, "more_body": True})

    async def _begin(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            await self._send(self._start)


def _drop(task: asyncio.Future[Any]) -> None:
    """What it would have raised is nobody's: whoever sends next finds out."""
    if not task.cancelled():
        task.exception()


def sse(data: dict[str, Any], event: str | None = None) -> bytes:
    """One server-sent event, of that name if there is one."""
    name = f"event: {event}\n".encode() if event is not None else b""
    return name + b"data: " + as_json(data).encode() + b"\n\n"
