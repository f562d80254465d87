"""uvicorn's HTTP connection, and an end to those that keep a socket and do nothing with it.

uvicorn waits for ever for the rest of a request's head, and for a client that takes nothing of its answer.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

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
            self._head_due = _stopped(self._head_due)
        elif self._head_due is None and self.timeout_keep_alive_task is None:
            self._await_head()

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
        self._write_due = _stopped(self._write_due)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._head_due, self._write_due = _stopped(self._head_due), _stopped(self._write_due)
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_due = self.loop.call_later(self.header_timeout_s, self._give_up_reading)

    def _give_up_reading(self) -> None:
        self._head_due = None
        self.transport.close()

    def _give_up_writing(self) -> None:
        self._write_due = None
        logger.info("a client has taken nothing for %g s and is cut off", self.write_timeout_s)
        self.transport.abort()


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


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
