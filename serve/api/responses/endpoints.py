"""/v1/responses: OpenAI's newer API of chats, with a memory of what was said."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from serve.api import paging
from serve.api.body import JsonRoute
from serve.api.leaving import CLIENT_CLOSED_REQUEST, ClientGoneError
from serve.api.opening import Words
from serve.api.responses.background import in_background
from serve.api.responses.body import InputTokensBody, ResponsesBody
from serve.api.responses.chat import begin, num_input_tokens
from serve.api.responses.output import item_id
from serve.api.responses.store import Entry, Items
from serve.api.responses.writer import ResponseWriter, refused
from serve.api.state import AppState, StateDep
from serve.api.streaming import EVENT_STREAM, Responder
from serve.api.tenant import TenantDep
from serve.errors import RequestError, ResponseNotFoundError

router = APIRouter(route_class=JsonRoute)
OPENING = Words(error=refused)

PREFIXES = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
"""Of the ids of items that come without; others begin with `item`."""


@router.post("/v1/responses", responses=EVENT_STREAM)
async def create_response(body: ResponsesBody, http: Request, state: StateDep, tenant: TenantDep) -> Response:
    """OpenAI's responses, and a chat's extras beside them. Kept for a while, unless `store` is false; with
    `background` made while nobody waits."""
    previous = _previous(state, tenant, body.previous_response_id)
    body = _named(body, previous)
    id = item_id("resp")
    asked = _asked(state, tenant, (await http.json()).get("input")) if body.is_kept else []

    def keep(response: dict[str, Any]) -> bool:
        return body.is_kept and state.responses.store.put(tenant, response, asked, previous)

    def closed() -> None:
        state.responses.running.pop((tenant, id), None)

    async def begun(http: Request) -> ResponseWriter:
        history = previous.history if previous is not None else ()
        turn = await begin(state, http, body, tenant, id=id, history=history)
        if turn is None:
            raise ClientGoneError
        return ResponseWriter(turn, body, keep, closed)

    if body.background:
        _check_background(body)
        writer = await in_background(state, http, begun)
        told = writer.response
        if not writer.is_done:
            state.responses.running[tenant, id] = writer
        return JSONResponse(told, headers=writer.target.headers)
    try:
        writer = await begun(http)
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    responder = Responder(writer, writer, http.receive, state.config.stream_keep_alive_s)
    if not body.stream:
        return await responder.whole()
    state.responses.running[tenant, id] = writer
    return await responder.stream()


@router.post("/v1/responses/input_tokens")
async def count_input_tokens(
    body: InputTokensBody, http: Request, state: StateDep, tenant: TenantDep
) -> dict[str, Any]:
    """How many tokens the prompt of such a response has, with the template's own, pictures, tools and what it goes
    on from."""
    previous = _previous(state, tenant, body.previous_response_id)
    history = previous.history if previous is not None else ()
    count = await num_input_tokens(state, http, _named(body, previous), tenant, history)
    return {"object": "response.input_tokens", "input_tokens": count}


@router.get("/v1/responses/{response_id}")
async def retrieve_response(
    response_id: str,
    state: StateDep,
    tenant: TenantDep,
    stream: Annotated[bool | None, Query(description="Only false: what was streamed is not kept.")] = None,
) -> dict[str, Any]:
    """One that is kept, or that is being made now."""
    if stream:
        raise RequestError("stream: found true; a response is streamed once, as it is made", "stream")
    running = state.responses.running.get((tenant, response_id))
    return running.response if running is not None else _kept(state, tenant, response_id).response


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """Forget it; one that is being made ends. What goes on from it keeps what was said."""
    running = state.responses.running.pop((tenant, response_id), None)
    if running is not None:
        running.forget()
        return {"id": response_id, "object": "response", "deleted": True}
    if not state.responses.store.delete(tenant, response_id):
        raise _not_found(response_id)
    return {"id": response_id, "object": "response", "deleted": True}


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, state: StateDep, tenant: TenantDep) -> dict[str, Any]:
    """End a response that is being made; its stream, if it has one, ends with what there is."""
    running = state.responses.running.get((tenant, response_id))
    if running is not None:
        running.cancel()
        return {**running.response, "status": "cancelled"}
    response = _kept(state, tenant, response_id).response
    if response["status"] != "cancelled":
        raise RequestError(
            f"response {response_id!a:.120} has ended ({response['status']}); one that runs can be cancelled",
            "response_id",
        )
    return response


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    state: StateDep,
    tenant: TenantDep,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """What it was asked, without what it goes on from."""
    items = _kept(state, tenant, response_id).input
    if order == "desc":
        items.reverse()
    return paging.page(paging.after(items, after, "after"), limit)


def _check_background(body: ResponsesBody) -> None:
    if not body.is_kept:
        raise RequestError(
            "background: found true beside store: false; such a response is asked for later", "background"
        )
    if body.stream:
        raise RequestError(
            "background: found true beside stream: true; such a response is asked for by its id until it has ended",
            "background",
        )


def _previous(state: AppState, tenant: str, id: str | None) -> Entry | None:
    if id is None:
        return None
    entry = state.responses.store.get(tenant, id)
    if entry is None:
        error = RequestError(
            f"previous_response_id: there is no response {id!a:.120}: it was not stored, or is no more; send what "
            "was said in input",
            "previous_response_id",
        )
        error.code = "previous_response_not_found"
        raise error
    return entry


def _named(body: ResponsesBody, previous: Entry | None) -> ResponsesBody:
    """The same; one that names no model goes on with the one before's."""
    if body.model or previous is None:
        return body
    return body.model_copy(update={"model": previous.response["model"]})


def _kept(state: AppState, tenant: str, id: str) -> Entry:
    entry = state.responses.store.get(tenant, id)
    if entry is None:
        raise _not_found(id)
    return entry


def _not_found(id: str) -> ResponseNotFoundError:
    return ResponseNotFoundError(f"there is no response {id!a:.120}: it was not stored, or is no more")


def _asked(state: AppState, tenant: str, given: Any) -> Items:
    """A body's input as items with ids; what is referred to stands in the reference's place."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    items: Items = []
    for item in given or ():
        kind = item.get("type")
        if kind == "item_reference" or (kind is None and "role" not in item):
            items.append(state.responses.store.item(tenant, item["id"]) or item)
            continue
        kind = kind or "message"
        whole = {**item, "type": kind}
        if not (isinstance(item.get("id"), str) and item["id"]):
            whole["id"] = item_id(PREFIXES.get(kind, "item"))
        if kind == "message":
            whole = {**whole, "content": _parts(item), "status": item.get("status") or "completed"}
        items.append(whole)
    return items


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    """A message's content as parts."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        return list(content)
    if message["role"] == "assistant":
        return [{"type": "output_text", "text": content, "annotations": []}]
    return [{"type": "input_text", "text": content}]
