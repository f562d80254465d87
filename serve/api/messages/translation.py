"""A body in Anthropic's words in, the ChatBody that means the same out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

from serve.api.messages.blocks import ToolReferenceBlock, ToolResultBlock
from serve.api.messages.body import PromptBody
from serve.api.messages.tools import choice_for_chat, offered
from serve.api.messages.turns import AT, turns_of
from serve.api.schemas import ChatBody, GenerationBody
from serve.api.strict import made_of
from serve.errors import RequestError

EXTRAS = ("mm_processor_kwargs", "chat_template_kwargs")
"""A chat's fields that are taken as they are, beside those of every body."""
OWN = ("stop", "max_tokens", "n", "model", "user", "stream")
"""Those that are written anew."""
_TURN = re.compile(r"(?P<turn>messages\.\d+)(?P<part>\.content\.\d+)?")


class WishedBody(ChatBody):
    """A chat whose client wishes for thoughts, whatever the model is."""

    insists_on_thinking: ClassVar[bool] = False


class Translated(NamedTuple):
    """A chat, and where what it says was said."""

    chat: WishedBody
    places: Mapping[str, str]
    """`messages.1`, or `messages.1.content.0` of what is shown → its name in the body that came."""

    @contextmanager
    def named_as_sent(self) -> Iterator[None]:
        """A RequestError that names a turn of the chat, or a part of it, leaves the block with that name."""
        try:
            yield
        except RequestError as error:
            found = _TURN.match(str(error))
            if found is None:
                raise
            turn, part = found["turn"], found["part"] or ""
            place = self.places.get(turn + part) or self.places.get(turn, turn) + part
            named = type(error)(place + str(error)[found.end() :], error.param)
            named.code = error.code
            raise named from None


def chat_of(body: PromptBody) -> Translated:
    """The same request. RequestError names the field that cannot be served."""
    turns = turns_of(body.system, body.messages)
    if not turns:
        raise RequestError("messages: nobody says anything in them", "messages")
    places = _take_places(turns)
    taken = {*GenerationBody.model_fields, *EXTRAS} - {*OWN}
    fields: dict[str, Any] = {name: getattr(body, name) for name in taken & body.model_fields_set}
    fields |= {"model": body.model, "messages": turns, **_tools(body), **_thinking(body)}
    if body.stream is not None:
        fields["stream"] = body.stream
    user = (body.metadata.user_id if body.metadata else None) or body.user
    if user is not None:
        fields["user"] = user
    if body.max_tokens is not None:
        fields["max_tokens"] = max(body.max_tokens, 1)
    stops = body.stops if body.stop_sequences is None else tuple(body.stop_sequences)
    if stops:
        fields["stop"] = list(stops)
    if body.format is not None:
        schema = {"name": "answer", "schema": body.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if turns[-1]["role"] == "assistant":
        if turns[-1].get("tool_calls"):
            at = places[f"messages.{len(turns) - 1}"]
            raise RequestError(f"{at}: the last turn calls tools; their results come next", "messages")
        fields["continue_final_message"] = True
    return Translated(made_of(WishedBody, fields), places)


def _take_places(turns: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Where each turn, and what it shows, was said; taken out of the turns."""
    places = {}
    for index, turn in enumerate(turns):
        places[f"messages.{index}"] = turn.pop(AT)
        for number, part in enumerate(turn["content"] if isinstance(turn["content"], list) else ()):
            if AT in part:
                places[f"messages.{index}.content.{number}"] = part.pop(AT)
    return places


def _tools(body: PromptBody) -> dict[str, Any]:
    blocks = (block for message in body.messages for block in message.blocks)
    results = (block for block in blocks if isinstance(block, ToolResultBlock))
    parts = (part for block in results for part in block.parts)
    referred = {part.tool_name for part in parts if isinstance(part, ToolReferenceBlock)}
    tools = offered(body.tools or (), referred)
    found = {"tools": [tool.for_chat for tool in tools]} if tools else {}
    return found | choice_for_chat(body.tool_choice, tools)


def _thinking(body: PromptBody) -> dict[str, Any]:
    found: dict[str, Any] = {}
    config = body.thinking
    if config is not None and config.type in ("enabled", "disabled"):
        found["enable_thinking"] = config.type == "enabled"
    if config is not None and config.budget_tokens is not None and config.type == "enabled":
        found["thinking_budget"] = config.budget_tokens
    if config is not None and (config.type == "disabled" or config.display == "omitted"):
        found["include_reasoning"] = False
    effort = body.output_config.effort if body.output_config else None
    if effort is not None:
        found["reasoning_effort"] = effort
    said = body.chat_template_kwargs or {}
    return {name: value for name, value in found.items() if name not in said}
