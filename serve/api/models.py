"""GET /v1/models and /v1/models/{id}: the bases, the adapters, and the experiments' public names; POST to load and
unload a base."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request

from serve.adapters.registry.resolver import may_find
from serve.adapters.sums.expression import parse_expression
from serve.adapters.versions.version import AdapterVersion
from serve.api import paging
from serve.api.admin import ADMIN
from serve.api.bases import Base, Bases
from serve.api.body import JsonRoute
from serve.api.leaving import unless_gone
from serve.api.outline import Outline
from serve.api.permission import check_model, name_to_ask_by
from serve.api.schemas import ModelBody
from serve.api.services import Services
from serve.api.state import StateDep, held_base
from serve.api.text_cards import text_cards
from serve.errors import NotFoundError
from serve.pool.pool import Standing

router = APIRouter(route_class=JsonRoute)


@router.get("/v1/models")
async def list_models(
    state: StateDep,
    limit: Annotated[int | None, Query(ge=1, le=1000)] = None,
    after_id: str | None = None,
    before_id: str | None = None,
) -> dict[str, Any]:
    """As vLLM lists them: an adapter's `parent` is its base, its `root` the folder it came from. A bounded number of
    those that nobody has asked for yet stand behind them, without a version. A base's `status` says whether it is in
    memory; one that is not is loaded by the request that asks for it. A key sees what it may ask for, by a name that
    it may ask by. Anthropic's clients read the same, and its pages where one is asked for."""
    cards = await anyio.to_thread.run_sync(Listing(state.bases).cards)
    named = ((name_to_ask_by(card["id"], card.get("aliases", ())), card) for card in cards)
    cards = [in_both_words({**card, "id": name}) for name, card in named if name is not None]
    asked = paging.before(paging.after(cards, after_id, "after_id"), before_id, "before_id")
    return paging.page(asked, limit, is_last=before_id is not None)


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, state: StateDep) -> dict[str, Any]:
    """One of them, and whatever else a request may ask for now: `name@version` while that version is known, a sum
    of adapters, what a folder of adapters or models holds."""
    check_model(state.bases, model)
    return in_both_words(await anyio.to_thread.run_sync(Listing(state.bases).card, model))


@router.post("/v1/models/load", dependencies=[ADMIN])
async def load_model(body: ModelBody, http: Request, state: StateDep) -> dict[str, Any]:
    """Bring a base that the configuration names into memory, where another may have to make room; its card, once it
    is there. An adapter's name stands for its base."""
    base = await anyio.to_thread.run_sync(_named, state.bases, body.model)
    async with held_base(state, base, http):
        return await anyio.to_thread.run_sync(Listing(state.bases).card, base.name)


@router.post("/v1/models/unload", dependencies=[ADMIN])
async def unload_model(body: ModelBody, http: Request, state: StateDep) -> dict[str, Any]:
    """Give its memory back, once the requests that it has have ended; its card. The next request loads it again."""
    base = await anyio.to_thread.run_sync(_named, state.bases, body.model)
    await unless_gone(http.receive, _gone(state.bases, base))
    return await anyio.to_thread.run_sync(Listing(state.bases).card, base.name)


async def _gone(bases: Bases, base: Base) -> None:
    await asyncio.wrap_future(bases.pool.unload(base.name))


def _named(bases: Bases, name: str) -> Base:
    """The base that is meant. NotFoundError names those there are."""
    found = bases.find(name) or bases.of_model(name) or bases.looked_up(name)
    if found is None:
        there = ", ".join(base.name for base in bases.all())
        raise NotFoundError(f"model {name!a:.200} is not configured here; there are {there}")
    return found


