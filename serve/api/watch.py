"""GET /v1/adapter_watch: the watched folders, what was loaded from them, and why something was not."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from serve.api.admin import ADMIN
from serve.api.state import StateDep
from serve.argument_text import readable

router = APIRouter(dependencies=[ADMIN])


@router.get("/v1/adapter_watch")
async def adapter_watch(state: StateDep) -> dict[str, Any]:
    """`data` has an entry for each adapter that stands, or stood, in a watched folder; those with a problem first."""
    watches = [runtime.watch for runtime in state.bases.runtimes() if runtime.watch is not None]
    folders = [
        {"folder": str(folder), "problem": watch.troubles().get(str(folder), "")}
        for watch in watches
        for folder in watch.folders
    ]
    watched = [each for watch in watches for each in watch.watched()]
    watched.sort(key=lambda each: (not each.problem, each.name))
    # Names of files need be no text.
    return readable(
        {
            "object": "list",
            "interval_s": state.config.adapter_watch_interval_s if watches else None,
            "folders": folders,
            "num_problems": sum(bool(each.problem) for each in watched),
            "data": [asdict(each) for each in watched],
        }
    )
