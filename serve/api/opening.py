"""A stream whose answer is long in coming (a model is loaded, a conversation is summed up) → its headers and comments
meanwhile.

A route that takes a body says whether a stream was asked for (`announce`), and whoever begins what may take long says
so (`expect_long`). Where the application has then begun no response for `stream_keep_alive_s`, one is begun for it:
what it begins itself later goes on after the comments, and what turns out to be a refusal becomes the stream's last
event. What is answered before has its own status.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from serve.api.state import AppState

KEY = "lathe.opening"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which readers of server-sent events skip."""


def _event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


@dataclass(frozen=True)
class Words:
    """What one API's streams look like before there is anything to say."""

    media_type: str = "text/event-stream"
    keep_alive: bytes = KEEP_ALIVE
    error: Callable[[bytes], bytes] = _event
    """The last event, made of an error's JSON."""
    is_default: bool = False
    """A body that does not say gets a stream."""


def announce(request: Request, body: Any) -> None:
    """Of a body that was read: whether it asks for a stream."""
    opening = request.scope.get(KEY)
    if isinstance(opening, _Opening) and isinstance(body, Mapping):
        opening.is_stream = body.get("stream", opening.words.is_default) is True


def expect_long(request: Request) -> None:
    """What the request waits for from here on may take long."""
    opening = request.scope.get(KEY)
    if isinstance(opening, _Opening):
        opening.expect_long()


async def withdraw(request: Request) -> None:
    """The answer is under way, and whoever has it knows what to say."""
    opening = request.scope.get(KEY)
    if isinstance(opening, _Opening):
        await opening.withdraw()


class Openings:
    """ASGI middleware, the innermost: what others add to a response's beginning they add to these too."""

    def __init__(self, app: ASGIApp, state: AppState, words: Mapping[str, Words]) -> None:
        """words: APIs' own, by the beginning of the path; all others have OpenAI's chat's."""
        self._app = app
        self._state = state
        self._words = words

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs as ASGI."""
        every_s = self._state.config.stream_keep_alive_s
        if scope["type"] != "http" or not every_s:
            return await self._app(scope, receive, send)
        path = scope["path"]
        words = next((words for prefix, words in self._words.items() if path.startswith(prefix)), Words())
        opening = _Opening(send, every_s, words)
        scope[KEY] = opening
        try:
            await self._app(scope, receive, opening.send)
        finally:
            await opening.close()


class _Opening:
    """Of one request: begun by the application, or here."""

    def __init__(self, send: Send, every_s: float, words: Words) -> None:
        self._send = send
        self._every_s = every_s
        self.words = words
        self.is_stream = False
        """One was asked for."""
        self._beating: asyncio.Task[None] | None = None
        self._is_answered = asyncio.Event()
        self._is_begun = False  # here
        self._refusal: list[bytes] | None = (
            None  # what the application answers instead of a stream, as it comes
        )

    def expect_long(self) -> None:
        """Begin it in a while, if it is a stream."""
        if self.is_stream and self._beating is None and not self._is_answered.is_set():
            self._beating = asyncio.ensure_future(self._beat())

    async def send(self, message: Message) -> None:
        """What the application sends."""
        if message["type"] == "http.response.start":
            await self.close()
            if not self._is_begun:
                await self._send(message)
            elif message["status"] != 200:
                self._refusal = []
        elif self._refusal is None:
            await self._send(message)
        else:
            self._refusal.append(message.get("body", b""))
            if not message.get("more_body"):
                await self._refuse(b"".join(self._refusal))

    async def withdraw(self) -> None:
        """Whoever answers sends the comments from here on, unless they have begun."""
        if not self._is_begun:
            await self.close()

    async def close(self) -> None:
        """No more comments; the one that is being sent is sent whole."""
        if self._beating is None:
            return
        beating, self._beating = self._beating, None
        self._is_answered.set()
        try:
            await asyncio.wait({beating})
        finally:
            beating.cancel()
        if not beating.cancelled() and (error := beating.exception()) is not None:
            raise error

    async def _beat(self) -> None:
        while True:
            try:
                return await asyncio.wait_for(_set(self._is_answered), self._every_s)
            except TimeoutError:
                if not self._is_begun:
                    await self._begin()
                comment = {"type": "http.response.body", "body": self.words.keep_alive, "more_body": True}
                await self._send(comment)

    async def _refuse(self, body: bytes) -> None:
        written = self.words.error(body) if body else b""
        await self._send({"type": "http.response.body", "body": written, "more_body": False})

    async def _begin(self) -> None:
        self._is_begun = True
        headers = {
            "content-type": self.words.media_type,
            "cache-control": "no-cache",
            "x-accel-buffering": "no",
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})


async def _set(event: asyncio.Event) -> None:
    await event.wait()
