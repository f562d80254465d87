"""A chat's body in, its answers under way out. No endpoint that chats has another way into generation.

An endpoint of another API writes its body as a ChatBody, begins the turn here, and words the Pieces.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from fastapi import Request

from serve.api.answer import Answer, Piece
from serve.api.fitting import Fitting
from serve.api.generation import Generation, build_requests, logprob_writers, new_id
from serve.api.leaving import ClientGoneError, has_left, unless_gone
from serve.api.logprobs import LogprobWriter
from serve.api.message_bodies import Message
from serve.api.opening import expect_long
from serve.api.prompts import Bounds
from serve.api.schemas import WISHES, ChatBody
from serve.api.services import Services
from serve.api.state import AppState
from serve.api.targets import Target, held_target, let_others_begin
from serve.api.thinking import thinking_of, thinking_variables, thoughts_of
from serve.api.tools import NO_TOOLS, RowReader, ToolUse, tools_of
from serve.engine.thinking import Thinking
from serve.errors import RequestError
from serve.media.processor import Processed
from serve.model.prompt import Prompt
from serve.model.template import ChatTemplate
from serve.model.thoughts import Thoughts
from serve.runtime import Runtime

MESSAGE_CHARS = 50
"""That a message counts for beside its words: what a template does for each takes as long."""


class Asked(NamedTuple):
    """A chat as the engine gets it, and what its answer is read by."""

    prompt: Prompt
    thinking: Thinking | None
    tools: ToolUse


class Turn:
    """The answers to one request, row by row. Whoever has it closes it."""

    def __init__(
        self,
        generation: Generation,
        num_prompt_tokens: int,
        *,
        logprobs: Sequence[LogprobWriter] | None = None,
        tells_thoughts: bool = False,
        tools: ToolUse = NO_TOOLS,
    ) -> None:
        """logprobs: one a row, where log-probabilities are wanted; tells_thoughts: the response is to have them."""
        self.tools = tools
        self._readers: dict[int, RowReader | None] = {}  # by row
        self._ready: deque[tuple[int, Piece]] = deque()
        self.generation = generation
        self.num_prompt_tokens = num_prompt_tokens
        self.logprobs = logprobs
        self.tells_thoughts = tells_thoughts

    @property
    def target(self) -> Target:
        """What answers."""
        return self.generation.target

    @property
    def is_done(self) -> bool:
        """True when every row has had its final piece."""
        return self.generation.is_done and not self._ready

    async def next(self) -> tuple[int, Piece]:
        """What came next, with its row. Raises what the engine ended a row with."""
        if self._ready:
            return self._ready.popleft()
        row, event = await self.generation.next()
        if row not in self._readers:
            self._readers[row] = self.tools.reader()
        reader = self._readers[row]
        if reader is None:
            return row, Piece.of(event)
        first, *rest = reader.read(event)
        if reader.is_over and event.finish is None:
            self.generation.end(row)
        self._ready += ((row, piece) for piece in rest)
        return row, first

    def close(self) -> None:
        """Cancel what still runs; at any time, any number of times."""
        self.generation.close()


async def begin_turn(
    state: AppState, http: Request, body: ChatBody, tenant: str, *, id: str, endpoint: str
) -> Turn | None:
    """The answers to a chat under way; None if the client has left before.

    endpoint  its label in metrics
    RequestError names the field that cannot be served. Nothing here outlives the call: pixels are the engine's to
    drop.
    """
    from serve.api.rounds import RoundsTurn, offered  # which are made of turns

    async def begin(body: ChatBody) -> Turn:
        return await _begun(state, http, body, tenant, id, endpoint)

    try:
        if not body.mcp:
            return await begin(body)
        offer = await unless_gone(http.receive, offered(state.mcp, body))
        turn = await begin(offer.body)
        return RoundsTurn(turn, begin, offer, state.mcp, state.config.mcp_max_rounds)
    except ClientGoneError:
        return None


async def with_offers(state: AppState, http: Request, body: ChatBody) -> ChatBody:
    """The body, which tells of its MCP servers' tools as of functions."""
    from serve.api.rounds import offered  # which are made of turns

    return (await unless_gone(http.receive, offered(state.mcp, body))).body if body.mcp else body


async def prompt_alone(state: AppState, http: Request, body: ChatBody) -> Asked:
    """What a chat would ask of its model, of which nothing is run. RequestError as begin_turn; ClientGoneError."""
    body = await with_offers(state, http, body)
    async with held_target(state, body.model, body.user or new_id("count"), http, body.deadline_s) as target:
        return await prompt_of(target, body, http)


