"""Work that nobody waits for any more, once its client has closed the connection, is not gone on with."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left; nobody reads it, logs do."""


class ClientGoneError(Exception):
    """The client has closed the connection; never leaves this package."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled with ClientGoneError as soon as the client closes the connection."""
    working = asyncio.ensure_future(work)
    try:
        await until_done(receive, working)
        return working.result()
    finally:
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)


async def until_done(receive: Receive, working: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Return once `working` is done or that time is over; ClientGoneError as soon as the client closes the
    connection. Few of the loop's turns, for which a first token waits."""
    leaving = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and leaving.done():
            raise ClientGoneError
    finally:
        leaving.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
