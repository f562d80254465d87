"""ASGI middleware before the endpoints: who passes, and how often. What nobody foresaw becomes a 500 here.

Every path needs a key where there are keys, but for those that are named here, whatever endpoint is added.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from functools import lru_cache
from urllib.parse import unquote_to_bytes

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import error_response, response_of
from serve.api.exchange import METRICS, PROBES, Exchange, current
from serve.api.front import told_unforeseen
from serve.api.state import AppState
from serve.errors import (
    AuthenticationError,
    DrainingError,
    ForbiddenError,
    LatheError,
    RequestError,
    TenantLimitError,
)
from serve.keys.bucket import Bucket
from serve.keys.key import Key
from serve.keys.limits import Limits

PAGE = "/ui"
"""The page's own files need no key; what it asks for does."""
OUR_NAMES = (".localhost", ".local", ".internal", ".home.arpa", ".lan")
"""Ends of names that nobody can register for the world's DNS."""
READ_ANYWAY_BYTES = 2**16
"""A refused request's body of so many is read; of a larger one the connection is closed."""
DRAIN_RETRY_AFTER_S = 2.0


class Guard:
    """Lets requests in."""

    def __init__(self, app: ASGIApp, state: AppState) -> None:
        self._app = app
        self._state = state
        config = state.config
        hosts = config.allowed_hosts
        self._hosts = None if hosts is None else frozenset(host.lower() for host in hosts)
        self._is_private = hosts is None and config.is_loopback and not config.has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs as ASGI."""
        exchange = current()
        if scope["type"] != "http" or exchange is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            limits = await self._let_in(request, exchange)
        except LatheError as error:
            await self._refuse(request, error, scope, receive, send)
            return
        if limits is not None:
            send = _with_limits(send, limits, exchange)
        try:
            _check_target(scope)
        except RequestError as error:
            await self._refuse(request, error, scope, receive, send)
            return
        await self._run(request, exchange, receive, send)

    async def _let_in(self, request: Request, exchange: Exchange) -> Limits | None:
        """The limits that the request counts in, if any. Raises why it may not come in."""
        if self._state.drain.is_on and not exchange.is_aside:
            raise DrainingError("the server is about to end and takes nothing new", DRAIN_RETRY_AFTER_S)
        self._check_host(request)
        keeper = self._state.keys
        if keeper is None:
            return None
        exchange.key = await self._key_of(request)
        if exchange.key is None:
            if self._is_open(exchange.path):
                return None
            raise AuthenticationError(
                "Incorrect API key provided."
                if any(_presented(request))
                else "You didn't provide an API key. Send it as 'Authorization: Bearer KEY', or as 'x-api-key: KEY'."
            )
        limits = exchange.key.limits
        if request.method != "POST":
            return None
        limits.take_request()
        return limits

    def _is_open(self, path: str) -> bool:
        is_page = path == PAGE or path.startswith(f"{PAGE}/")
        return path in PROBES or is_page or (path == METRICS and self._state.config.open_metrics)

    async def _key_of(self, request: Request) -> Key | None:
        assert self._state.keys is not None
        for text in _presented(request):
            key = await self._state.keys.find(text)
            if key is not None:
                return key
        return None

    def _check_host(self, request: Request) -> None:
        if self._hosts is None and not self._is_private:
            return
        name = _name_of(request.headers.get("host", ""))
        is_right = _is_ours(name) if self._hosts is None else bool(self._hosts & {"*", name})
        if not is_right:
            raise ForbiddenError(
                f"Host: found {name!a:.80}, by which this server is not to be asked for; name it in allowed_hosts, "
                "or give the server keys"
            )

    async def _refuse(
        self, request: Request, error: LatheError, scope: Scope, receive: Receive, send: Send
    ) -> None:
        response = response_of(request, error)
        if isinstance(error, AuthenticationError):
            response.headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, TenantLimitError):
            key = current_key()
            response.headers.update({} if key is None else dict(_limit_headers(key.limits)))
        length = request.headers.get("content-length", "")
        if isinstance(error, DrainingError):
            response.headers["Connection"] = "close"
        if "transfer-encoding" in request.headers or (
            length.isdecimal() and int(length[:12]) > READ_ANYWAY_BYTES
        ):
            response.headers["Connection"] = "close"
        await response(scope, receive, send)

    async def _run(self, request: Request, exchange: Exchange, receive: Receive, send: Send) -> None:
        try:
            await self._app(request.scope, receive, send)
        except Exception as error:  # nobody foresaw it; the log has it all
            message = told_unforeseen(exchange, error)
            if exchange.status is not None:
                return  # the connection is closed in the midst of its answer
            response = error_response(request, 500, message, code="internal_error")
            await response(request.scope, receive, send)


def _check_target(scope: Scope) -> None:
    """RequestError if the path or the query is not UTF-8 once percent-decoded."""
    for part, raw in (("path", scope.get("raw_path") or b""), ("query", scope.get("query_string") or b"")):
        if raw.isascii() and b"%" not in raw:
            continue
        try:
            unquote_to_bytes(raw).decode("utf-8")
        except UnicodeDecodeError:
            raise RequestError(f"{part}: found percent-encoded bytes that are not UTF-8", part) from None


def current_key() -> Key | None:
    """The key of the request that runs here."""
    exchange = current()
    return exchange.key if exchange else None


def _presented(request: Request) -> Iterator[str]:
    """What may be a key: OpenAI's clients, Anthropic's and Azure's have their places for it, and some send two."""
    for value in request.headers.getlist("authorization"):
        scheme, _, text = value.partition(" ")
        if scheme.lower() == "bearer" and text.strip():
            yield text.strip()
    for header in ("x-api-key", "api-key"):
        for value in request.headers.getlist(header):
            if value.strip():
                yield value.strip()


def _name_of(host: str) -> str:
    """A Host header less its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rpartition(":")[0].lower() if ":" in host else host.lower()


@lru_cache(maxsize=64)
def _is_ours(name: str) -> bool:
    """Whether a name cannot be one that a stranger has pointed at this machine."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(OUR_NAMES)
    return True


def _with_limits(send: Send, limits: Limits, exchange: Exchange) -> Send:
    """A `send` that says what is left, in OpenAI's headers; who was refused for want of room has not been counted."""

    async def told(message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] in (429, 503):
                limits.give_request_back()
            headers = MutableHeaders(raw=list(message.get("headers", ())))
            headers.update(dict(_limit_headers(limits)))
            message = {**message, "headers": headers.raw}
        await send(message)

    return told


def _limit_headers(limits: Limits) -> Iterator[tuple[str, str]]:
    for what, bucket in (("requests", limits.requests), ("tokens", limits.tokens)):
        if bucket is not None:
            yield from _headers_of(what, bucket)


def _headers_of(what: str, bucket: Bucket) -> Iterator[tuple[str, str]]:
    yield f"x-ratelimit-limit-{what}", str(bucket.size)
    yield f"x-ratelimit-remaining-{what}", str(bucket.num_left)
    yield f"x-ratelimit-reset-{what}", duration(bucket.full_in_s)


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 1), 60)
    if minutes < 1:
        return f"{rest:g}s"
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}h{minutes}m{int(rest)}s" if hours else f"{minutes}m{int(rest)}s"
