"""Work that nobody waits for any more, once its client has closed the connection, is not gone on with."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from starlette.types import Message, Receive

T = TypeVar("T")
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; nobody reads it, logs do."""


class ClientGoneError(Exception):
    """The client has closed the connection; never leaves this package."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled with ClientGoneError as soon as the client closes the connection."""
    working = asyncio.ensure_future(work)
    try:
        await _done(receive, working)
        return working.result()
    finally:
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


def said_already(receive: Receive) -> Message | None:
    """What the server has for a request by now; None: nothing. Asks and does not wait, for which Starlette takes a
    turn of the loop."""
    asking = receive()
    try:
        asking.send(None)  # type: ignore[attr-defined]
    except StopIteration as answer:
        return cast(Message, answer.value)
    asking.close()  # type: ignore[attr-defined]
    return None


def has_left(receive: Receive) -> bool:
    """Whether the client is known to have closed the connection, of a request whose body has been read."""
    said = said_already(receive)
    return said is not None and said["type"] == "http.disconnect"


async def _done(receive: Receive, working: asyncio.Future[Any]) -> None:
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
    finally:
        leaving.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
