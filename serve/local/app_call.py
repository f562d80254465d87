"""An ASGI application called in this process: its loop on a thread, requests from any other. No sockets.

What a client sends over HTTP comes in here as the same body, and the same endpoints answer it.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message

from serve.api.body import CLIENT_CLOSED_REQUEST
from serve.errors import RequestError, StoppedError
from serve.remote import refusal

HEADERS = ((b"content-type", b"application/json"), (b"host", b"localhost"))
CLOSING_S = 10.0


class Response:
    """A response on its way. One thread reads it, once."""

    def __init__(self, loop: asyncio.AbstractEventLoop, when_ended: Callable[[], object]) -> None:
        self.status = 0
        self._loop = loop
        self._when_ended = when_ended
        self._gone = asyncio.Event()
        self._parts: queue.SimpleQueue[bytes | BaseException | None] = queue.SimpleQueue()

    def __iter__(self) -> Iterator[bytes]:
        """The body's parts as they come. Raises what an answer other than 200 says."""
        refused: list[bytes] = []
        try:
            while (part := self._parts.get()) is not None:
                if isinstance(part, BaseException):
                    raise part
                if self.status < 400:
                    yield part
                else:
                    refused.append(part)
            if refused:
                raise refusal(self.status, b"".join(refused).decode(errors="replace"))
        finally:
            self.cancel()

    def whole(self) -> bytes:
        """The body. As iterating it."""
        return b"".join(self)

    def cancel(self) -> None:
        """Be gone, as a client that closes its connection: what still runs for it ends. Any thread, any time."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._gone.set)

    async def run(self, app: ASGIApp, method: str, path: str, raw: bytes) -> None:
        """Let the application answer."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "scheme": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [*HEADERS, (b"content-length", str(len(raw)).encode())],
            "client": ("127.0.0.1", 0),
            "server": ("localhost", 80),
            "state": {},
        }
        sent = [raw]

        async def receive() -> Message:
            if sent:
                return {"type": "http.request", "body": sent.pop(), "more_body": False}
            await self._gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            elif message.get("body"):
                self._parts.put(message["body"])

        try:
            await app(scope, receive, send)
        except Exception as error:
            # Starlette answers 500, and then raises what it was.
            if not self.status:
                self._parts.put(error)
        finally:
            if self.status in (0, CLIENT_CLOSED_REQUEST):
                self._parts.put(_closed())
            self._parts.put(None)
            self._when_ended()


class AppCaller:
    """The application on a loop of its own, until `close`. Any thread."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._is_closed = False
        self._running: dict[asyncio.Task[None], Response] = {}  # the loop's alone
        started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(
            target=asyncio.run, args=(self._live(started),), name="lathe-local", daemon=True
        )
        self._thread.start()
        self._loop, self._closing = started.result()

    def begin(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        when_ended: Callable[[], object] = lambda: None,
    ) -> Response:
        """Send a request. `when_ended` is called on the loop's thread, when its whole response is there or nothing
        comes any more. StoppedError after `close`, RequestError for a body that is no JSON."""
        try:
            raw = b"" if body is None else json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RequestError(f"the request cannot be written as JSON: {error}") from None
        with self._lock:
            if self._is_closed:
                raise _closed()
            response = Response(self._loop, when_ended)
            self._loop.call_soon_threadsafe(self._start, response, method, path, raw)
        return response

    def close(self) -> None:
        """End what runs, then the loop. Any number of times, from any thread; the loop's own does not wait."""
        with self._lock:
            if not self._is_closed:
                self._loop.call_soon_threadsafe(self._closing.set)
            self._is_closed = True
        # The garbage collector may be at work on the loop's thread when it finds the last of a model.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    async def _live(self, started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]) -> None:
        closing = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), closing))
        await closing.wait()
        for response in self._running.values():
            response.cancel()
        if self._running:
            # asyncio.run cancels those that are late.
            await asyncio.wait([*self._running], timeout=CLOSING_S)

    def _start(self, response: Response, method: str, path: str, raw: bytes) -> None:
        task = self._loop.create_task(response.run(self._app, method, path, raw))
        self._running[task] = response
        task.add_done_callback(self._running.pop)


def _closed() -> StoppedError:
    return StoppedError("this model has been closed")
