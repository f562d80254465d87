"""Ollama's API on the engine as it is: chat, generate, and what there is."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from serve.api.admin import check_admin
from serve.api.body import CLIENT_CLOSED_REQUEST, JsonRoute
from serve.api.completions import begin_completion
from serve.api.embeddings import embedded
from serve.api.generation import new_id
from serve.api.ollama import listing
from serve.api.ollama.body import OllamaChatBody, OllamaEmbedBody, OllamaGenerateBody, ShowBody
from serve.api.ollama.errors import RESPONSES
from serve.api.ollama.keep_alive import keep
from serve.api.ollama.translation import LATEST, chat_of, completion_of, embedding_of, told_as_sent
from serve.api.ollama.writer import MEDIA_TYPE, Format, OllamaWriter, as_message, as_response, line, now, ns
from serve.api.opening import Words
from serve.api.permission import check_model, may_ask
from serve.api.state import AppState, StateDep
from serve.api.streaming import Responder
from serve.api.targets import held_target
from serve.api.tenant import TenantDep
from serve.api.turn import Turn, begin_turn
from serve.errors import ForbiddenError, NotFoundError, RequestError

router = APIRouter(route_class=JsonRoute, responses=RESPONSES)
OLLAMA = "0.12.6"
"""Whose API this is: clients ask for the version before they use what is new."""
OPENINGS = {
    path: Words(
        MEDIA_TYPE, line({**said("", "", ()), "done": False}), lambda body: body + b"\n", is_default=True
    )
    for path, said in (("/api/chat", as_message), ("/api/generate", as_response))
}
"""Of streams that have nothing to say yet, by path."""
LINES: dict[int | str, dict[str, Any]] = {200: {"content": {MEDIA_TYPE: {}}}}


@router.post("/api/chat", responses=LINES)
async def chat(body: OllamaChatBody, http: Request, state: StateDep, tenant: TenantDep) -> Response:
    """Ollama's chat: lines, unless `stream` is false."""
    asked_s, model = time.perf_counter(), _known(state, body.model)
    if not body.messages:
        return await _load(state, http, body, model, as_message)
    with told_as_sent():
        turn = await begin_turn(
            state, http, chat_of(body, model), tenant, id=new_id("ollama"), endpoint="ollama"
        )
    return await _respond(state, http, body, turn, as_message, asked_s)


@router.post("/api/generate", responses=LINES)
async def generate(body: OllamaGenerateBody, http: Request, state: StateDep, tenant: TenantDep) -> Response:
    """Ollama's completions: of a chat of one turn, or of the prompt as it is with `raw`."""
    asked_s, model, id = time.perf_counter(), _known(state, body.model), new_id("ollama")
    if not body.prompt and not body.images:
        return await _load(state, http, body, model, as_response)
    turn: Turn | None
    with told_as_sent():
        if body.raw:
            begun = await begin_completion(
                state, http, completion_of(body, model), tenant, id=id, endpoint="ollama"
            )
            turn = begun.turn
        else:
            turn = await begin_turn(state, http, chat_of(body, model), tenant, id=id, endpoint="ollama")
    return await _respond(state, http, body, turn, as_response, asked_s)


@router.post("/api/embed")
async def embed(body: OllamaEmbedBody, http: Request, state: StateDep) -> dict[str, Any]:
    """Ollama's embeddings."""
    asked_s = time.perf_counter()
    if body.input is None:
        raise RequestError("input: missing", "input")
    found = await embedded(state, http, embedding_of(body, body.input))
    return {
        "model": body.model,
        "embeddings": found.vectors.tolist(),
        "total_duration": ns(time.perf_counter() - asked_s),
        "load_duration": 0,
        "prompt_eval_count": found.num_tokens,
    }


@router.post("/api/embeddings")
async def embed_one(body: OllamaEmbedBody, http: Request, state: StateDep) -> dict[str, Any]:
    """The same of one text, as it was before."""
    if body.prompt is None:
        raise RequestError("prompt: missing", "prompt")
    found = await embedded(state, http, embedding_of(body, body.prompt))
    return {"embedding": found.vectors[0].tolist()}


@router.get("/api/tags")
async def tags(state: StateDep) -> dict[str, Any]:
    """Every model that may be asked for, adapters too; to a key those that it may ask for."""
    return {"models": await anyio.to_thread.run_sync(listing.tags, state.bases)}


@router.get("/api/ps")
async def running(state: StateDep) -> dict[str, Any]:
    """The bases that are in memory; to a key those that it may ask for."""
    found = await anyio.to_thread.run_sync(listing.running, state.bases)
    return {"models": [each for each in found if may_ask(each["name"])]}


@router.post("/api/show")
async def show(body: ShowBody, state: StateDep) -> dict[str, Any]:
    """What is known of one model: its context, and what it can do."""
    model = body.model or body.name
    if not model:
        raise RequestError("model: missing", "model")
    known = _known(state, model)
    check_model(state.bases, known)
    base = state.bases.of_model(known)
    services = None if base is None else state.bases.pool.loaded().get(base.name)
    abilities = [] if services is None else await services.tokenize(lambda: listing.abilities_of(services))
    return await anyio.to_thread.run_sync(listing.show, state.bases, known, abilities)


@router.get("/api/version")
async def show_version() -> dict[str, str]:
    """Of Ollama's API, and ours."""
    return {"version": OLLAMA, "lathe": version("mlx-lathe")}


async def _respond(
    state: AppState,
    http: Request,
    body: OllamaChatBody | OllamaGenerateBody,
    turn: Turn | None,
    format: Format,
    asked_s: float,
) -> Response:
    if turn is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    keep(state, turn.target.base, body.keep_alive)
    writer = OllamaWriter(turn, body.model, format, asked_s)
    keep_alive_s = state.config.stream_keep_alive_s
    responder = Responder(turn, writer, http.receive, keep_alive_s, writer.keep_alive, MEDIA_TYPE)
    return await responder.stream() if body.is_streamed else await responder.whole()


async def _load(
    state: AppState, http: Request, body: OllamaChatBody | OllamaGenerateBody, model: str, format: Format
) -> Response:
    """Nothing is said: the model is in memory now, or leaves it once nobody has it."""
    reason = "load"
    if body.keep_alive == 0:
        reason = "unload"
        _let_go(state, model)
    else:
        async with held_target(state, model, "", http) as target:
            keep(state, target.base, body.keep_alive)
    said = format("", "", ())
    return JSONResponse(
        {"model": body.model, "created_at": now(), **said, "done": True, "done_reason": reason}
    )


def _let_go(state: AppState, model: str) -> None:
    """NotFoundError; ForbiddenError for whoever may not do that, and where the only model stays."""
    check_admin(state)
    check_model(state.bases, model)
    base = state.bases.of_model(model)
    if base is None:
        raise NotFoundError(f"model {model!a:.200} is not served here")
    standing = next(each for each in state.bases.pool.standings() if each.name == base.name)
    if standing.is_pinned:
        raise ForbiddenError(f"model {base.name!r} is pinned, or the only one of this server, and stays")
    state.bases.pool.keep(base.name, 0)


def _known(state: AppState, model: str) -> str:
    """The name that is served; a tag that clients append is no part of it."""
    if (
        model.endswith(LATEST)
        and state.bases.of_model(model) is None
        and model not in state.bases.text_models
    ):
        return model.removesuffix(LATEST)
    return model
