"""A response's body, and what was said before -> a chat under way. What goes wrong is told in the body's names."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import TypeAdapter, ValidationError

from serve.api.responses.body import ResponsesBody
from serve.api.responses.items import Item, ItemReference
from serve.api.responses.messages import Placed, Turn, adapted, turns_of
from serve.api.responses.store import ResponseStore
from serve.api.schemas import ChatBody, TemplatedBody
from serve.api.state import AppState
from serve.api.turn import Turn as Begun
from serve.api.turn import begin_turn, prompt_alone
from serve.errors import ContextLengthError, RequestError

ENDPOINT = "responses"
Given = TypeVar("Given")
OVERFLOW = {"auto": "truncate", "disabled": "error"}
"""What `truncation` says, in a chat's words."""
_NOT_A_CHATS = frozenset(
    {"max_tokens", "n", "prompt_logprobs", "response_format", "stream", "stream_options"}
)
_SHARED = frozenset(TemplatedBody.model_fields) - _NOT_A_CHATS
_ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[Item])
_MESSAGE = re.compile(r"\bmessages\.(\d+)(?:\.content\.(\d+))?(?:\.(?:tool_calls|role|content))?")
_NAMES = (
    ("response_format.json_schema.schema", "text.format.schema"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
    ("reasoning_effort", "reasoning.effort"),
)
"""Names in a chat's body, and in a response's."""
_PARAMS = {"messages": "input", "prompt": "input", "logprobs": "top_logprobs", "verbosity": "text"}


async def begin(
    state: AppState,
    http: Request,
    body: ResponsesBody,
    tenant: str,
    *,
    id: str,
    history: Iterable[dict[str, Any]],
) -> Begun | None:
    """The answer under way; None if the client has left before. RequestError as begin_turn.

    history  the items of what the response goes on from
    """

    async def begun(chat: ChatBody) -> Begun | None:
        return await begin_turn(state, http, chat, tenant, id=id, endpoint=ENDPOINT)

    return await _of_chat(body, _turns(state, body, tenant, history), begun)


async def num_input_tokens(
    state: AppState, http: Request, body: ResponsesBody, tenant: str, history: Iterable[dict[str, Any]]
) -> int:
    """Tokens of the prompt that the body's response would have, before anything is left out of it."""

    async def counted(chat: ChatBody) -> int:
        return len((await prompt_alone(state, http, chat)).prompt.token_ids)

    return await _of_chat(body, _turns(state, body, tenant, history), counted)


def _turns(
    state: AppState, body: ResponsesBody, tenant: str, history: Iterable[dict[str, Any]]
) -> Sequence[Turn]:
    before = [Placed(item, "previous_response_id") for item in _ITEMS.validate_python([*history])]
    return turns_of(body.instructions, [*before, *_own(body, tenant, state.responses.store)])


async def _of_chat(
    body: ResponsesBody, turns: Sequence[Turn], made: Callable[[ChatBody], Awaitable[Given]]
) -> Given:
    """What is made of the chat, with the turns as they are, or else as any template takes them."""
    try:
        return await _made(body, turns, made)
    except ContextLengthError:
        raise
    except RequestError as error:
        other = adapted(turns)
        if other is None:
            raise
        try:
            return await _made(body, other, made)
        except ContextLengthError:
            raise
        except RequestError:
            raise error from None


async def _made(
    body: ResponsesBody, turns: Sequence[Turn], made: Callable[[ChatBody], Awaitable[Given]]
) -> Given:
    try:
        return await made(chat_body(body, turns))
    except RequestError as error:
        raise renamed(error, turns, body) from None


def chat_body(body: ResponsesBody, turns: Sequence[Turn]) -> ChatBody:
    """The chat that `body` asks for. RequestError, in a chat's names, if it is none."""
    effort = body.reasoning.effort if body.reasoning is not None else None
    box = body.toolbox
    fields: dict[str, Any] = {name: getattr(body, name) for name in body.model_fields_set & _SHARED}
    fields["messages"] = [turn.said for turn in turns]
    fields |= box.said
    if box.offered and body.parallel_tool_calls is not None:
        fields["parallel_tool_calls"] = body.parallel_tool_calls
    if body.max_output_tokens is not None:
        fields["max_completion_tokens"] = body.max_output_tokens
    if body.text is not None and body.text.response_format is not None:
        fields["response_format"] = body.text.response_format
    if body.truncation is not None:
        fields["context_overflow"] = OVERFLOW[body.truncation]
    elif body.context_overflow is not None:
        fields["context_overflow"] = body.context_overflow
    if effort is not None:
        fields["reasoning_effort"] = effort
    if body.text is not None and body.text.verbosity is not None:
        fields["verbosity"] = body.text.verbosity
    if body.num_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": body.num_logprobs}
    try:
        chat = ChatBody.model_validate(fields)
    except ValidationError as error:
        raise _first_problem(error) from None
    chat._read_s = body._read_s
    return chat


def renamed(error: RequestError, turns: Sequence[Turn], body: ResponsesBody) -> RequestError:
    """The error in the names of a response's body."""

    def place(found: re.Match[str]) -> str:
        turn = turns[int(found[1])]
        part = int(found[2] or 0)
        return turn.part_places[part] if found[2] and part < len(turn.part_places) else turn.place

    def translated(text: str) -> str:
        text = _MESSAGE.sub(place, text)
        for theirs, ours in _NAMES:
            text = text.replace(theirs, ours)
        offered = [each.place for each in body.toolbox.offered.values()]
        return re.sub(
            r"\btools\.(\d+)(?:\.function)*",
            lambda found: offered[int(found[1])] if int(found[1]) < len(offered) else found[0],
            text,
        )

    message = translated(str(error)).removeprefix("messages: ")
    param = error.param
    if param is not None:
        param = _PARAMS.get(param) or translated(param)
        param = param.partition(".")[0] if param.startswith(("text.", "reasoning.")) else param
    new = type(error)(message, param)
    new.code = error.code
    return new


def _own(body: ResponsesBody, tenant: str, store: ResponseStore) -> list[Placed]:
    """The body's own items; what is referred to stands in the reference's place."""
    if isinstance(body.input, str):
        words = {"role": "user", "content": body.input}
        return [Placed(item, "input") for item in _ITEMS.validate_python([words])]
    placed = []
    for number, item in enumerate(body.input or ()):
        place = f"input.{number}"
        if isinstance(item, ItemReference):
            found = store.item(tenant, item.id)
            if found is None:
                raise RequestError(
                    f"{place}.id: there is no item {item.id!a:.120}: it was not stored, or is no more; send the item "
                    "itself",
                    "input",
                )
            item = _ITEMS.validate_python([found])[0]
        placed.append(Placed(item, place))
    return placed


def _first_problem(error: ValidationError) -> RequestError:
    """What a chat's body says of a field that a response's let through."""
    problem = error.errors()[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, RequestError) and len(problem["loc"]) < 2:
        return cause
    names = [str(part) for part in problem["loc"]]
    said = str(cause) if isinstance(cause, RequestError) else problem["msg"]
    return RequestError(f"{'.'.join(names)}: {said}", names[0] if names else None)
