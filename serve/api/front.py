"""ASGI middleware around everything: a request's Exchange, its id in the response, its line in the log, its span."""

from __future__ import annotations

import logging
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.exchange import Exchange, enter
from serve.api.state import AppState

logger = logging.getLogger("serve.request")
_troubles = logging.getLogger(__name__)

MAX_PATH_CHARS = 300
ANTHROPIC = "/v1/messages"


class Front:
    """Notes each request from its head to its last byte."""

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs as ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        exchange = Exchange.of(scope)
        if scope["method"] == "HEAD":  # the answer of a GET, of which uvicorn leaves the body out
            scope = {**scope, "method": "GET"}
        enter(exchange)
        exchange.send_body = send
        self._state.exchanges.add(exchange)
        extra = _headers(exchange)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._state.exchanges.discard(exchange)
            exchange.route = getattr(scope.get("route"), "path", None)
            self._end(exchange)

    def _end(self, exchange: Exchange) -> None:
        if exchange.status is not None and exchange.status >= 400:
            self._state.metrics.errors.labels(str(exchange.status)).inc()
        log(exchange)
        if self._state.tracer is not None and not exchange.is_aside:
            self._state.tracer(exchange)


def _headers(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    id = exchange.id.encode()
    headers = [(b"x-request-id", id), (b"x-content-type-options", b"nosniff")]
    return [*headers, (b"request-id", id)] if exchange.path.startswith(ANTHROPIC) else headers


def log(exchange: Exchange) -> None:
    """The line of a request."""
    if exchange.is_aside:  # machines ask it all day
        level = logging.DEBUG
    elif (exchange.status or 0) >= 500 or exchange.finish == "error":
        level = logging.WARNING
    else:
        level = logging.INFO
    if logger.isEnabledFor(level):
        words = f"{exchange.method} {_written(exchange.path)} {exchange.status or 'no answer'}"
        logger.log(level, words, extra={"fields": fields_of(exchange)})


def told_unforeseen(exchange: Exchange, error: Exception) -> str:
    """What nobody foresaw goes into the log whole, where it is handled. Returns what its client may know of it."""
    _troubles.exception(
        "request %s: %s %s has failed",
        exchange.id,
        exchange.method,
        exchange.path,
        extra={"fields": {"request_id": exchange.id}},
    )
    return f"internal error: {type(error).__name__}; the server's log has it under {exchange.id}"


def _written(path: str) -> str:
    """A path that cannot end a line."""
    return ascii(path[:MAX_PATH_CHARS])[1:-1]


def fields_of(exchange: Exchange) -> dict[str, Any]:
    """What a line says beside its words; nothing that is not known, and nothing that a person wrote, unless the
    server was told to."""
    problem, ttft_s = exchange.problem, exchange.ttft_s
    fields = {
        "request_id": exchange.id,
        "method": exchange.method,
        "path": _written(exchange.path),
        "status": exchange.status,
        "duration_ms": round(exchange.age_s * 1000, 1),
        "client": exchange.client or None,
        "key": exchange.key_name,
        "tenant": exchange.tenant or None,
        "model": exchange.asked,
        "served": exchange.served,
        "prompt_tokens": exchange.num_prompt_tokens or None,
        "cached_tokens": exchange.num_cached_tokens or None,
        "completion_tokens": exchange.num_answer_tokens or None,
        "ttft_ms": None if ttft_s is None else round(ttft_s * 1000, 1),
        "finish": exchange.finish,
        "error": problem.code if problem else None,
        # Of a client's mistake it may quote what the client wrote.
        "message": problem.message if problem and problem.status >= 500 else None,
        "prompt": exchange.prompt,
    }
    return {name: value for name, value in fields.items() if value is not None}
