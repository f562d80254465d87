"""GET /, /health, its two halves, /ping and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST

from serve.api.admin import check_admin, has_name_of_ours
from serve.api.permission import may_ask
from serve.api.state import AppState, StateDep

router = APIRouter()


@router.get("/health")
@router.get("/health/ready")
@router.get("/ping")
async def ready(state: StateDep) -> Response:
    """200 while every engine that runs takes requests; 503 while the server drains, and once an engine has failed,
    with its failure."""
    failed = _failed(state)
    if failed is not None:
        return failed
    if state.drain.is_on:
        left_s = round(max(state.drain.left_s, 0), 1)
        body = {"status": "draining", "num_running": state.drain.num_running, "left_s": left_s}
        return JSONResponse(body if has_name_of_ours(state) else {"status": "draining"}, 503)
    if not has_name_of_ours(state):
        return JSONResponse({"status": "ok"})
    stats = [runtime.worker.stats() for runtime in state.bases.runtimes()]
    return JSONResponse(
        {
            "status": "ok",
            "models": [name for name in state.bases.names() if may_ask(name)],
            "loaded": [name for name in state.bases.pool.loaded() if may_ask(name)],
            "num_decoding": sum(each.num_decoding for each in stats),
            "num_prefilling": sum(each.num_prefilling for each in stats),
            "num_waiting": sum(each.num_waiting for each in stats),
        }
    )


@router.get("/health/live")
async def live(state: StateDep) -> Response:
    """200 while there is no reason to start the server anew: it may drain, but its engine has not failed."""
    return _failed(state) or JSONResponse({"status": "ok"})


@router.get("/", include_in_schema=False)
async def root(http: Request, state: StateDep) -> Response:
    """A browser is led to the page; Ollama's clients and others ask here whether anybody is at home."""
    if state.config.ui and "text/html" in http.headers.get("accept", ""):
        return RedirectResponse("ui/")
    return PlainTextResponse("Lathe is running")


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(state: StateDep) -> Response:
    """Prometheus text. Labels name everybody's adapters: where there are keys, it takes an admin's, unless
    open_metrics."""
    if not state.config.open_metrics:
        check_admin(state)
    return Response(state.metrics.show(), media_type=CONTENT_TYPE_LATEST)


def _failed(state: AppState) -> Response | None:
    workers = [runtime.worker for runtime in state.bases.runtimes()]
    failure = next((worker.failure for worker in workers if worker.failure is not None), None)
    if failure is None:
        return None
    body = {"status": "failed", "error": repr(failure)}
    return JSONResponse(body if has_name_of_ours(state) else {"status": "failed"}, 503)
