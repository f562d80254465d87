"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from serve.api.body import CLIENT_CLOSED_REQUEST, JsonRoute
from serve.api.generation import Generation, build_requests, logprob_writers, new_id
from serve.api.history import check_tools
from serve.api.logprobs import LogprobWriter, prompt_logprobs
from serve.api.schemas import ChatBody
from serve.api.services import Services, ServicesDep
from serve.api.streaming import EVENT_STREAM, Answer, ClientGoneError, Responder, unless_gone
from serve.api.targets import Target, held_target
from serve.api.tenant import TenantDep
from serve.api.thinking import thinking_of, thinking_variables, thoughts_of
from serve.engine.request import Event, TokenLogprob
from serve.errors import RequestError
from serve.media.processor import Processed
from serve.model.template import ChatTemplate
from serve.model.token_bytes import TokenBytes

EFFORT = "reasoning_effort"

router = APIRouter(route_class=JsonRoute)


class ChatFormat:
    """Messages; a stream says the role first and the finish in a chunk of its own."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self,
        writers: Sequence[LogprobWriter] | None,
        tokens: TokenBytes,
        prompt_logprobs: int | None,
        *,
        tells_thoughts: bool = False,
    ) -> None:
        """writers: one a choice, where log-probabilities are wanted; prompt_logprobs: so many of the prompt's."""
        self._tells_thoughts = tells_thoughts
        self._writers = writers
        self._tokens = tokens
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

    def deltas(self, index: int, event: Event) -> Sequence[dict[str, Any]]:
        found = []
        if index not in self._begun:
            self._begun.add(index)
            found.append(_delta(index, {"role": "assistant", "content": ""}))
        reasoning = event.reasoning if self._tells_thoughts else ""
        if event.text or event.logprobs or reasoning:
            logprobs = self._logprobs(index, event.logprobs)
            delta = {} if reasoning and not event.text else {"content": event.text}
            found.append(_delta(index, {**(_thoughts(reasoning) if reasoning else {}), **delta}, logprobs))
        if event.finish is not None:
            end = {"finish_reason": event.finish, "stop_reason": event.stop_reason}
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
    body: ChatBody, http: Request, services: ServicesDep, tenant: TenantDep
) -> Response:
    """OpenAI's chat completions; vLLM's `top_k`, `min_p`, `ignore_eos`, `chat_template_kwargs` and
    `mm_processor_kwargs` beside them."""
    responder = await _begun(body, http, services, tenant)
    if responder is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if body.stream:
        return await responder.stream(
            wants_usage=body.wants_usage_chunk, is_continuous=body.wants_continuous_usage
        )
    return await responder.whole()


async def _begun(body: ChatBody, http: Request, services: Services, tenant: str) -> Responder | None:
    """The answer under way; None if the client has left before. Nothing here outlives the call: pixels are the
    engine's to drop."""
    id = new_id("chatcmpl")
    async with held_target(services, body.model, body.user or id) as target:
        template = _template(services, target)
        thoughts = await services.tokenize(lambda: thoughts_of(services.runtime, template, body))
        media = await _look(services, body, http)
        if media is None:
            return None
        messages = [message.for_template() for message in body.messages]
        if body.has_tool_history:
            check_tools(template, messages)
        token_ids = await services.prompts.of_messages(
            template,
            messages,
            {
                **_effort(template, body),
                **thinking_variables(services.runtime, template, thoughts, body),
                **(body.chat_template_kwargs or {}),
            },
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            media=[item.expansion for item in media],
        )
        thinking = thinking_of(services.runtime, template, thoughts, body, token_ids)
        requests = await build_requests(
            services,
            id,
            body,
            [await services.media.prompt(token_ids, media)],
            target,
            tenant=tenant,
            continues_prompt=bool(body.continue_final_message),
            thinking=thinking,
        )
        generation = Generation(services, id, "chat", target, requests, body.n or 1)
    tokens = services.runtime.engine.token_bytes
    format = ChatFormat(
        logprob_writers(services, body, requests),
        tokens,
        body.prompt_logprobs,
        tells_thoughts=thinking is not None and body.include_reasoning is not False,
    )
    keep_alive_s = services.runtime.config.stream_keep_alive_s
    return Responder(generation, format, len(token_ids), http.receive, keep_alive_s)


async def _look(services: Services, body: ChatBody, http: Request) -> list[Processed] | None:
    """What the messages show, made ready; None if the client has left meanwhile."""
    looking = services.media.look(body.messages, body.mm_processor_kwargs)
    if not any(True for message in body.messages for _ in message.shown):
        return await looking
    try:
        return await unless_gone(http.receive, looking)
    except ClientGoneError:
        return None


def _template(services: Services, target: Target) -> ChatTemplate:
    """The template of what answers. RequestError if it has none."""
    template = services.runtime.template_of(target.version)
    if not template.exists:
        raise RequestError(
            f"model {target.served!r} has no chat template: neither its tokenizer nor an adapter brings one; send a "
            f"prompt to /v1/completions instead",
            "messages",
        )
    return template


def _effort(template: ChatTemplate, body: ChatBody) -> dict[str, str]:
    """reasoning_effort, where the template reads such a variable."""
    if body.reasoning_effort is None or EFFORT not in template.variables:
        return {}
    return {EFFORT: body.reasoning_effort}
