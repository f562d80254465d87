"""GET /v1/cache/stats and POST /v1/cache/reset, at mlx-vlm's paths: what prefixes and features hold and
gave; dropping them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from serve.api.state import StateDep
from serve.api.tenant import TenantDep
from serve.errors import ForbiddenError

router = APIRouter()


@router.get("/v1/cache/stats")
async def cache_stats(state: StateDep) -> dict[str, Any]:
    """Bytes now and counts since the start, of the whole server."""
    stats = state.services.runtime.worker.stats()
    return {
        "enabled": state.services.runtime.engine.has_prefixes,
        **asdict(stats.memory),
        **asdict(stats.prefixes),
        "features": asdict(stats.features),
    }


@router.post("/v1/cache/reset")
async def reset_cache(state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """Forget the prefixes and features of the tenant that a header names, in memory and on disk; all of them, where
    none does."""
    runtime = state.services.runtime
    if not tenant and not runtime.config.is_loopback:
        raise ForbiddenError(
            f"this server listens on {runtime.config.host}, where nobody may drop what others keep; "
            "name your tenant with X-Tenant"
        )
    await run_in_threadpool(runtime.worker.call, lambda: runtime.engine.forget(tenant or None))
    return {"status": "cleared", "tenant": tenant or None}
