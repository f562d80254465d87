"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.api.generation import Generation, build_requests, new_id
from serve.api.logprobs import TokenTexts, completion_logprobs
from serve.api.schemas import CompletionBody
from serve.api.services import Services, ServicesDep
from serve.api.streaming import Answer, Responder
from serve.api.targets import held_target
from serve.engine.request import Event
from serve.errors import RequestError

router = APIRouter()


class CompletionFormat:
    """Plain text; choices are numbered over prompts, then over n."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, texts: TokenTexts, has_logprobs: bool) -> None:
        self._texts = texts
        self._has_logprobs = has_logprobs
        self._offsets: dict[int, int] = {}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        logprobs = completion_logprobs(answer.logprobs, self._texts, 0) if self._has_logprobs else None
        return {"index": index, "text": answer.text, "logprobs": logprobs, "finish_reason": answer.finish}

    def deltas(self, index: int, event: Event) -> Sequence[dict[str, Any]]:
        logprobs = None
        if self._has_logprobs:
            offset = self._offsets.get(index, 0)
            logprobs = completion_logprobs(event.logprobs, self._texts, offset)
            self._offsets[index] = offset + sum(map(len, logprobs["tokens"]))
        if not (event.text or event.logprobs or event.finish):
            return []
        return [{"index": index, "text": event.text, "logprobs": logprobs, "finish_reason": event.finish}]


@router.post("/v1/completions")
async def create_completion(body: CompletionBody, http: Request, services: ServicesDep) -> Response:
    """OpenAI's completions, with prompts as text or token ids; vLLM's `top_k`, `min_p`, `ignore_eos` beside them."""
    id = new_id("cmpl")
    with held_target(services.runtime, body.model, body.user or id) as target:
        prompts = await services.tokenize(lambda: [_encode(services, prompt) for prompt in body.prompts])
        requests = build_requests(services, id, body, prompts, target)
        generation = Generation(services, id, "completions", target, requests)
    format = CompletionFormat(services.texts, body.num_logprobs is not None)
    responder = Responder(generation, format, sum(map(len, prompts)), http.receive)
    if body.stream:
        return await responder.stream(wants_usage=body.wants_usage_chunk)
    return await responder.whole()


def _encode(services: Services, prompt: str | list[int]) -> tuple[int, ...]:
    runtime = services.runtime
    if isinstance(prompt, str):
        return services.prompts.of_text(prompt)
    outside = [token for token in prompt if not 0 <= token < runtime.model.network.vocab_size]
    if outside:
        raise RequestError(
            f"prompt: token id {outside[0]} is not in this model's vocabulary of {runtime.model.network.vocab_size}",
            "prompt",
        )
    return tuple(prompt)
