"""POST /v1/feedback: an outcome for a completion that an experiment answered."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from serve.api.body import JsonRoute
from serve.api.errors import openai_error
from serve.api.schemas import FeedbackBody
from serve.api.state import StateDep
from serve.errors import NotFoundError

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/feedback")
async def feedback(body: FeedbackBody, state: StateDep) -> Response:
    """Idempotent by (id, name): the last value counts."""
    recorder = state.bases.experiments.recorder
    if recorder is None:
        message = "id: this server runs no experiment, so no completion takes feedback"
        return openai_error(404, message, code="not_found", param="id")
    try:
        await asyncio.wrap_future(recorder.outcome(body.id, body.name, body.value))
    except NotFoundError as error:
        return openai_error(404, str(error), code="not_found", param="id")
    return JSONResponse({"id": body.id, "name": body.name, "value": body.value})
