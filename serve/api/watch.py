"""GET /v1/adapter_watch: the watched folders, what was loaded from them, and why something was not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from serve.api.state import StateDep

router = APIRouter()


@router.get("/v1/adapter_watch")
async def adapter_watch(state: StateDep) -> dict[str, Any]:
    """`data` has an entry for each adapter that stands, or stood, in a watched folder; those with a problem first."""
    runtime = state.services.runtime
    if runtime.watch is None:
        return {"object": "list", "interval_s": None, "folders": [], "num_problems": 0, "data": []}
    troubles = runtime.watch.troubles()
    folders = [
        {"folder": str(folder), "problem": troubles.get(str(folder), "")} for folder in runtime.watch.folders
    ]
    watched = sorted(runtime.watch.watched(), key=lambda each: (not each.problem, each.name))
    return {
        "object": "list",
        "interval_s": runtime.config.adapter_watch_interval_s,
        "folders": folders,
        "num_problems": sum(bool(each.problem) for each in watched),
        "data": [asdict(each) for each in watched],
    }
