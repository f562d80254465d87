"""Adapters over HTTP: vLLM's load and unload, and what it has no word for: versions, rollback, pins, what there is.

Streams go on meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse

from serve.adapters.formats.files import find_files, located
from serve.adapters.registry.registry import Registry
from serve.adapters.versions.version import AdapterVersion
from serve.api.adapter_cards import adapter_card, listing
from serve.api.admin import ADMIN
from serve.api.bases import Base
from serve.api.body import JsonRoute
from serve.api.errors import openai_error
from serve.api.schemas import LoadAdapterBody, PinAdapterBody, RollbackBody, UnloadAdapterBody
from serve.api.services import Services
from serve.api.state import AppState, StateDep, held_base
from serve.config import ServeConfig
from serve.errors import AdapterError, ForbiddenError, NotFoundError, RequestError
from serve.runtime import Runtime

MAX_PATH_CHARS = 200

router = APIRouter(route_class=JsonRoute, dependencies=[ADMIN])


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadAdapterBody, http: Request, state: StateDep) -> Response:
    """Load a folder under a name; with load_inplace, replace the version that new requests get. base_model_name says
    of which base it is, where there are several; else the one that has the name, or the first."""
    if not body.lora_name or not body.lora_path:
        raise RequestError("Both 'lora_name' and 'lora_path' must be provided.", "lora_name")
    base = _base_for(state, body)
    try:
        async with held_base(state, base, http) as lease:
            runtime = lease.loaded.runtime
            version = await lease.loaded.load(lambda: _load(runtime, body))
    except NotFoundError as error:
        return openai_error(404, str(error), code="not_found", param="lora_path")
    modules = f"\n{version.id} adapts {version.num_modules} modules, {_ranks(version)}."
    notes = "".join(f"\nWarning: {note}" for note in version.notes)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.{modules}{notes}")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadAdapterBody, http: Request, state: StateDep) -> Response:
    """Refuse the name to new requests; running ones end with the version they hold."""
    if not body.lora_name:
        raise RequestError("'lora_name' needs to be provided to unload a LoRA adapter.", "lora_name")
    try:
        async with _held_of(state, body.lora_name, http) as services:
            await run_in_threadpool(services.runtime.registry.unload, body.lora_name)
    except NotFoundError:
        message = f"The lora adapter '{body.lora_name}' cannot be found."
        return openai_error(404, message, code="not_found", param="lora_name")
    state.metrics.unloaded()
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get("/v1/adapters")
async def list_adapters(state: StateDep) -> dict[str, Any]:
    """All that are known: their versions, where each is, and who holds it; slots and bytes of all together."""
    return await run_in_threadpool(listing, list(state.bases.runtimes()))


@router.post("/v1/adapters/{name:path}/rollback")
async def roll_back(name: str, body: RollbackBody, http: Request, state: StateDep) -> dict[str, Any]:
    """Give new requests an earlier version again; the one before, if none is named."""
    return await _changed(state, name, http, lambda registry: registry.rollback(name, body.version))


@router.post("/v1/adapters/{name:path}/pin")
async def pin(name: str, body: PinAdapterBody, http: Request, state: StateDep) -> dict[str, Any]:
    """Keep a slot for whatever version the name stands for."""
    return await _changed(state, name, http, lambda registry: registry.pin(name))


@router.post("/v1/adapters/{name:path}/unpin")
async def unpin(name: str, body: PinAdapterBody, http: Request, state: StateDep) -> dict[str, Any]:
    """Let it give way again to adapters that are asked for."""
    return await _changed(state, name, http, lambda registry: registry.unpin(name))


@router.get("/v1/adapters/{name:path}")
async def show_adapter(name: str, http: Request, state: StateDep) -> dict[str, Any]:
    """One of them, and its manifest: what it was made for, how it is asked, where its answers end."""
    async with _held_of(state, name, http) as services:
        return await run_in_threadpool(adapter_card, services.runtime, name)


async def _changed(
    state: AppState, name: str, http: Request, change: Callable[[Registry], object]
) -> dict[str, Any]:
    """What an adapter is once `change` has been made to it."""
    async with _held_of(state, name, http) as services:
        runtime = services.runtime
        await services.change(lambda: change(runtime.registry))
        return await run_in_threadpool(adapter_card, runtime, name)


@asynccontextmanager
async def _held_of(state: AppState, name: str, http: Request) -> AsyncIterator[Services]:
    """What knows an adapter, held; the first, which then says so, where nothing does."""
    async with held_base(state, state.bases.of_adapter(name), http) as lease:
        yield lease.loaded


def _base_for(state: AppState, body: LoadAdapterBody) -> Base:
    """The base that an adapter is loaded for. NotFoundError; AdapterError where another has the name."""
    bases, name = state.bases, body.lora_name
    has_it = bases.of_adapter(name)
    wanted = None
    if body.base_model_name is not None:
        wanted = bases.find(body.base_model_name)
        if wanted is None:
            there = ", ".join(base.name for base in bases.all())
            raise NotFoundError(f"base_model_name: found {body.base_model_name!a:.200}; there are {there}")
    base = wanted or has_it or bases.first
    taken = has_it if has_it is not None and has_it != base else bases.find(name)
    if taken is not None:
        what = (
            f"an adapter of model {taken.name!r}" if taken == has_it else "a model: a name is not the base's"
        )
        raise AdapterError(f"{name!r} is already the name of {what}; choose another")
    return base


def _load(runtime: Runtime, body: LoadAdapterBody) -> AdapterVersion:
    if body.lora_name in runtime.experiments:
        raise AdapterError(f"{body.lora_name!r} is the public name of an experiment; choose another")
    path = allowed_path(body.lora_path, runtime.config)
    return runtime.registry.load(body.lora_name, path, replace=body.load_inplace)


def _ranks(version: AdapterVersion) -> str:
    low, high = version.ranks
    return f"rank {low}" if low == high else f"ranks {low} to {high}"


def allowed_path(path: str, config: ServeConfig) -> Path:
    """The folder or the file of tensors behind `path`, links followed. ForbiddenError where this server may not read,
    be it one of the adapter's files; NotFoundError where nothing is; RequestError where no path can be."""
    roots = config.allowed_adapter_roots
    if roots is None and not config.is_loopback:
        raise ForbiddenError(
            f"{path} may not be loaded: this server listens on {config.host} and names no allowed_adapter_roots"
        )
    try:
        resolved = located(path)
        allowed = None if roots is None else [root.expanduser().resolve() for root in roots]
        is_allowed = _is_under(resolved, allowed)
        is_there = is_allowed and resolved.exists()
    except (ValueError, RuntimeError, OSError, NotFoundError) as error:
        # A null byte; a user that is not there, a loop of links; too long a name, no permission.
        message = f"lora_path: {path[:MAX_PATH_CHARS]!r} cannot be looked up: {error}"
        raise RequestError(message, "lora_path") from None
    if not is_allowed:
        raise ForbiddenError(f"{path} is under none of this server's allowed_adapter_roots")
    if not is_there:
        raise NotFoundError(f"No adapter found for {path}: there is no such folder or file")
    for file in _files_in(resolved):
        if not _is_under(Path(os.path.realpath(file)), allowed):
            raise ForbiddenError(f"{file} is a link that leads out of this server's allowed_adapter_roots")
    return resolved


def _files_in(path: Path) -> list[Path]:
    """The files that a load would read; none where it would find none, and say why."""
    try:
        return [file for file in find_files(path) if file is not None]
    except AdapterError:
        return []


def _is_under(path: Path, roots: Sequence[Path] | None) -> bool:
    return roots is None or any(path.is_relative_to(root) for root in roots)
