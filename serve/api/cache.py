"""GET /v1/cache/stats and POST /v1/cache/reset, at mlx-vlm's paths: what prefixes and features hold and
gave; dropping them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from serve.api.admin import ADMIN
from serve.api.state import StateDep
from serve.api.tenant import TenantDep
from serve.cache.stats import FeatureStats, PrefixStats
from serve.engine.request import MemoryUse
from serve.errors import ForbiddenError
from serve.runtime import Runtime

router = APIRouter(dependencies=[ADMIN])


@router.get("/v1/cache/stats")
async def cache_stats(state: StateDep) -> dict[str, Any]:
    """Bytes now and counts since the start, of the whole server."""
    runtimes = list(state.bases.runtimes())
    stats = [runtime.worker.stats() for runtime in runtimes]
    return {
        "enabled": any(runtime.engine.has_prefixes for runtime in runtimes),
        **_added_up(MemoryUse(), [each.memory for each in stats]),
        **_added_up(PrefixStats(), [each.prefixes for each in stats]),
        "features": _added_up(FeatureStats(), [each.features for each in stats]),
    }


def _added_up(none: Any, each: Sequence[Any]) -> dict[str, int]:
    """Counts of all bases that are loaded; `none` has those of no base."""
    return {name: sum(getattr(stats, name) for stats in each) for name in asdict(none)}


@router.post("/v1/cache/reset")
async def reset_cache(state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """Forget the prefixes and features of the tenant that a header names, in memory and on disk; all of them, where
    none does."""
    if not tenant and state.keys is None and not state.config.is_loopback:
        raise ForbiddenError(
            f"this server listens on {state.config.host}, where nobody may drop what others keep; "
            "name your tenant with X-Tenant"
        )
    for runtime in state.bases.runtimes():
        await run_in_threadpool(_forget, runtime, tenant or None)
    return {"status": "cleared", "tenant": tenant or None}


def _forget(runtime: Runtime, tenant: str | None) -> None:
    runtime.worker.call(lambda: runtime.engine.forget(tenant))
