"""Errors as Ollama's clients read them: {"error": "…"}."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse

from serve.api.errors import Problem, error_responses, writable

RESPONSES = error_responses(
    {
        "type": "object",
        "required": ["error"],
        "properties": {"error": {"type": "string"}},
        "additionalProperties": False,
    }
)
"""What the OpenAPI description says of them."""


def error_response(request: Request, problem: Problem) -> JSONResponse:
    """The response to a request under /api that cannot be served."""
    return JSONResponse(error_object(problem), problem.status)


def error_object(problem: Problem) -> dict[str, Any]:
    """What such a response, and the last line of a stream that broke, hold."""
    return {"error": writable(problem.message)}
