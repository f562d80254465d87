"""GET /v1/status: what runs and what waits, and how far each is; GET /version. Neither stops the engine."""

from __future__ import annotations

import platform
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter

from serve import device
from serve.api.admin import SeesAllDep
from serve.api.exchange import Exchange, current
from serve.api.state import AppState, StateDep

router = APIRouter()

PACKAGES = {"lathe": "mlx-lathe", "mlx": "mlx", "mlx_lm": "mlx-lm", "mlx_vlm": "mlx-vlm"}
COUNTS = (
    *("num_decoding", "num_prefilling", "num_waiting"),
    *("num_prompt_tokens", "num_generated_tokens", "num_steps"),
)
"""Of the engines that are loaded, added up."""
PHASES = ("preparing", "waiting", "prefill", "thinking", "decode")
"""From the first to the last: what is read, fetched and tokenized before it reaches the engine is being prepared."""


@router.get("/v1/status")
async def status(state: StateDep, sees_all: SeesAllDep) -> dict[str, Any]:
    """Every request that has come and has no whole answer yet, the oldest first; to a key that is no admin's, those
    of its tenant."""
    asks = current()
    shown = [
        entry(each)
        for each in sorted(state.exchanges, key=lambda each: each.started_s)
        if not each.is_aside and (sees_all or (asks is not None and _is_of(asks, each)))
    ]
    return {
        "object": "status",
        "status": _state(state),
        "uptime_s": round(time.time() - state.bases.created, 1),
        **({"server": _totals(state)} if sees_all else {}),
        "requests": shown,
    }


@router.get("/version")
async def versions() -> dict[str, Any]:
    """`version` is Lathe's, as vLLM says its own; beside it what it stands on."""
    found = {name: _version(package) for name, package in PACKAGES.items()}
    return {
        "version": found["lathe"],
        **found,
        "python": platform.python_version(),
        "backend": device.backend(),
    }


def entry(exchange: Exchange) -> dict[str, Any]:
    """One request, and its rows as far as it has any."""
    rows = [row for running in exchange.running for row in running.describe()]
    phase = max((row["phase"] for row in rows), key=PHASES.index, default="preparing")
    return {
        "id": exchange.id,
        "path": exchange.path,
        "phase": phase,
        "model": exchange.asked,
        "served": exchange.served,
        "tenant": exchange.tenant or None,
        "key": exchange.key_name,
        "age_s": round(exchange.age_s, 3),
        "ttft_s": None if exchange.ttft_s is None else round(exchange.ttft_s, 3),
        "num_prompt_tokens": exchange.num_prompt_tokens,
        "num_generated_tokens": exchange.num_answer_tokens,
        "rows": rows,
    }


def _is_of(asks: Exchange, other: Exchange) -> bool:
    return asks.key is not None and other.key is not None and asks.key.tenant == other.key.tenant


def _state(state: AppState) -> str:
    if any(runtime.worker.failure is not None for runtime in state.bases.runtimes()):
        return "failed"
    return "draining" if state.drain.is_on else "ok"


def _totals(state: AppState) -> dict[str, Any]:
    each = [runtime.worker.stats() for runtime in state.bases.runtimes()]
    finished = sum((Counter(stats.num_finished) for stats in each), Counter[str]())
    return {
        "loaded": list(state.bases.pool.loaded()),
        **{name: sum(getattr(stats, name) for stats in each) for name in COUNTS},
        "num_finished": dict(finished),
        "num_keys": state.keys.num_keys if state.keys else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
