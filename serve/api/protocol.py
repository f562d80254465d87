"""uvicorn's HTTP connection, and an end to those that keep a socket and do nothing with it.

llhttp reads what clients send, in C, and bounds no head; uvicorn waits for ever for the rest of one, and for a client
that takes nothing of its answer.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from starlette.types import ASGIApp, Message
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serve.api.targets import ARRIVING
from serve.engine.arrivals import ARRIVALS

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 2**16
"""Of a request, up to its body; what follows a head in one packet may count too."""


class Connection(HttpToolsProtocol):
    """One client's connection. Subclasses hold the limits, since uvicorn makes connections itself."""

    header_timeout_s: float
    write_timeout_s: float
    max_connections: int

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._head_due: asyncio.TimerHandle | None = None
        self._write_due: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None  # of those that came behind each other
        self._is_in_head = False
        self._is_in_body = False
        self._num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come; it has a while to say what it wants."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            logger.warning("%d connections are open, and one more is closed at once", self.max_connections)
            transport.abort()
            return
        ARRIVALS.begin(self)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Some of a request. While its head is not whole, the time that it has goes on running."""
        super().data_received(data)
        if self.transport.is_closing() or self._is_in_body:
            return
        self._num_head_bytes += len(data)
        if self._is_in_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The head of this request is too large.")
        elif self._head_due is None and self.timeout_keep_alive_task is None and not self._is_answering:
            self._await_head()

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        ARRIVALS.begin(self)
        self._is_in_head = True
        self._num_head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """One of its lines; what stands behind a body is none."""
        if self._is_in_head:
            super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        """A head is whole. ValueError, which becomes a 400, for hosts that are none or many."""
        self._is_in_head, self._is_in_body = False, True
        self._stop_head_clock()
        num_hosts = sum(name == b"host" for name, _ in self.headers)
        if num_hosts > 1 or (not num_hosts and self.parser.get_http_version() == "1.1"):
            raise ValueError
        super().on_headers_complete()
        if self.parser.should_upgrade():  # llhttp reads no more of this connection
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        """So is its body."""
        super().on_message_complete()
        self._is_in_body = False
        self._num_head_bytes = 0

    def on_response_complete(self) -> None:
        """Between two requests uvicorn's own clock runs; a head that has begun to come behind this one has ours."""
        super().on_response_complete()
        ARRIVALS.end(self)
        if self._is_in_head and self._head_due is None:
            self._await_head()

    def send_400_response(self, msg: str) -> None:
        """Of what is no HTTP; in the midst of an answer there is no place to say so."""
        if self._is_answering:
            self.transport.close()
        else:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        """The client does not take what it is sent."""
        super().pause_writing()
        if self._write_due is None:
            self._write_due = self.loop.call_later(self.write_timeout_s, self._give_up_writing)

    def resume_writing(self) -> None:
        """It has taken some."""
        super().resume_writing()
        self._stop_write_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_head_clock()
        self._stop_write_clock()
        ARRIVALS.end(self)
        super().connection_lost(exc)
        if (cycle := self._running) is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()

    @property
    def _is_answering(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        self._running = cycle
        cycle.scope[ARRIVING] = self  # type: ignore[literal-required]
        _set_up(cycle)
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    def _unsupported_upgrade_warning(self) -> None:
        """A client may offer to speak something else, and is answered in HTTP."""

    def _await_head(self) -> None:
        self._head_due = self.loop.call_later(self.header_timeout_s, self._give_up_reading)

    def _stop_head_clock(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _stop_write_clock(self) -> None:
        if self._write_due is not None:
            self._write_due.cancel()
            self._write_due = None

    def _give_up_reading(self) -> None:
        self._head_due = None
        self.transport.close()

    def _give_up_writing(self) -> None:
        self._write_due = None
        logger.info("a client has taken nothing for %g s and is cut off", self.write_timeout_s)
        self.transport.abort()


class HeadHolder:
    """A transport that keeps a response's head until what follows it is written, as ASGI wants: one packet. Each
    write gives the interpreter's lock away, which the engine's thread may then keep for milliseconds before the first
    token can follow."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.is_holding = False
        """What is written now is a head."""
        self._transport = transport
        self._held = b""

    def write(self, data: bytes) -> None:
        """Behind what is held."""
        data, self._held = self._held + data, b""
        if self.is_holding:
            self._held = data
        else:
            self._transport.write(data)

    def let_go(self) -> None:
        """Of a response that ends behind its head, that is all."""
        self.is_holding = False
        if self._held:
            self.write(b"")

    def close(self) -> None:
        """Nothing follows."""
        self.let_go()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _set_up(cycle: RequestResponseCycle) -> None:
    """Let its response's head go out with what follows it, and reach a client of HTTP/1.0, which knows no chunks, up
    to the end of the connection where its length is not known."""
    transport, write = HeadHolder(cycle.transport), cycle.send
    cycle.transport = transport  # type: ignore[assignment]
    is_endless = False

    async def send(message: Message) -> None:
        nonlocal is_endless
        transport.is_holding = message["type"] == "http.response.start"
        if transport.is_holding and _is_endless(cycle, message):
            is_endless, cycle.chunked_encoding = True, False
        if is_endless:
            cycle.expected_content_length = len(message.get("body", b""))
        await write(message)  # type: ignore[arg-type]
        transport.is_holding = False
        if cycle.response_complete:  # HEAD's has no body
            transport.let_go()

    cycle.send = send  # type: ignore[method-assign, assignment]


def _is_endless(cycle: RequestResponseCycle, start: Message) -> bool:
    is_known = any(name.lower() == b"content-length" for name, _ in start["headers"])
    return not is_known and cycle.scope["http_version"] != "1.1"


def connections(
    *, header_timeout_s: float, write_timeout_s: float, max_connections: int
) -> type[asyncio.Protocol]:
    """What uvicorn makes a connection of."""
    limits = {
        "header_timeout_s": header_timeout_s,
        "write_timeout_s": write_timeout_s,
        "max_connections": max_connections,
    }
    return type("LimitedConnection", (Connection,), limits)
