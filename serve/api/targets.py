"""The `model` field in, what serves it out: the base, an adapter version, or an experiment's variant."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio.to_thread
from fastapi import Request

from serve.adapters.sums.combination import Combination, Weighted, added_up
from serve.adapters.sums.expression import Term, parse_expression
from serve.adapters.versions.version import AdapterVersion
from serve.api.bases import Base
from serve.api.opening import withdraw
from serve.api.permission import check_model
from serve.api.services import Services
from serve.api.state import AppState, held_base
from serve.engine.arrivals import ARRIVALS
from serve.errors import NotFoundError, OverloadedError, RequestError
from serve.experiments.assignment import Variant, assign
from serve.experiments.records import Run
from serve.pool.pool import Lease

VARIANT_RETRY_AFTER_S = 5.0
MAX_HEADER_CHARS = 512
MAX_LOOKUPS = 3
"""Of one name: between being found and being held it may have been unloaded."""
TURNS_TO_BEGIN = 3
"""Of the event loop, in which what has come is read, and its request begins."""
ARRIVING = "lathe.arriving"
"""In a request's scope: by what `ARRIVALS` knows it."""
MAX_NAMES = 50
"""That an answer lists."""


@dataclass(frozen=True)
class Assignment:
    """Which arm of which experiment a unit was given."""

    run: Run
    variant: Variant
    unit: str


@dataclass(frozen=True)
class Target:
    """What one request is served by."""

    asked: str
    """The `model` field, which the response repeats."""
    services: Services
    """Of the model that answers."""
    version: AdapterVersion | None
    assignment: Assignment | None = None
    lease: Lease[Services] | None = None
    """On that model, for as long as the target is held; who goes on after that takes another (`again`)."""
    overflow: str = ""
    """What was done to the conversation to make it fit; empty: nothing."""

    @property
    def base(self) -> str:
        """The model's name, without adapters."""
        return self.services.runtime.model.name

    @property
    def served(self) -> str:
        """`name@N`, or the base's name."""
        return self.version.id if self.version else self.base

    @property
    def label(self) -> str:
        """Name without version, for metrics; one for all combinations, of which there is no end."""
        return self.base if self.version is None else self.version.label

    @property
    def headers(self) -> dict[str, str]:
        """Response headers that say what answered."""
        headers = {"x-lathe-model": _header(self.served)}
        if self.assignment is not None:
            headers["x-lathe-variant"] = _header(self.assignment.variant.name)
        if self.overflow:
            headers["x-lathe-context-overflow"] = self.overflow
        return headers


@asynccontextmanager
async def held_target(
    state: AppState,
    model: str | None,
    unit: str,
    http: Request | None = None,
    deadline_s: float | None = None,
) -> AsyncIterator[Target]:
    """What `model` stands for now; its base, brought where it is not in memory, and an adapter's version are held
    inside the block. Nothing stands for the first base.

    http  the request that waits for it: its stream gets comments meanwhile; ClientGoneError once its client has left
    deadline_s  until when it waits for a model to be loaded, by time.monotonic; DeadlineError then
    A name that nobody has loaded is looked up where the configuration allows it, off the event loop. NotFoundError,
    ForbiddenError, OverloadedError, and what loading raises.
    """
    model = model or state.bases.first.name
    check_model(state.bases, model)
    if model in state.texts.models:
        raise RequestError(
            f"model {model!r} makes vectors or scores of texts and generates none; ask it at /v1/embeddings, "
            "/v1/rerank or /v1/score",
            "model",
        )
    run = state.bases.experiments.runs.get(model)
    arm = None if run is None else (run, assign(run.experiment, unit))
    wanted = model if arm is None else arm[1].model
    base = await (_base_of(state, model) if arm is None else _base_of_arm(state, *arm))
    async with held_base(state, base, http, deadline_s) as lease:
        services = lease.loaded
        version = None
        if state.bases.find(wanted) is None:
            version = await (_acquire(state, services, model) if arm is None else _armed(services, *arm))
        assignment = None if arm is None else Assignment(*arm, unit)
        try:
            with services.runtime.worker.expecting():
                if http is not None:  # from here on it is known who is asked
                    ARRIVALS.end(http.scope.get(ARRIVING))
                yield Target(model, services, version, assignment, lease)
            if http is not None:
                await withdraw(http)
        finally:
            if version is not None:
                services.runtime.registry.release(version)


async def let_others_begin(services: Services) -> None:
    """Where the engine would begin with this request, give those that have come with it the turns of the loop in
    which they are read and become expected: a short chat is made ready without any."""
    if services.runtime.worker.is_idle:
        for _ in range(TURNS_TO_BEGIN):
            await asyncio.sleep(0)


