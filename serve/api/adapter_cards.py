"""What a registry says of adapters → what /v1/adapters answers: where versions are, who holds them, what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from serve.adapters.registry.known import ShownName, ShownVersion
from serve.adapters.versions.version import AdapterVersion
from serve.runtime import Runtime

MAX_REQUESTS_SHOWN = 16
STATES = {"host": "host", "file": "disk", "source": "disk", "gone": "gone"}
"""Of a version that has no slot, by where its content is."""


def listing(runtimes: Sequence[Runtime]) -> dict[str, Any]:
    """Every adapter of these bases, and what all of them take. Blocks: it asks the disk."""
    stats = [runtime.registry.residency.stats() for runtime in runtimes]
    cards = []
    for runtime in runtimes:
        for name in (*runtime.registry.names(), *runtime.registry.combinations()):
            shown = runtime.registry.find(name)
            if shown is not None:  # it may have been unloaded meanwhile
                cards.append(_card(runtime, shown))
    return {
        "object": "list",
        "data": cards,
        "slots": {
            "max": sum(each.num_slots for each in stats),
            "taken": sum(each.num_seated for each in stats),
            "awaited": sum(each.num_wanted for each in stats),
        },
        "bytes": {
            "device": sum(runtime.engine.bank.num_bytes for runtime in runtimes),
            "device_budget": sum(runtime.registry.max_bytes for runtime in runtimes),
            "host": sum(each.host_bytes for each in stats),
            "files": sum(each.file_bytes for each in stats),
        },
        "hits": sum(each.num_hits for each in stats),
        "misses": sum(each.num_misses for each in stats),
        "loads": sum(each.num_loads for each in stats),
        "evicted": sum(each.num_evicted for each in stats),
        "failed": sum(each.num_failed for each in stats),
    }


def adapter_card(runtime: Runtime, name: str) -> dict[str, Any]:
    """One adapter, with its current version's manifest. NotFoundError. Blocks, also until a step has ended."""
    shown = runtime.registry.show(name)
    current = next(each.version for each in shown.versions if each.is_current)
    return {**_card(runtime, shown), "manifest": _manifest(runtime, current)}


def _card(runtime: Runtime, shown: ShownName) -> dict[str, Any]:
    current = next(each for each in shown.versions if each.is_current)
    return {
        "name": shown.name,
        "object": "combination" if current.version.is_combined else "adapter",
        "current": current.version.id,
        "base": runtime.model.name,
        "state": _state(current),
        "pinned": shown.is_pinned,
        "found": shown.is_found,
        "versions": [_version(runtime, each) for each in shown.versions],
    }


def _version(runtime: Runtime, shown: ShownVersion) -> dict[str, Any]:
    version, standing = shown.version, shown.standing
    low, high = version.ranks
    return {
        "id": version.id,
        "version": version.number,
        "state": _state(shown),
        "slot": standing.slot if standing.is_ready else None,
        "problem": standing.problem,
        "path": version.path,
        "format": version.format,
        "created": int(version.created_s),
        "content_hash": version.content_hash,
        "modules": version.num_modules,
        "rank": {"min": low, "max": high},
        "bytes": {
            "device": runtime.registry.device_bytes(version),
            "host": version.num_bytes if shown.tier == "host" else 0,
            "content": version.num_bytes,
        },
        "hits": standing.num_hits,
        "misses": standing.num_misses,
        "loads": standing.num_loads,
        "held_by": {
            "requests": shown.num_requests,
            "rows": len(standing.request_ids),
            "waiting": standing.num_waiting,
            "ids": sorted(standing.request_ids)[:MAX_REQUESTS_SHOWN],
        },
        "lineage": _lineage(version),
    }


def _state(shown: ShownVersion) -> str:
    standing = shown.standing
    if standing.slot is not None:
        return "resident" if standing.is_ready else "loading"
    return "broken" if standing.problem is not None else STATES[shown.tier]


def _lineage(version: AdapterVersion) -> dict[str, Any] | None:
    """Where it came from, but for texts that the manifest has."""
    if version.lineage is None:
        return None
    told = dataclasses.asdict(version.lineage)
    for name in ("chat_template", "chat_template_kwargs", "stop_ids", "template_day"):
        del told[name]
    return told


def _manifest(runtime: Runtime, version: AdapterVersion) -> dict[str, Any]:
    """What it is: asked of a loaded adapter, it is what is served, not what a file says."""
    template = runtime.template_of(version)
    eos = runtime.model.tokenizer.eos_token_ids
    return {
        "base": runtime.model.name,
        "base_fingerprint": runtime.model.fingerprint,
        "trained_on": version.lineage.base_model if version.lineage else None,
        "template_hash": template.hash if template.exists else None,
        "has_own_template": version.template is not None,
        "template_variables": sorted(template.variables) if template.exists else [],
        "stop_ids": sorted({*eos, *version.stop_ids}),
        "effect_hash": version.effect_hash,
        "touches_tower": bool(version.tower_hash),
        "prefix_bytes": runtime.prefix_bytes(version),
        "notes": list(version.notes),
    }
