"""GET /v1/models and /v1/models/{id}: the base, the adapters, and the experiments' public names."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from serve.adapters.versions.version import AdapterVersion
from serve.api.services import Services
from serve.api.state import StateDep
from serve.errors import NotFoundError
from serve.sight import kinds_of

router = APIRouter()


@router.get("/v1/models")
async def list_models(state: StateDep) -> dict[str, Any]:
    """As vLLM lists them: an adapter's `parent` is the base, its `root` the folder it came from. A bounded number of
    those that nobody has asked for yet stand behind them, without a version."""
    services = state.services
    cards = _cards(services)
    known = {card["id"] for card in cards}
    found = await services.look_up(services.runtime.resolver.listed)
    return {
        "object": "list",
        "data": [*cards, *(_found_card(services, name) for name in found if name not in known)],
    }


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, state: StateDep) -> dict[str, Any]:
    """One of them; `name@version` too, while that version is known."""
    services = state.services
    for card in _cards(services):
        if card["id"] == model:
            return card
    try:
        version = services.runtime.registry.resolve(model)
    except NotFoundError:
        if model in await services.look_up(services.runtime.resolver.listed):
            return _found_card(services, model)
        raise NotFoundError(f"model {model!r} is not served here") from None
    return _adapter_card(services, version, version.id)


def _cards(services: Services) -> list[dict[str, Any]]:
    runtime = services.runtime
    base = _card(services, runtime.model.name, root=str(runtime.model.path), parent=None)
    adapters = [_adapter_card(services, version, version.name) for version in runtime.registry.current()]
    experiments = [
        {
            **_card(services, name, root=None, parent=runtime.model.name),
            "variants": [variant.name for variant in run.experiment.variants],
        }
        for name, run in runtime.experiments.items()
    ]
    return [base, *adapters, *experiments]


def _found_card(services: Services, name: str) -> dict[str, Any]:
    return _card(services, name, root=None, parent=services.runtime.model.name)


def _adapter_card(services: Services, version: AdapterVersion, id: str) -> dict[str, Any]:
    card = _card(services, id, root=version.path, parent=services.runtime.model.name)
    return {**card, "version": version.id, "content_hash": version.content_hash}


def _card(services: Services, id: str, *, root: str | None, parent: str | None) -> dict[str, Any]:
    return {
        "id": id,
        "object": "model",
        "created": services.created,
        "owned_by": "lathe",
        "root": root,
        "parent": parent,
        "max_model_len": services.runtime.max_context,
        "input_modalities": ["text", *sorted(kinds_of(services.runtime.sight))],
    }
