"""The server's models as Ollama lists and shows them. Reads files: not for the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from serve import device
from serve.api.bases import Bases
from serve.api.models import Listing
from serve.api.permission import name_to_ask_by
from serve.api.services import Services
from serve.errors import LatheError
from serve.model.loading import read_config

NEVER = "0001-01-01T00:00:00Z"
"""When a model is unloaded that stays."""


def tags(bases: Bases) -> list[dict[str, Any]]:
    """Every model, adapters too; to a request's key those that it may ask for."""
    cards = Listing(bases).cards()
    named = ((name_to_ask_by(card["id"], card.get("aliases", ())), card) for card in cards)
    return [{**_entry(bases, card), "name": name, "model": name} for name, card in named if name is not None]


def running(bases: Bases) -> list[dict[str, Any]]:
    """Those that are in memory."""
    entries, loaded = [], bases.pool.loaded()
    standings = {each.name: each for each in bases.pool.standings()}
    for card in Listing(bases).cards():
        if card["id"] in loaded:
            size = loaded[card["id"]].runtime.used_bytes
            on_gpu = 0 if device.backend() == "cpu" else size
            entry = {**_entry(bases, card), "size": size, "size_vram": on_gpu}
            entry["expires_at"] = _expiry(standings[card["id"]].idle_s)
            entries.append({**entry, "context_length": card["max_model_len"]})
    return entries


def show(bases: Bases, model: str, abilities: Sequence[str]) -> dict[str, Any]:
    """One model. NotFoundError. abilities: as `abilities_of` tells, of one that is loaded."""
    card = Listing(bases).card(model)
    config = _config(bases, card)
    family = str(config.get("model_type", ""))
    can = ["embedding" if "dimensions" in card else "completion"]
    can += ["vision"] if "image" in card["input_modalities"] else []
    return {
        "modelfile": f"FROM {model}\n",
        "parameters": "",
        "template": "",
        "license": "",
        "modified_at": _modified(card["root"]),
        "details": _details(config, card["parent"]),
        "model_info": {
            "general.architecture": family,
            "general.basename": card["parent"] or model,
            f"{family}.context_length": card["max_model_len"],
        },
        "capabilities": [*can, *abilities],
    }


def abilities_of(services: Services) -> list[str]:
    """What a chat with a model can be. To be called when it is the tokenizer's turn."""
    template = services.runtime.template_of(None)
    if not template.exists:
        return []
    return ["tools", "thinking"] if services.runtime.thoughts.of(template) is not None else ["tools"]


def _entry(bases: Bases, card: dict[str, Any]) -> dict[str, Any]:
    base = bases.of_model(card["id"])
    services = None if base is None else bases.pool.loaded().get(base.name)
    digest = card.get("content_hash") or (services.runtime.model.fingerprint if services is not None else "")
    return {
        "name": card["id"],
        "model": card["id"],
        "modified_at": _modified(card["root"]),
        "size": _size(card["root"]),
        "digest": digest.removeprefix("sha256:"),
        "details": _details(_config(bases, card), card["parent"]),
    }


def _config(bases: Bases, card: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model, of an adapter its base's; empty where it cannot be read."""
    base = bases.of_model(card["id"])
    outline = None if base is None else bases.outline(base)
    root = card["root"] if outline is None else outline.root
    try:
        return read_config(Path(root)) if root else {}
    except LatheError:
        return {}


def _details(config: dict[str, Any], parent: str | None) -> dict[str, Any]:
    family = str(config.get("model_type", ""))
    quantization = config.get("quantization") or {}
    bits = quantization.get("bits")
    return {
        "parent_model": parent or "",
        "format": "mlx",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": f"Q{bits}"
        if bits
        else str(config.get("torch_dtype") or config.get("dtype") or ""),
    }


def _modified(root: str | None) -> str:
    try:
        seconds = Path(root).stat().st_mtime if root else 0.0
    except OSError:
        seconds = 0.0
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _expiry(left_s: float | None) -> str:
    if left_s is None:
        return NEVER
    return (datetime.now(UTC) + timedelta(seconds=left_s)).isoformat().replace("+00:00", "Z")


def _size(root: str | None) -> int:
    """Bytes of the weights."""
    try:
        return sum(path.stat().st_size for path in Path(root).glob("*.safetensors")) if root else 0
    except OSError:
        return 0
