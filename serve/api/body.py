"""A request's bytes in, one JSON value out, or an HTTP error that says what was wrong with them.

Every route that takes a body is a JsonRoute. What passes here is UTF-8, no larger or deeper than allowed, without
repeated names, without NaN, and its text can be written again: no half surrogate pairs. Schemas see nothing else.
"""

from __future__ import annotations

import asyncio
import email.message
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import lru_cache
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serve.api.coding import coding_of, unpacked
from serve.api.direct import direct_of
from serve.api.exchange import current
from serve.api.leaving import CLIENT_CLOSED_REQUEST as CLIENT_CLOSED_REQUEST
from serve.api.leaving import said_already
from serve.api.opening import announce
from serve.api.tenant import PARAMETERS, tenant_of
from serve.config import ServeConfig
from serve.errors import RequestError

MAX_LOGGED_CHARS = 2000
"""Of one text in a body that is logged."""
MAX_DEPTH = 64
"""Objects and lists inside each other; the JSON schema of a tool nests about ten."""

# Only an escape can bring half a pair: as bytes it is not UTF-8.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


class JsonRoute(APIRoute):
    """A route whose body is read and checked here, before FastAPI and the schemas see it, and which tells of the
    tenant's headers where it asks for a tenant."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if any(each.call is tenant_of for each in self.dependant.dependencies):
            self.openapi_extra = {**(self.openapi_extra or {}), "parameters": PARAMETERS}

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, behind the check where the route takes a body."""
        answer = super().get_route_handler()
        if self.body_field is None:
            return answer
        direct = direct_of(self.dependant)
        may_stream = "content" in self.responses.get(200, {})

        async def checked(request: Request) -> Response:
            _check_content_type(request.headers.get("content-type"))
            coding, config = coding_of(request.headers), request.app.state.belongings.config
            try:
                raw = await _read(request, config)
            except ClientDisconnect:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            if coding is not None:
                raw = await _unpacked(raw, coding, config)
            value = parse(raw)
            note_prompt(request, value)
            if may_stream:  # elsewhere `stream` asks for nothing
                announce(request, value)
            read = _ReadRequest(request, raw, value)
            response = None if direct is None or value is None else await direct(read, value)
            return await answer(read) if response is None else response

        return checked


def note_prompt(request: Request, value: Any) -> None:
    """What a request says, for the log, where the server was told to write that down."""
    if request.app.state.belongings.config.log_prompts and (exchange := current()):
        exchange.prompt = _cut(value)


def _cut(value: Any) -> Any:
    """The same with long texts, such as pictures are, cut."""
    if isinstance(value, str) and len(value) > MAX_LOGGED_CHARS:
        return f"{value[:MAX_LOGGED_CHARS]}… ({len(value)} characters)"
    if isinstance(value, dict):
        return {name: _cut(inner) for name, inner in value.items()}
    return [_cut(inner) for inner in value] if isinstance(value, list) else value


class _ReadRequest(Request):
    """A request whose body is known."""

    def __init__(self, request: Request, raw: bytes, value: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._raw = raw
        self._value = value

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


def parse(raw: bytes) -> Any:
    """The value of a body. RequestError names the field at fault, where it is one field's."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not UTF-8") from None
    if not text.strip():
        raise _not_json("it is empty")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _not_json(f"{error.msg} at character {error.pos}") from None
    except RecursionError:
        raise _too_deep(None) from None
    except RequestError:
        raise
    except ValueError:
        # Python reads integers of at most 4,300 digits.
        raise _not_json("a number has too many digits") from None
    _check_inside(value, has_escapes=_SURROGATE_ESCAPE.search(raw) is not None)
    return value


@lru_cache(maxsize=64)
def _check_content_type(value: str | None) -> None:
    message = email.message.Message()
    message["content-type"] = value or "none/none"
    kind = message.get_content_type()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HTTPException(
            415, f"Content-Type: found {value or 'none'}; send the body with 'Content-Type: application/json'"
        )


async def _read(request: Request, config: ServeConfig) -> bytes:
    limit = int(config.max_body_mib * 2**20)
    length = request.headers.get("content-length")
    if length is not None and int(length) > limit:
        raise _too_large(f"{int(length)} bytes", config)
    raw = bytearray()
    if (there := said_already(request.receive)) is not None:  # most bodies come with their heads
        if there["type"] == "http.disconnect":
            raise ClientDisconnect
        raw += there.get("body", b"")
        if len(raw) > limit:
            raise _too_large("more", config)
        if not there.get("more_body"):
            return bytes(raw)
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for piece in request.stream():
                raw += piece
                if len(raw) > limit:
                    raise _too_large("more", config)
    except TimeoutError:
        raise HTTPException(
            408,
            f"the body did not arrive within {config.body_timeout_s:g} s (body_timeout_s)",
            {"Connection": "close"},
        ) from None
    return bytes(raw)


async def _unpacked(raw: bytes, coding: str, config: ServeConfig) -> bytes:
    limit = int(config.max_body_mib * 2**20)
    body = await unpacked(raw, coding, limit)
    if len(body) > limit:
        raise _too_large("more, unpacked", config)
    return body


def _check_inside(value: Any, *, has_escapes: bool) -> None:
    """Walk everything that is nested; strings only where an escape could have spoiled one."""
    kinds = (dict, list, str) if has_escapes else (dict, list)
    open: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while open:
        path, found = open.pop()
        if isinstance(found, str):
            _check_text(found, path)
        elif len(path) >= MAX_DEPTH:
            raise _too_deep(_param(path))
        elif isinstance(found, dict):
            for key in found if has_escapes else ():
                _check_text(key, (*path, key))
            open += [((*path, key), inner) for key, inner in found.items() if isinstance(inner, kinds)]
        elif isinstance(found, list):
            open += [((*path, i), inner) for i, inner in enumerate(found) if isinstance(inner, kinds)]


def _check_text(text: str, path: Sequence[Any]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])[1:-1]
        raise RequestError(
            f"{_name(path)}: found half a surrogate pair, {half}, at character {error.start}; "
            "text is made of whole characters",
            _param(path),
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = _written(
            next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        )
        raise RequestError(f"{twice}: found twice in one object", twice)
    return found


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _not_json(f"the number {text[:40]} is too large")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise _not_json(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_constant=_refuse_constant)


def _not_json(reason: str) -> RequestError:
    error = RequestError(f"the body is not JSON: {reason}")
    error.code = "invalid_json"
    return error


def _too_deep(param: str | None) -> RequestError:
    return RequestError(f"{param or 'the body'}: nested more than {MAX_DEPTH} deep", param)


def _too_large(found: str, config: ServeConfig) -> HTTPException:
    return HTTPException(
        413,
        f"the body has {found}; at most {config.max_body_mib:g} MiB are read (max_body_mib)",
        {"Connection": "close"},
    )


def _name(path: Sequence[Any]) -> str:
    return ".".join(_written(str(key)) for key in path) or "the body"


def _param(path: Sequence[Any]) -> str | None:
    return _written(str(path[0])) if path else None


def _written(name: str) -> str:
    """A name that can be written, whatever it holds."""
    return name[:80].encode("utf-8", "backslashreplace").decode()
