"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastapi import APIRouter, Request, Response

from serve.api.answer import Answer, Finish, Piece
from serve.api.body import JsonRoute
from serve.api.choices import ChoicesWriter
from serve.api.generation import Generation, build_requests, logprob_writers, new_id
from serve.api.leaving import ClientGoneError, has_left
from serve.api.logprobs import prompt_logprobs
from serve.api.schemas import CompletionBody
from serve.api.services import Services
from serve.api.state import AppState, StateDep
from serve.api.streaming import EVENT_STREAM, Responder
from serve.api.targets import Target, held_target, let_others_begin
from serve.api.tenant import TenantDep
from serve.api.turn import Turn
from serve.engine.request import Request as EngineRequest
from serve.engine.request import TokenLogprob
from serve.engine.text import TextDecoder
from serve.errors import RequestError
from serve.model.prompt import Prompt
from serve.model.token_bytes import TokenBytes

router = APIRouter(route_class=JsonRoute)


class Echoed(NamedTuple):
    """A prompt as it stands before its answer."""

    text: str
    token_ids: Sequence[int]


class CompletionFormat:
    """Plain text; choices are numbered over prompts, then over n."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, body: CompletionBody, prompts: Sequence[Echoed], turn: Turn) -> None:
        """`prompts`: one a choice."""
        self._prompts = prompts
        self._writers = turn.logprobs
        self._tokens = turn.target.services.runtime.engine.token_bytes
        self._echoes = bool(body.echo)
        self._is_answered = body.max_tokens != 0
        self._prompt_logprobs = body.prompt_logprobs
        self._begun: set[int] = set()

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        found = self._choice(
            index, answer.text, answer.logprobs, answer.prompt_logprobs, answer.finish, answer.stop_reason
        )
        if self._prompt_logprobs is not None:
            entries = answer.prompt_logprobs
            found["prompt_logprobs"] = prompt_logprobs(self._tokens, entries, self._prompt_logprobs)
        return found

    def extra(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {}

    def deltas(self, index: int, piece: Piece) -> Sequence[dict[str, Any]]:
        if not (piece.text or piece.logprobs or piece.finish or piece.token_ids):
            return []
        found = self._choice(
            index, piece.text, piece.logprobs, piece.prompt_logprobs, piece.finish, piece.stop_reason
        )
        return [found] if found["text"] or piece.logprobs or piece.finish else []

    def _choice(
        self,
        index: int,
        text: str,
        logprobs: Sequence[TokenLogprob],
        of_prompt: Sequence[TokenLogprob],
        finish: Finish | None,
        stop_reason: str | int | None,
    ) -> dict[str, Any]:
        is_first = index not in self._begun
        self._begun.add(index)
        if not self._is_answered:
            text, logprobs, stop_reason = "", (), None
            finish = None if finish is None else "length"
        written = None
        if self._writers is not None:
            writer = self._writers[index]
            prompt_ids = self._prompts[index].token_ids
            parts = [writer.prompt(prompt_ids, of_prompt)] if self._echoes and is_first else []
            parts.append(writer.completion(logprobs))
            written = {name: [value for part in parts for value in part[name]] for name in parts[0]}
        return {
            "index": index,
            "text": self._prompts[index].text + text if self._echoes and is_first else text,
            "logprobs": written,
            "finish_reason": finish,
            "stop_reason": stop_reason,
        }


@router.post("/v1/completions", responses=EVENT_STREAM)
async def create_completion(
    body: CompletionBody, http: Request, state: StateDep, tenant: TenantDep
) -> Response:
    """OpenAI's completions, with prompts as text or token ids; vLLM's `top_k`, `min_p`, `ignore_eos` beside them."""
    turn, prompts = await begin_completion(
        state, http, body, tenant, id=new_id("cmpl"), endpoint="completions"
    )
    tokens = turn.target.services.runtime.engine.token_bytes
    echoed = [Echoed(_text(tokens, *each), each[1]) for each in zip(body.prompts, prompts, strict=True)]
    rows = [prompt for prompt in echoed for _ in range(body.num_drawn)]
    writer = ChoicesWriter(
        turn,
        CompletionFormat(body, rows, turn),
        num_kept=body.n or 1,
        has_answer=body.max_tokens != 0,
        wants_usage=body.wants_usage_chunk,
        is_continuous=body.wants_continuous_usage,
    )
    responder = Responder(turn, writer, http.receive, state.config.stream_keep_alive_s)
    return await responder.stream() if body.stream else await responder.whole()


class Begun(NamedTuple):
    """Completions under way."""

    turn: Turn
    prompts: list[tuple[int, ...]]
    """Their tokens."""


async def begin_completion(
    state: AppState, http: Request, body: CompletionBody, tenant: str, *, id: str, endpoint: str
) -> Begun:
    """The answers to plain prompts under way, as `begin_turn`'s to a chat. ClientGoneError if the client has left."""
    async with held_target(state, body.model, body.user or id, http, body.deadline_s) as target:
        services = target.services
        prompts = await services.tokenize(
            lambda: [_encode(services, prompt) for prompt in body.prompts],
            num_chars=sum(map(len, body.prompts)),
        )
        await let_others_begin(services)
        if has_left(http.receive):
            raise ClientGoneError
        requests = await build_requests(
            id, body, [Prompt(prompt) for prompt in prompts], target, tenant=tenant, continues_prompt=True
        )
        generation = _generation(state, id, endpoint, body, target, requests)
    logprobs = logprob_writers(services, body, requests)
    return Begun(Turn(generation, sum(map(len, prompts)), logprobs=logprobs), prompts)


def _generation(
    state: AppState,
    id: str,
    endpoint: str,
    body: CompletionBody,
    target: Target,
    requests: Sequence[EngineRequest],
) -> Generation:
    """Its rows, submitted. Where there are too many of them, RequestError names what asks for them."""
    try:
        return Generation(state.metrics, id, endpoint, target, requests, body.num_drawn)
    except RequestError as error:
        if error.param == "n" and body.num_drawn > (body.n or 1):
            raise RequestError(f"best_of{str(error).removeprefix('n')}", "best_of") from None
        raise


def _text(tokens: TokenBytes, asked: str | list[int], token_ids: Sequence[int]) -> str:
    """A prompt's text; of token ids what they say."""
    if isinstance(asked, str):
        return asked
    decoder = TextDecoder(tokens)
    return "".join(map(decoder.push, token_ids)) + decoder.finish()


def _encode(services: Services, prompt: str | list[int]) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return services.prompts.of_text(prompt)
    return tuple(prompt)