async def _begun(state: AppState, http: Request, body: ChatBody, tenant: str, id: str, endpoint: str) -> Turn:
    async with held_target(state, body.model, body.user or id, http, body.deadline_s) as target:

        async def prompt(chat: ChatBody) -> Asked:
            return await prompt_of(target, chat, http)

        async def answer(chat: ChatBody) -> str:
            expect_long(http)
            # No arm of an experiment has answered with it.
            asks = replace(target, assignment=None)
            turn = await _submitted(
                state, asks, chat, await prompt(chat), tenant, new_id(f"{id}-summary"), "summary"
            )
            return await unless_gone(http.receive, _text_of(turn))

        asked, fitted = await Fitting(target, tenant, prompt, lambda asked: asked.prompt, answer).of(body)
        await let_others_begin(target.services)
        if has_left(http.receive):  # nobody would read what the engine computes
            raise ClientGoneError
        told = replace(target, overflow=fitted.note)
        return await _submitted(state, told, fitted.body, asked, tenant, id, endpoint)


async def _submitted(
    state: AppState, target: Target, body: ChatBody, asked: Asked, tenant: str, id: str, endpoint: str
) -> Turn:
    try:
        requests = await build_requests(
            id,
            body,
            [asked.prompt],
            target,
            tenant=tenant,
            continues_prompt=bool(body.continue_final_message),
            thinking=asked.thinking,
            tools=asked.tools,
        )
        generation = Generation(state.metrics, id, endpoint, target, requests, body.n or 1)
    except RequestError as error:
        if error.param == "prompt":  # the engine's word; a chat has none
            error.param = "messages"
        raise
    return Turn(
        generation,
        len(asked.prompt.token_ids),
        logprobs=logprob_writers(target.services, body, requests),
        tells_thoughts=asked.thinking is not None and body.include_reasoning is not False,
        tools=asked.tools,
    )


async def _text_of(turn: Turn) -> str:
    """The whole answer's, less its thoughts."""
    answer = Answer()
    try:
        while not turn.is_done:
            answer.add((await turn.next())[1])
    finally:
        turn.close()
    return answer.text


async def prompt_of(target: Target, body: ChatBody, http: Request) -> Asked:
    """What a chat asks of the model that answers it, with what it shows.

    RequestError names the field that cannot be served. ClientGoneError if the client has left meanwhile.
    """
    services = target.services
    template = _template(target)
    media = await _look(services, body, http)
    asked = await services.prompts.render(
        lambda bounds: _rendered(services, template, body, media, bounds), num_chars=_num_chars(body)
    )
    return asked._replace(prompt=await services.media.prompt(asked.prompt.token_ids, media))


def _num_chars(body: ChatBody) -> float:
    """That a template is given, of plain messages; whatever else there is counts as no end of them."""
    others = (
        *(body.tools, body.functions, body.chat_template_kwargs, body.continue_final_message),
        *(body.thinking_start_token, body.thinking_end_token),
    )
    if any(others) or body.has_tool_history:
        return math.inf
    return sum(map(_num_chars_of, body.messages))


def _num_chars_of(message: Message) -> float:
    if not isinstance(message.content, str):
        return math.inf
    said = (message.content, message.reasoning_content, message.reasoning, message.name)
    return MESSAGE_CHARS + sum(len(text) for text in said if text)


def _rendered(
    services: Services, template: ChatTemplate, body: ChatBody, media: Sequence[Processed], bounds: Bounds
) -> Asked:
    """All but what the media bring."""
    runtime, prompts = services.runtime, services.prompts
    thoughts, tools = prompts.alone(lambda: _rules(runtime, template, body))
    messages = tools.messages(template, [message.for_template() for message in body.messages])
    token_ids = prompts.of_messages(
        template,
        messages,
        {
            **_wishes(template, body),
            **thinking_variables(runtime, template, thoughts, body),
            **(body.chat_template_kwargs or {}),
        },
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        media=[item.expansion for item in media],
        tools=tools.for_template(template),
        bounds=bounds,
    )
    thinking = thinking_of(runtime, template, thoughts, body, token_ids, tells_calls=tools.is_in_headers)
    return Asked(Prompt(token_ids), thinking, tools)


def _rules(runtime: Runtime, template: ChatTemplate, body: ChatBody) -> tuple[Thoughts | None, ToolUse]:
    """How answers are read. To be called when it is the tokenizer's turn."""
    thoughts = thoughts_of(runtime, template, body)
    return thoughts, tools_of(runtime, template, thoughts, body)


async def _look(services: Services, body: ChatBody, http: Request) -> list[Processed]:
    """What the messages show, made ready. ClientGoneError if the client has left meanwhile."""
    looking = services.media.look(body.messages, body.mm_processor_kwargs)
    if not any(True for message in body.messages for _ in message.shown):
        return await looking
    return await unless_gone(http.receive, looking)


def _template(target: Target) -> ChatTemplate:
    """The template of what answers. RequestError if it has none."""
    template = target.services.runtime.template_of(target.version)
    if not template.exists:
        raise RequestError(
            f"model {target.served!r} has no chat template: neither its tokenizer nor an adapter brings one; send a "
            f"prompt to /v1/completions instead",
            "messages",
        )
    return template


def _wishes(template: ChatTemplate, body: ChatBody) -> dict[str, str]:
    """Those of the body whose variable the template reads."""
    wished = {name: getattr(body, name) for name in WISHES if name in template.variables}
    return {name: wish for name, wish in wished.items() if wish is not None}
