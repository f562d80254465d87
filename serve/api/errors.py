"""Errors as clients read them: OpenAI's {"error": {"message", "type", "param", "code"}}, and other APIs' by path."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from serve.api.exchange import current
from serve.api.leaving import CLIENT_CLOSED_REQUEST, ClientGoneError
from serve.api.strict import Body
from serve.errors import DeadlineError, LatheError, NotFoundError, OverloadedError, RequestError

STATUS_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
    415: "unsupported_media_type",
}
MAX_MESSAGE_CHARS = 4000
MAX_PROBLEMS = 20
LONGEST_RETRY_S = 60.0
"""OpenAI's clients wait no longer, and would ask much too early."""


_TEXT_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_DETAILS = {
    "message": {"type": "string"},
    "type": {"enum": ["invalid_request_error", "rate_limit_error", "server_error"]},
    "param": {**_TEXT_OR_NULL, "description": "The field at fault."},
    "code": _TEXT_OR_NULL,
}
_DETAILS_SCHEMA = {
    "type": "object",
    "required": [*_DETAILS],
    "properties": _DETAILS,
    "additionalProperties": False,
}
ERROR_SCHEMA = {"type": "object", "required": ["error"], "properties": {"error": _DETAILS_SCHEMA}}


def error_responses(schema: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI description says of a route's errors, whose bodies are of this schema."""
    content = {"content": {"application/json": {"schema": schema}}}
    return {
        "4XX": {"description": "The request cannot be served as asked.", **content},
        "5XX": {"description": "The server cannot serve it now; Retry-After says when it may.", **content},
    }


RESPONSES = error_responses(ERROR_SCHEMA)
"""Of every route that has none of its own."""


class Problem(NamedTuple):
    """What went wrong with a request, before any API's words for it."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    """The field at fault."""


def problem_of(error: LatheError) -> Problem:
    """A deliberate error's. Whatever its message quotes, it can be written."""
    param = getattr(error, "param", None)
    if param is None and isinstance(error, NotFoundError):
        param = "model"
    return Problem(error.status, str(error), error.code, param)


Form = Callable[[Request, Problem], JSONResponse]
"""One API's response that is an error."""


def openai_form(problem: Problem) -> dict[str, Any]:
    """OpenAI's: {"error": {"message", "type", "param", "code"}}."""
    kind = "invalid_request_error" if problem.status < 500 else "server_error"
    if problem.status == 429:
        kind = "rate_limit_error"
    return {
        "error": {
            "message": writable(problem.message),
            "type": kind,
            "param": problem.param,
            "code": problem.code,
        }
    }


def problem_response(request: Request, problem: Problem) -> JSONResponse:
    """A response that is an error, in the words of the request's path, and a note of it for the log."""
    if exchange := current():
        exchange.problem = problem
    path = request.scope["path"]
    for prefix, form in request.app.state.error_forms.items():
        if path.startswith(prefix):
            return form(request, problem)
    return JSONResponse(openai_form(problem), problem.status)


def writable(message: str) -> str:
    """A message that JSON can hold, of bounded length."""
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[:MAX_MESSAGE_CHARS]}… ({len(message)} characters)"
    return message.encode("utf-8", "backslashreplace").decode()


def error_response(
    request: Request, status: int, message: str, *, code: str | None = None, param: str | None = None
) -> JSONResponse:
    """A response that is an error, in the words of the request's API."""
    return problem_response(request, Problem(status, message, code, param))


