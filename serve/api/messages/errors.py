"""Errors as Anthropic's clients read them: {"type": "error", "error": {"type", "message"}, "request_id"}."""

from __future__ import annotations

import re
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from serve.api.errors import Problem, error_responses, writable
from serve.api.exchange import current

OVERLOADED = 529
"""Their status for a server that has too much to do; their clients ask again."""
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    410: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
"""By status; of others invalid_request_error below 500, and api_error."""

_DETAILS = {
    "message": {"type": "string"},
    "type": {"enum": sorted({*TYPES.values(), "invalid_request_error", "api_error"})},
}
_SCHEMA = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"enum": ["error"]},
        "error": {
            "type": "object",
            "required": [*_DETAILS],
            "properties": _DETAILS,
            "additionalProperties": False,
        },
        "request_id": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "additionalProperties": False,
}
RESPONSES = error_responses(_SCHEMA)
"""What the OpenAPI description says of their errors."""
_LIMIT = re.compile(r"maximum context length is (\d+) tokens\. However, the prompt has (\d+)")


def error_response(request: Request, problem: Problem) -> JSONResponse:
    """The response to a request under /v1/messages that cannot be served."""
    return JSONResponse(error_object(problem), _status(problem))


def error_object(problem: Problem) -> dict[str, Any]:
    """What such a response, and the event `error` of a stream, hold."""
    status = _status(problem)
    exchange = current()
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {
        "type": "error",
        "error": {"type": kind, "message": writable(_message(problem))},
        "request_id": exchange.id if exchange else None,
    }


def _message(problem: Problem) -> str:
    """Claude Code makes its history shorter where it reads that a prompt is too long, in these words."""
    if problem.code != "context_length_exceeded":
        return problem.message
    found = _LIMIT.search(problem.message)
    # One token at least is the answer's.
    words = f"{found[2]} tokens > {int(found[1]) - 1} maximum. " if found else ""
    return f"prompt is too long: {words}{problem.message}"


def _status(problem: Problem) -> int:
    return OVERLOADED if problem.code == "overloaded" else problem.status
