"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.api.answer import Answer, Piece
from serve.api.body import CLIENT_CLOSED_REQUEST, JsonRoute
from serve.api.choices import ChoicesWriter
from serve.api.generation import new_id
from serve.api.logprobs import prompt_logprobs
from serve.api.schemas import ChatBody
from serve.api.state import StateDep
from serve.api.streaming import EVENT_STREAM, Responder
from serve.api.tenant import TenantDep
from serve.api.turn import Turn, begin_turn
from serve.engine.request import TokenLogprob

router = APIRouter(route_class=JsonRoute)


class ChatFormat:
    """Messages; a stream says the role first and the finish in a chunk of its own."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, turn: Turn, prompt_logprobs: int | None) -> None:
        """prompt_logprobs: so many of the prompt's, if any."""
        self._tells_thoughts = turn.tells_thoughts
        self._writers = turn.logprobs
        self._tokens = turn.target.services.runtime.engine.token_bytes
        self._prompt_logprobs = prompt_logprobs
        self._begun: set[int] = set()

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if self._tells_thoughts:
            message |= _thoughts(answer.reasoning or None)
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(index, answer.logprobs),
            "finish_reason": answer.finish,
            "stop_reason": answer.stop_reason,
        }

    def extra(self, answers: Sequence[Answer]) -> dict[str, Any]:
        if self._prompt_logprobs is None:
            return {}
        entries = answers[0].prompt_logprobs
        return {"prompt_logprobs": prompt_logprobs(self._tokens, entries, self._prompt_logprobs)}

    def deltas(self, index: int, piece: Piece) -> Sequence[dict[str, Any]]:
        found = []
        if index not in self._begun:
            self._begun.add(index)
            found.append(_delta(index, {"role": "assistant", "content": ""}))
        reasoning = piece.reasoning if self._tells_thoughts else ""
        if piece.text or piece.logprobs or reasoning:
            logprobs = self._logprobs(index, piece.logprobs)
            delta = {} if reasoning and not piece.text else {"content": piece.text}
            found.append(_delta(index, {**(_thoughts(reasoning) if reasoning else {}), **delta}, logprobs))
        if piece.finish is not None:
            end = {"finish_reason": piece.finish, "stop_reason": piece.stop_reason}
            found.append({**_delta(index, {}), **end})
        return found

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return self._writers[index].chat(entries) if self._writers is not None else None


def _thoughts(reasoning: str | None) -> dict[str, Any]:
    """By DeepSeek's name, which clients know best, and by vLLM's and mlx-lm's newer one."""
    return {"reasoning_content": reasoning, "reasoning": reasoning}


def _delta(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


@router.post("/v1/chat/completions", responses=EVENT_STREAM)
async def create_chat_completion(
    body: ChatBody, http: Request, state: StateDep, tenant: TenantDep
) -> Response:
    """OpenAI's chat completions; vLLM's `top_k`, `min_p`, `ignore_eos`, `chat_template_kwargs` and
    `mm_processor_kwargs` beside them."""
    turn = await begin_turn(state, http, body, tenant, id=new_id("chatcmpl"), endpoint="chat")
    if turn is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    writer = ChoicesWriter(
        turn,
        ChatFormat(turn, body.prompt_logprobs),
        wants_usage=body.wants_usage_chunk,
        is_continuous=body.wants_continuous_usage,
    )
    responder = Responder(turn, writer, http.receive, state.config.stream_keep_alive_s)
    return await responder.stream() if body.stream else await responder.whole()