class Listing:
    """What there is now. Reads folders: not for the event loop."""

    def __init__(self, bases: Bases) -> None:
        self._bases = bases
        self._loaded = bases.pool.loaded()
        self._standings = {each.name: each for each in bases.pool.standings()}

    def cards(self) -> list[dict[str, Any]]:
        """Of everything that may be asked for."""
        known = self._known()
        ids = {card["id"] for card in known}
        return [*known, *(card for card in self._found() if card["id"] not in ids)]

    def card(self, model: str) -> dict[str, Any]:
        """Of one name. NotFoundError."""
        base = self._bases.find(model)
        if base is not None:
            return self._base_card(base)
        for card in self._known():
            if card["id"] == model:
                return card
        for base, services in self._with_services():
            with suppress(NotFoundError):
                version = services.runtime.registry.resolve(model)
                return self._adapter_card(base, version, version.id)
        for card in self._found():
            if card["id"] == model:
                return card
        for base in self._bases.all():
            if self._answers(base, model):
                return self._card(base, model)
        raise NotFoundError(f"model {model!r} is not served here")

    def _answers(self, base: Base, model: str) -> bool:
        """Whether every adapter of a name, or of a sum, is known there or would be looked up."""
        services = self._loaded.get(base.name)

        def is_there(name: str) -> bool:
            if services is None and name.partition("@")[0] in self._bases.kept_paths(base):
                return True
            if services is not None:
                with suppress(NotFoundError):
                    services.runtime.registry.resolve(name)
                    return True
            return may_find(name, base.config.adapter_dirs, base.config.adapter_hub)

        terms = parse_expression(model, is_there)
        return all(map(is_there, [model] if terms is None else [term.name for term in terms]))

    def _known(self) -> list[dict[str, Any]]:
        bases = [base for base in self._bases.all() if not base.is_found or base.name in self._loaded]
        adapters = [card for base in bases for card in self._adapter_cards(base)]
        return [
            *(self._base_card(base) for base in bases),
            *adapters,
            *self._experiment_cards(),
            *text_cards(self._bases.text_models, self._bases.created),
        ]

    def _with_services(self) -> list[tuple[Base, Services]]:
        return [(base, self._loaded[base.name]) for base in self._bases.all() if base.name in self._loaded]

    def _base_card(self, base: Base) -> dict[str, Any]:
        outline = self._bases.outline(base)
        standing = self._standings[base.name]
        return {
            **self._card(base, base.name, root=outline.root if outline else base.config.model, parent=None),
            "aliases": list(base.aliases),
            **_told(standing),
        }

    def _adapter_cards(self, base: Base) -> list[dict[str, Any]]:
        services = self._loaded.get(base.name)
        if services is not None:
            return [self._adapter_card(base, each, each.name) for each in services.runtime.registry.current()]
        return [self._card(base, name, root=path) for name, path in self._bases.kept_paths(base).items()]

    def _adapter_card(self, base: Base, version: AdapterVersion, id: str) -> dict[str, Any]:
        card = self._card(base, id, root=version.path)
        return {**card, "version": version.id, "content_hash": version.content_hash}

    def _experiment_cards(self) -> list[dict[str, Any]]:
        cards = []
        for name, run in self._bases.experiments.runs.items():
            variants = run.experiment.variants
            found = [self._bases.of_model(variant.model) or self._bases.first for variant in variants]
            parent = found[0].name if len({base.name for base in found}) == 1 else None
            card = self._card(found[0], name, parent=parent)
            cards.append({**card, "variants": [variant.name for variant in variants]})
        return cards

    def _found(self) -> list[dict[str, Any]]:
        """Of adapter_dirs and model_dirs, what a request may ask for."""
        adapters = [
            self._card(base, name)
            for base, services in self._with_services()
            for name in services.runtime.resolver.listed()
        ]
        unloaded = {"aliases": [], "status": "unloaded", "pinned": False}
        models = [self._written(name, None, None, None) | unloaded for name in self._bases.models_found()]
        return [*adapters, *models]

    def _card(
        self, base: Base, id: str, *, root: str | None = None, parent: str | None = ""
    ) -> dict[str, Any]:
        """parent  "": the base"""
        return self._written(id, root, base.name if parent == "" else parent, self._bases.outline(base))

    def _written(
        self, id: str, root: str | None, parent: str | None, outline: Outline | None
    ) -> dict[str, Any]:
        return {
            "id": id,
            "object": "model",
            "created": self._bases.created,
            "owned_by": "lathe",
            "root": root,
            "parent": parent,
            "max_model_len": outline.max_context if outline else None,
            "context_window": outline.max_context if outline else None,
            "input_modalities": ["text", *outline.kinds] if outline else ["text"],
        }


def in_both_words(card: dict[str, Any]) -> dict[str, Any]:
    """A card with Anthropic's fields beside OpenAI's: clients of both ask at this address."""
    created = datetime.fromtimestamp(card["created"], UTC).isoformat().replace("+00:00", "Z")
    named = {"type": "model", "display_name": card["id"], "created_at": created}
    return {**card, **named, "max_input_tokens": card["max_model_len"]}


def _told(standing: Standing) -> dict[str, Any]:
    told: dict[str, Any] = {"status": standing.state, "pinned": standing.is_pinned}
    return told if standing.problem is None else {**told, "problem": standing.problem}
