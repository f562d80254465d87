"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.api.body import JsonRoute
from serve.api.generation import Generation, build_requests, logprob_writers, new_id
from serve.api.logprobs import LogprobWriter
from serve.api.schemas import CompletionBody
from serve.api.services import Services, ServicesDep
from serve.api.streaming import EVENT_STREAM, Answer, Responder
from serve.api.targets import held_target
from serve.api.tenant import TenantDep
from serve.engine.request import Event, FinishReason, TokenLogprob
from serve.model.prompt import Prompt

router = APIRouter(route_class=JsonRoute)


class CompletionFormat:
    """Plain text; choices are numbered over prompts, then over n."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, writers: Sequence[LogprobWriter] | None) -> None:
        """`writers`: one a choice, where log-probabilities are wanted."""
        self._writers = writers

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self._choice(index, answer.text, answer.logprobs, answer.finish, answer.stop_reason)

    def deltas(self, index: int, event: Event) -> Sequence[dict[str, Any]]:
        if not (event.text or event.logprobs or event.finish):
            return []
        return [self._choice(index, event.text, event.logprobs, event.finish, event.stop_reason)]

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob],
        finish: FinishReason | None,
        stop_reason: str | None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._writers[index].completion(logprobs) if self._writers is not None else None,
            "finish_reason": finish,
            "stop_reason": stop_reason,
        }


@router.post("/v1/completions", responses=EVENT_STREAM)
async def create_completion(
    body: CompletionBody, http: Request, services: ServicesDep, tenant: TenantDep
) -> Response:
    """OpenAI's completions, with prompts as text or token ids; vLLM's `top_k`, `min_p`, `ignore_eos` beside them."""
    id = new_id("cmpl")
    async with held_target(services, body.model, body.user or id) as target:
        prompts = await services.tokenize(lambda: [_encode(services, prompt) for prompt in body.prompts])
        requests = await build_requests(
            services,
            id,
            body,
            [Prompt(prompt) for prompt in prompts],
            target,
            tenant=tenant,
            continues_prompt=True,
        )
        generation = Generation(services, id, "completions", target, requests, body.n or 1)
    format = CompletionFormat(logprob_writers(services, requests))
    keep_alive_s = services.runtime.config.stream_keep_alive_s
    responder = Responder(generation, format, sum(map(len, prompts)), http.receive, keep_alive_s)
    if body.stream:
        return await responder.stream(
            wants_usage=body.wants_usage_chunk, is_continuous=body.wants_continuous_usage
        )
    return await responder.whole()


def _encode(services: Services, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return services.prompts.of_text(prompt)
    return tuple(prompt)
