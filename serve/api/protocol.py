"""uvicorn's HTTP connection, and an end to those that keep a socket and do nothing with it.

uvicorn waits for ever for the rest of a request's head, and for a client that takes nothing of its answer.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from starlette.types import Message, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

logger = logging.getLogger(__name__)


class Connection(H11Protocol):
    """One client's connection. Subclasses hold the limits, since uvicorn makes connections itself."""

    header_timeout_s: float
    write_timeout_s: float
    max_connections: int

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._head_due: asyncio.TimerHandle | None = None
        self._write_due: asyncio.TimerHandle | None = None
        self._quick_cycle: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come; it has a while to say what it wants."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            logger.warning("%d connections are open, and one more is closed at once", self.max_connections)
            transport.abort()
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Some of a request. While its head is not whole, the time that it has goes on running."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_head_clock()
        elif self._head_due is None and self.timeout_keep_alive_task is None:
            self._await_head()

    def handle_events(self) -> None:
        """Begin what has come; a stream of its answer is written without ceremony."""
        super().handle_events()
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and cycle is not self._quick_cycle:
            self._quick_cycle = cycle
            cycle.send = _quick(cycle)  # type: ignore[method-assign, assignment]

    def on_response_complete(self) -> None:
        """Between two requests uvicorn's own clock runs; a head that has begun to come behind this one has ours."""
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0] and self._head_due is None:
            self._await_head()

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
        super().connection_lost(exc)

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

    def close(self) -> None:
        """Of a response that ends behind its head, that is all."""
        self.is_holding = False
        self.write(b"")
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def _quick(cycle: RequestResponseCycle) -> Send:
    """The cycle's `send`, by which chunks of a stream go to the socket as they are: h11 would make them objects, look
    their state up, which a chunk does not change, and make them bytes again. A third of what a token costs here."""
    through_h11: Send = cycle.send  # type: ignore[assignment]
    transport, flow = HeadHolder(cycle.transport), cycle.flow
    cycle.transport = transport  # type: ignore[assignment]
    is_chunked = False

    async def send(message: Message) -> None:
        nonlocal is_chunked
        if is_chunked and message.get("more_body"):
            if flow.write_paused and not cycle.disconnected:
                await flow.drain()
            body = message["body"]
            if body and not cycle.disconnected:
                transport.write(b"%x\r\n%b\r\n" % (len(body), body))
            return
        is_start = message["type"] == "http.response.start"
        transport.is_holding = is_start
        await through_h11(message)
        transport.is_holding = False
        if is_start:
            is_chunked = _is_chunked(cycle, message)

    return send


def _is_chunked(cycle: RequestResponseCycle, start: Message) -> bool:
    """Whether h11 has framed a response that begins so in chunks."""
    has_body = cycle.scope["method"] != "HEAD" and start["status"] not in (204, 304)
    named = {name.lower() for name, _ in start["headers"]}
    return has_body and cycle.scope["http_version"] == "1.1" and b"content-length" not in named


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
