"""GET /health and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from serve.api.state import StateDep

router = APIRouter()


@router.get("/health")
async def health(state: StateDep) -> Response:
    """200 while every engine that runs takes requests; 503 with its failure once one does not."""
    workers = [runtime.worker for runtime in state.bases.runtimes()]
    for worker in workers:
        if worker.failure is not None:
            return JSONResponse({"status": "failed", "error": repr(worker.failure)}, 503)
    stats = [worker.stats() for worker in workers]
    return JSONResponse(
        {
            "status": "ok",
            "models": state.bases.names(),
            "loaded": list(state.bases.pool.loaded()),
            "num_decoding": sum(each.num_decoding for each in stats),
            "num_prefilling": sum(each.num_prefilling for each in stats),
            "num_waiting": sum(each.num_waiting for each in stats),
        }
    )


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(state: StateDep) -> Response:
    """Prometheus text."""
    return Response(state.metrics.show(), media_type=CONTENT_TYPE_LATEST)
