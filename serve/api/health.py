"""GET /health and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from serve.api.state import StateDep
from serve.api.targets import served_names

router = APIRouter()


@router.get("/health")
async def health(state: StateDep) -> Response:
    """200 while the engine takes requests; 503 with its failure once it does not."""
    worker = state.services.runtime.worker
    if worker.failure is not None:
        return JSONResponse({"status": "failed", "error": repr(worker.failure)}, 503)
    stats = worker.stats()
    return JSONResponse(
        {
            "status": "ok",
            "models": served_names(state.services.runtime),
            "num_decoding": stats.num_decoding,
            "num_prefilling": stats.num_prefilling,
            "num_waiting": stats.num_waiting,
        }
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(state: StateDep) -> Response:
    """Prometheus text."""
    return Response(state.metrics.show(), media_type=CONTENT_TYPE_LATEST)
