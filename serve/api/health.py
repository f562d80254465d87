"""GET /health, its two halves, /ping and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from serve.api.admin import has_name_of_ours
from serve.api.state import AppState, StateDep
from serve.api.targets import served_names

router = APIRouter()


@router.get("/health")
@router.get("/health/ready")
@router.get("/ping")
async def ready(state: StateDep) -> Response:
    """200 while requests are taken; 503 while the server drains, and once the engine has failed, with its failure."""
    failed = _failed(state)
    if failed is not None:
        return failed
    if state.drain.is_on:
        left_s = round(max(state.drain.left_s, 0), 1)
        body = {"status": "draining", "num_running": state.drain.num_running, "left_s": left_s}
        return JSONResponse(body if has_name_of_ours(state) else {"status": "draining"}, 503)
    if not has_name_of_ours(state):
        return JSONResponse({"status": "ok"})
    stats = state.services.runtime.worker.stats()
    return JSONResponse(
        {
            "status": "ok",
            "models": served_names(state.services.runtime),
            "num_decoding": stats.num_decoding,
            "num_prefilling": stats.num_prefilling,
            "num_waiting": stats.num_waiting,
        }
    )


@router.get("/health/live")
async def live(state: StateDep) -> Response:
    """200 while there is no reason to start the server anew: it may drain, but its engine has not failed."""
    return _failed(state) or JSONResponse({"status": "ok"})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(state: StateDep) -> Response:
    """Prometheus text."""
    return Response(state.metrics.show(), media_type=CONTENT_TYPE_LATEST)


def _failed(state: AppState) -> Response | None:
    failure = state.services.runtime.worker.failure
    if failure is None:
        return None
    body = {"status": "failed", "error": repr(failure)}
    return JSONResponse(body if has_name_of_ours(state) else {"status": "failed"}, 503)
