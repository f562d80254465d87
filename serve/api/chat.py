"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.api.answer import Answer, Finish, Piece, RanCall
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
from serve.tools.call import Call, CallPiece

router = APIRouter(route_class=JsonRoute)


class ChatFormat:
    """Messages; a stream says the role first and the finish in a chunk of its own."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, turn: Turn, prompt_logprobs: int | None, *, uses_functions: bool = False) -> None:
        """prompt_logprobs: so many of the prompt's, if any. uses_functions: calls are told in the older words."""
        self._uses_functions = uses_functions
        self._tells_thoughts = turn.tells_thoughts
        self._writers = turn.logprobs
        self._tokens = turn.target.services.runtime.engine.token_bytes
        self._prompt_logprobs = prompt_logprobs
        self._begun: set[int] = set()

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.calls:
            message["content"] = answer.text or None
            message |= self._called(answer.calls)
        if answer.ran:
            message["mcp_calls"] = [_ran(call) for call in answer.ran]
        if self._tells_thoughts:
            message |= _thoughts(answer.reasoning or None)
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(index, answer.logprobs),
            "finish_reason": self._finish(answer.finish),
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
            delta = {} if not piece.text and (reasoning or piece.calls) else {"content": piece.text}
            found.append(_delta(index, {**(_thoughts(reasoning) if reasoning else {}), **delta}, logprobs))
        found += [_delta(index, self._call_delta(call)) for call in _merged(piece.calls)]
        if piece.ran:
            found.append(_delta(index, {"mcp_calls": [_ran(call) for call in piece.ran]}))
        if piece.finish is not None:
            end = {"finish_reason": self._finish(piece.finish), "stop_reason": piece.stop_reason}
            found.append({**_delta(index, {}), **end})
        return found

    def _called(self, calls: Sequence[Call]) -> dict[str, Any]:
        """Of a message; in the older words an answer calls one function."""
        if self._uses_functions:
            return {"function_call": {"name": calls[0].name, "arguments": calls[0].arguments}}
        return {"tool_calls": [_call(call) for call in calls]}

    def _call_delta(self, piece: CallPiece) -> dict[str, Any]:
        function: dict[str, Any] = {"arguments": piece.arguments}
        if piece.name is not None:
            function = {"name": piece.name, **function}
        if self._uses_functions:
            return {"function_call": function}
        begun = {"id": piece.id, "type": "function"} if piece.id is not None else {}
        return {"tool_calls": [{"index": piece.index, **begun, "function": function}]}

    def _finish(self, finish: Finish | None) -> str | None:
        return "function_call" if finish == "tool_calls" and self._uses_functions else finish

    def _logprobs(self, index: int, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        return self._writers[index].chat(entries) if self._writers is not None else None


def _call(call: Call) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _ran(call: RanCall) -> dict[str, Any]:
    """As the items of OpenAI's responses say it."""
    return {
        "id": call.id,
        "type": "mcp_call",
        "server_label": call.server,
        "name": call.name,
        "arguments": call.arguments,
        "output": call.output,
    }


def _merged(pieces: Sequence[CallPiece]) -> list[CallPiece]:
    """Pieces that came at once, those of a call joined; the first of each, which names it, stands alone, as clients
    know streams."""
    merged: list[CallPiece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last is not None and last.index == piece.index and last.id is None:
            merged[-1] = replace(last, arguments=last.arguments + piece.arguments)
        else:
            merged.append(piece)
    return merged


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
        ChatFormat(turn, body.prompt_logprobs, uses_functions=body.uses_functions),
        wants_usage=body.wants_usage_chunk,
        is_continuous=body.wants_continuous_usage,
    )
    responder = Responder(turn, writer, http.receive, state.config.stream_keep_alive_s)
    return await responder.stream() if body.stream else await responder.whole()
