"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages."""

from __future__ import annotations

import secrets

from fastapi import APIRouter, Request, Response

from serve.api.body import CLIENT_CLOSED_REQUEST, JsonRoute
from serve.api.messages.body import CountBody, MessagesBody
from serve.api.messages.errors import RESPONSES
from serve.api.messages.translation import chat_of
from serve.api.messages.writer import PING, MessagesWriter
from serve.api.opening import Words
from serve.api.state import StateDep
from serve.api.streaming import EVENT_STREAM, Responder
from serve.api.tenant import TenantDep
from serve.api.turn import begin_turn, prompt_alone

router = APIRouter(route_class=JsonRoute, responses=RESPONSES)
OPENING = Words(keep_alive=PING, error=lambda body: b"event: error\ndata: " + body + b"\n\n")
"""Of a stream that has nothing to say yet."""


@router.post("/v1/messages", responses=EVENT_STREAM)
async def create_message(body: MessagesBody, http: Request, state: StateDep, tenant: TenantDep) -> Response:
    """Anthropic's messages; the engine's extras of chat completions (`seed`, `min_p`, `drafter`, …) beside their
    fields."""
    translated = chat_of(body)
    with translated.named_as_sent():
        turn = await begin_turn(state, http, translated.chat, tenant, id=_new_id(), endpoint="messages")
    if turn is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    writer = MessagesWriter(turn, is_silent=body.max_tokens == 0)
    responder = Responder(turn, writer, http.receive, state.config.stream_keep_alive_s, PING)
    return await responder.stream() if body.stream else await responder.whole()


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountBody, http: Request, state: StateDep) -> dict[str, int]:
    """How many tokens the prompt of these messages has, with the template's own, pictures and tools."""
    translated = chat_of(body)
    with translated.named_as_sent():
        asked = await prompt_alone(state, http, translated.chat)
    return {"input_tokens": len(asked.prompt.token_ids)}


def _new_id() -> str:
    return f"msg_{secrets.token_hex(12)}"