def openai_error(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> JSONResponse:
    """A response that is an error, in OpenAI's words."""
    return JSONResponse(openai_form(Problem(status, message, code, param)), status)


def response_of(request: Request, error: LatheError) -> JSONResponse:
    """The response to a deliberate error. One that passes carries Retry-After."""
    response = problem_response(request, problem_of(error))
    if isinstance(error, OverloadedError):
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        if error.retry_after_s > LONGEST_RETRY_S:
            response.headers["X-Should-Retry"] = "false"
    if isinstance(error, DeadlineError):
        # OpenAI's clients, and Anthropic's, would ask for it all again.
        response.headers["X-Should-Retry"] = "false"
    return response


def install(app: FastAPI, forms: Mapping[str, Form] = MappingProxyType({})) -> None:
    """Answer every error of `app` in the form that stands by the beginning of its path, or in OpenAI's."""
    app.state.error_forms = forms

    @app.exception_handler(LatheError)
    async def on_lathe_error(request: Request, error: LatheError) -> JSONResponse:
        return response_of(request, error)

    @app.exception_handler(ClientGoneError)
    async def on_client_gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid_body(request, error.errors(), error.body)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        message, status = str(error.detail), error.status_code
        if status == 404:
            message = _nothing_here(request)
        response = error_response(request, status, message, code=STATUS_CODES.get(status))
        response.headers.update(error.headers or {})
        return response


def _nothing_here(request: Request) -> str:
    """What to say of a path that is not there; clients are often one /v1 short, or have one too many."""
    path = request.scope["path"]
    message = f"there is nothing at {request.method} {path}"
    if "//" in path:
        meant, mistake = re.sub("/+", "/", path), "ends in a slash that the client adds, too"
    elif path.startswith("/v1/v1/"):
        meant, mistake = path[3:], "has one /v1 too many"
    else:
        meant, mistake = f"/v1{path}", "lacks /v1"
    scope = {**request.scope, "path": meant}
    if any(route.matches(scope)[0] is not Match.NONE for route in request.app.router.routes):
        base = f"{str(request.base_url).rstrip('/')}/v1"
        message += f", but there is {meant}: the client's base_url {mistake}; it is {base}"
    return message


def _body_class(request: Request) -> type[Body] | None:
    """The body that the route called for."""
    field = getattr(request.scope.get("route"), "body_field", None)
    annotation = getattr(getattr(field, "field_info", None), "annotation", None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Body) else None


def _invalid_body(request: Request, problems: Sequence[Any], value: Any) -> JSONResponse:
    """All problems of the body `value` in one message; `param` is the first field at fault."""
    body = _body_class(request)
    params, lines = [], []
    paths = [
        _path_in(value, _less_branch(value, each), each["type"] == "missing")
        if each["loc"][0] == "body"
        else [*each["loc"][1:]]
        for each in problems
    ]
    for problem, path in zip(problems, paths, strict=True):
        if any(len(deeper) > len(path) and deeper[: len(path)] == path for deeper in paths):
            continue  # another branch of a union; the one that was meant tells more
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, RequestError):
            is_inside = bool(path) and path[0] != cause.param
            params.append(str(path[0]) if is_inside else cause.param)
            lines.append(".".join(map(str, [*path, cause])) if is_inside else str(cause))
            continue
        params.append(str(path[0]) if path else None)
        lines.append(_line(problem, path, body))
    told = list(dict.fromkeys(lines))
    more = [f"and {len(told) - MAX_PROBLEMS} more"] if len(told) > MAX_PROBLEMS else []
    message = "; ".join([*told[:MAX_PROBLEMS], *more])
    return error_response(
        request, 400, message, code="invalid_request_error", param=params[0] if params else None
    )


def _less_branch(value: Any, problem: Any) -> Sequence[str | int]:
    """Where a problem is, in the body; of one that an object of a union told itself, without the union's branch,
    which may have the name of a field of it."""
    location: Sequence[str | int] = problem["loc"][1:]
    if problem["type"] != "value_error" or not location:
        return location
    owner = value
    for part in _path_in(value, location[:-1], False):
        owner = owner[part]
    return location[:-1] if isinstance(owner, dict) and owner.get("type") == location[-1] else location


def _path_in(value: Any, location: Sequence[str | int], is_missing: bool) -> list[str | int]:
    """pydantic's location less the names of union branches: the longest way in it that leads somewhere in `value`.

    is_missing  what the location ends with is not there, and belongs to the way
    """
    if not location:
        return []
    part, rest = location[0], location[1:]
    if is_missing and not rest:
        return [part]
    passed = _path_in(value, rest, is_missing)
    is_key = isinstance(value, dict) and part in value
    is_index = isinstance(value, list) and isinstance(part, int) and part < len(value)
    if not is_key and not is_index:
        return passed
    return max(passed, [part, *_path_in(value[part], rest, is_missing)], key=len)


def _line(problem: Any, path: Sequence[Any], body: type[Body] | None) -> str:
    name = ".".join(map(str, path)) or "the body"
    if problem["type"] == "extra_forbidden":
        close = body.closest_field(str(path[-1])) if body and len(path) == 1 else None
        return f"{name}: unknown field" + (f"; did you mean {close}?" if close else "")
    if problem["type"] == "missing":
        return f"{name}: missing"
    return f"{name}: {problem['msg']}"
