"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.api.generation import Generation, build_requests, new_id
from serve.api.logprobs import TokenTexts, chat_logprobs
from serve.api.schemas import ChatBody
from serve.api.services import ServicesDep
from serve.api.streaming import Answer, Responder
from serve.api.targets import held_target
from serve.engine.request import Event

router = APIRouter()


class ChatFormat:
    """Messages; a stream says the role first and the finish in a chunk of its own."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, texts: TokenTexts, has_logprobs: bool) -> None:
        self._texts = texts
        self._has_logprobs = has_logprobs
        self._begun: set[int] = set()

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        logprobs = chat_logprobs(answer.logprobs, self._texts) if self._has_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish}

    def deltas(self, index: int, event: Event) -> Sequence[dict[str, Any]]:
        found = []
        if index not in self._begun:
            self._begun.add(index)
            found.append(_delta(index, {"role": "assistant", "content": ""}))
        if event.text or event.logprobs:
            logprobs = chat_logprobs(event.logprobs, self._texts) if self._has_logprobs else None
            found.append(_delta(index, {"content": event.text}, logprobs))
        if event.finish is not None:
            found.append({**_delta(index, {}), "finish_reason": event.finish})
        return found


def _delta(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


@router.post("/v1/chat/completions")
async def create_chat_completion(body: ChatBody, http: Request, services: ServicesDep) -> Response:
    """OpenAI's chat completions; vLLM's `top_k`, `min_p`, `ignore_eos` and `chat_template_kwargs` beside them."""
    id = new_id("chatcmpl")
    runtime = services.runtime
    with held_target(runtime, body.model, body.user or id) as target:
        messages = [message.for_template() for message in body.messages]
        variables = body.chat_template_kwargs or {}
        prompt = await services.prompts.of_messages(
            messages,
            variables,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
        )
        requests = build_requests(services, id, body, [prompt], target)
        generation = Generation(services, id, "chat", target, requests)
    format = ChatFormat(services.texts, body.num_logprobs is not None)
    responder = Responder(generation, format, len(prompt), http.receive)
    if body.stream:
        return await responder.stream(wants_usage=body.wants_usage_chunk)
    return await responder.whole()
