"""GET /, /health, its two halves, /ping and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST

from serve.api.admin import check_admin, has_name_of_ours
from serve.api.permission import may_ask
from serve.api.state import AppState, StateDep

router = APIRouter()
HOPELESS_BREAKS = 3
"""In a row: what loading a model again does not mend, starting anew may."""


@router.get("/health")
@router.get("/health/ready")
@router.get("/ping")
async def ready(state: StateDep) -> Response:
    """200 while every engine that runs takes requests; 503 while the server drains, and while a model whose engine
    has failed is not to be loaded again yet, with its failure. One that may be is told of in `problems`."""
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
            "problems": _problems(state),
            "loaded": [name for name in state.bases.pool.loaded() if may_ask(name)],
            "num_decoding": sum(each.num_decoding for each in stats),
            "num_prefilling": sum(each.num_prefilling for each in stats),
            "num_waiting": sum(each.num_waiting for each in stats),
        }
    )


@router.get("/health/live")
async def live(state: StateDep) -> Response:
    """200 while there is no reason to start the server anew: it may drain, and an engine may have failed that is
    loaded again, but none fails each time."""
    return _failed(state, HOPELESS_BREAKS) or JSONResponse({"status": "ok"})


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


def _failed(state: AppState, num_breaks: int = 1) -> Response | None:
    """num_breaks: in a row, of a model that can be loaded again."""
    standings = {each.name: each for each in state.bases.pool.standings()}
    failures = [
        (repr(runtime.worker.failure), standings[runtime.model.name])
        for runtime in state.bases.runtimes()
        if runtime.worker.failure is not None and runtime.model.name in standings
    ]
    failures += [(each.problem or "", each) for each in standings.values() if each.retry_s > 0]
    can_return = state.bases.pool.is_started
    found = next((each for each in failures if not can_return or each[1].num_breaks >= num_breaks), None)
    if found is None:
        return None
    error, standing = found
    body = {"status": "failed", "error": error, "retry_after_s": round(standing.retry_s, 1)}
    return JSONResponse(body if has_name_of_ours(state) else {"status": "failed"}, 503)


def _problems(state: AppState) -> dict[str, str]:
    """Why models are not loaded that somebody has asked for, by their names."""
    standings = state.bases.pool.standings()
    return {each.name: each.problem for each in standings if each.problem is not None and may_ask(each.name)}
