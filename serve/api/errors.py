"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from serve.api.schemas import Body
from serve.errors import LatheError, NotFoundError, OverloadedError, RequestError

STATUS_CODES = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}


def error_body(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The error object, for a response or for an event of a stream."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: LatheError) -> dict[str, Any]:
    """The error object of a deliberate error."""
    param = getattr(error, "param", None)
    if param is None and isinstance(error, NotFoundError):
        param = "model"
    return error_body(error.status, str(error), code=error.code, param=param)


def error_response(
    status: int, message: str, *, code: str | None = None, param: str | None = None
) -> JSONResponse:
    """A response that is an error."""
    return JSONResponse(error_body(status, message, code=code, param=param), status)


def response_of(error: LatheError) -> JSONResponse:
    """The response to a deliberate error. One that passes carries Retry-After."""
    headers = {}
    if isinstance(error, OverloadedError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return JSONResponse(body_of(error), error.status, headers)


def install(app: FastAPI) -> None:
    """Answer every error of `app` in this form."""

    @app.exception_handler(LatheError)
    async def on_lathe_error(_request: Request, error: LatheError) -> JSONResponse:
        return response_of(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid_body(error.errors(), _body_class(request))

    @app.exception_handler(HTTPException)
    async def on_http_error(_request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), code=STATUS_CODES.get(error.status_code))

    @app.exception_handler(Exception)
    async def on_fault(_request: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"internal error: {error!r}", code="internal_error")


def _body_class(request: Request) -> type[Body] | None:
    """The body that the route called for."""
    field = getattr(request.scope.get("route"), "body_field", None)
    annotation = getattr(getattr(field, "field_info", None), "annotation", None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Body) else None


def _invalid_body(problems: Sequence[Any], body: type[Body] | None) -> JSONResponse:
    """All problems in one message; `param` is the first field at fault."""
    params, lines = [], []
    for problem in problems:
        cause = problem.get("ctx", {}).get("error")
        path = list(problem["loc"][1:])
        if problem["type"] == "json_invalid":
            return error_response(
                400, f"the body is not JSON: {problem['ctx']['error']}", code="invalid_json"
            )
        if isinstance(cause, RequestError):
            is_inside = bool(path) and path[0] != cause.param
            params.append(path[0] if is_inside else cause.param)
            lines.append(".".join(map(str, [*path, cause])) if is_inside else str(cause))
            continue
        params.append(str(path[0]) if path else None)
        lines.append(_line(problem, path, body))
    message = "; ".join(dict.fromkeys(lines))
    return error_response(400, message, code="invalid_request_error", param=params[0] if params else None)


def _line(problem: Any, path: Sequence[Any], body: type[Body] | None) -> str:
    name = ".".join(map(str, path)) or "the body"
    if problem["type"] == "extra_forbidden":
        close = body.closest_field(str(path[-1])) if body and len(path) == 1 else None
        return f"{name}: unknown field" + (f"; did you mean {close}?" if close else "")
    if problem["type"] == "missing":
        return f"{name}: missing"
    return f"{name}: {problem['msg']}"
