"""Responses that are made while nobody waits for them: begun by a request, gone on with after it has been answered.

Each has an Exchange of its own, so a server that drains waits for it, `/v1/status` tells of it, and its key pays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

from fastapi import Request
from starlette.types import Message

from serve.api.exchange import current, enter
from serve.api.front import log, told_unforeseen
from serve.api.responses.writer import ResponseWriter
from serve.api.state import AppState
from serve.errors import GenerationError, LatheError, OverloadedError

MAX_RUNNING = 256
"""At a time."""
RETRY_AFTER_S = 5.0

Begin = Callable[[Request], Awaitable[ResponseWriter]]


async def in_background(state: AppState, http: Request, begin: Begin) -> ResponseWriter:
    """What `begin` makes of the request, once it is under way; whether its client stays is nothing to it. What begin
    raises is raised here. OverloadedError."""
    tasks = state.responses.tasks
    if len(tasks) >= MAX_RUNNING:
        raise OverloadedError(f"{MAX_RUNNING} responses are being made in the background", RETRY_AFTER_S)
    begun: asyncio.Future[ResponseWriter] = asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(_made(state, Request(http.scope, _never), begin, begun))
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return await asyncio.shield(begun)


async def _made(state: AppState, http: Request, begin: Begin, begun: asyncio.Future[ResponseWriter]) -> None:
    asked = current()
    exchange = None if asked is None else replace(asked, running=[], status=200, send_body=None)
    if exchange is not None:
        enter(exchange)
        state.exchanges.add(exchange)
    try:
        writer = await begin(http)
    except BaseException as error:
        begun.set_exception(error)
        begun.exception()  # whoever asked may have left
        if exchange is not None:
            state.exchanges.discard(exchange)
        return
    begun.set_result(writer)
    try:
        while not writer.is_done:
            await writer.next()
        writer.whole({})
    except LatheError as error:
        writer.error(error)
    except Exception as error:  # nobody foresaw it; whoever asks for the response hears that it has failed
        writer.error(
            GenerationError("internal error" if exchange is None else told_unforeseen(exchange, error))
        )
    finally:
        writer.close()
        if exchange is not None:
            state.exchanges.discard(exchange)
            log(exchange)


async def _never() -> Message:
    """Nobody has left, for nobody is there."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("unreachable")