async def _base_of(state: AppState, model: str) -> Base:
    """The base that answers it; the first, where that is in memory and may know more of the name than that nobody has
    it. NotFoundError."""
    bases = state.bases
    found = bases.of_model(model)
    if found is None and (bases.config.model_dirs or len(bases.all()) > 1):
        found = await anyio.to_thread.run_sync(bases.looked_up, model)
    if found is None and bases.first.name not in bases.pool.loaded():
        raise NotFoundError(f"model {model!r} is not served here; there are {_listed(bases.names())}")
    return found or bases.first


async def _base_of_arm(state: AppState, run: Run, variant: Variant) -> Base:
    try:
        return await _base_of(state, variant.model)
    except NotFoundError:
        raise _not_loaded(run, variant) from None


async def _armed(services: Services, run: Run, variant: Variant) -> AdapterVersion | None:
    """An arm's adapter, held."""
    try:
        return await _looked_up(services, variant.model)
    except NotFoundError:
        raise _not_loaded(run, variant) from None


def _not_loaded(run: Run, variant: Variant) -> OverloadedError:
    error = OverloadedError(
        f"variant {variant.name!r} of experiment {run.experiment.name!r} needs adapter {variant.model!r}, "
        "which is not loaded; load it with /v1/load_lora_adapter",
        VARIANT_RETRY_AFTER_S,
    )
    error.code = "variant_not_loaded"
    return error


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


async def _acquire(state: AppState, services: Services, model: str) -> AdapterVersion | None:
    runtime = services.runtime
    try:
        return await _looked_up(services, model)
    except NotFoundError as error:
        if parse_expression(model, runtime.registry.knows) is not None:
            raise
        if "@" in model and model.partition("@")[0] in runtime.registry.names():
            raise NotFoundError(f"model {model!r} is not served here: {error}") from None
        there = _listed(state.bases.names())
        raise NotFoundError(f"model {model!r} is not served here; there are {there}") from None


async def _looked_up(services: Services, model: str) -> AdapterVersion | None:
    """The version, held; of an expression that of what it adds, None where that is nothing.

    Whatever is known, or found, by exactly that name comes before what may be read in it.
    """
    registry = services.runtime.registry
    try:
        version = await _of_name(services, model)
    except NotFoundError:
        terms = parse_expression(model, registry.knows)
        if terms is None:
            raise
        return await _sum(services, model, terms)
    if not version.is_combined:
        return version
    registry.release(version)  # what it adds may be known no more
    terms = parse_expression(model, registry.knows)
    assert terms is not None, "a combination is named by what it adds"
    return await _sum(services, model, terms)


async def _of_name(services: Services, name: str) -> AdapterVersion:
    """The version, held; the name is looked up where it is not known."""
    runtime = services.runtime
    for _ in range(MAX_LOOKUPS):
        try:
            return runtime.registry.acquire(name)
        except NotFoundError:
            if not runtime.resolver.looks_up(name):
                raise
        await services.look_up(lambda: runtime.resolver.find(name))
    return runtime.registry.acquire(name)


async def _sum(services: Services, model: str, terms: Sequence[Term]) -> AdapterVersion | None:
    """Several adapters as one version, held: of the versions that they are now."""
    registry = services.runtime.registry
    held: list[AdapterVersion] = []
    try:
        for term in terms:
            held.append(await _part(services, model, term))
        named = zip(held, terms, strict=True)
        parts = added_up(Weighted(version, term.weight) for version, term in named)
        if not parts:
            return None
        if len(parts) == 1 and parts[0].weight == 1:
            return registry.acquire(parts[0].version.id)
        source = Combination(parts, registry.contents)
        for _ in range(MAX_LOOKUPS):
            try:
                return registry.acquire(source.name)
            except NotFoundError:
                await services.look_up(
                    lambda: registry.add(source.name, source, is_found=True, is_combined=True)
                )
        return registry.acquire(source.name)
    finally:
        for version in held:
            registry.release(version)


async def _part(services: Services, model: str, term: Term) -> AdapterVersion:
    """One of them, held. NotFoundError names it."""
    if term.name == services.runtime.model.name:
        raise RequestError(
            f"model {model!a:.200} adds {term.name!r}, which is the base; adapters are added to it, name them alone",
            "model",
        )
    try:
        return await _of_name(services, term.name)
    except NotFoundError as error:
        raise NotFoundError(
            f"model {model!a:.200} adds {term.name!a:.200}, which is not served here: {error}"
        ) from None


def _header(value: str) -> str:
    """`value` as a header may hold it: printable ASCII, not blank at its ends; anything else is escaped."""
    escaped = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in value[:MAX_HEADER_CHARS])
    return escaped if escaped == escaped.strip() else ascii(escaped)
