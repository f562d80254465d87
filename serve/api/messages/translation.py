"""A body in Anthropic's words in, the ChatBody that means the same out.

Turns of one role that follow each other become one. Results of tools become turns of their own, pictures in them
stand in the user's turn after them, and what the system says later on is said in the user's turn where it stands,
since many templates take a system's turn at the beginning only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from pydantic import ValidationError

from serve.api.messages.blocks import (
    DocumentBlock,
    ImageBlock,
    Message,
    SearchResultBlock,
    TextBlock,
    ThinkingBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from serve.api.messages.body import PromptBody
from serve.api.messages.tools import choice_for_chat, offered
from serve.api.schemas import ChatBody, GenerationBody
from serve.errors import RequestError

BILLING = "x-anthropic-billing-header:"
"""How a line begins that Claude Code puts before the system's words, other with each request: nothing in it is for
the model, and no prompt would begin as another does."""
BETWEEN = "\n\n"
"""What stands between two blocks of text."""
FAILED = "Error: "
PICTURE_BELOW = "[image: see below]"
EFFORTS = {"max": "xhigh"}
"""Words that OpenAI has not."""
EXTRAS = ("mm_processor_kwargs", "chat_template_kwargs")
"""A chat's fields that are taken as they are, beside those of every body."""
OWN = ("stop", "max_tokens", "n", "model", "user", "stream")
"""Those that are written anew."""


class WishedBody(ChatBody):
    """A chat whose client wishes for thoughts, whatever the model is."""

    insists_on_thinking: ClassVar[bool] = False


def chat_body(body: PromptBody) -> WishedBody:
    """The same request. RequestError names the field that cannot be served."""
    messages = [*_system(body), *_turns(body.messages)]
    if not messages:
        raise RequestError("messages: nobody says anything in them", "messages")
    taken = {*GenerationBody.model_fields, *EXTRAS} - {*OWN}
    fields: dict[str, Any] = {name: getattr(body, name) for name in taken & body.model_fields_set}
    fields |= {"model": body.model, "messages": messages, **_tools(body), **_thinking(body)}
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
    if messages[-1]["role"] == "assistant":
        if messages[-1].get("tool_calls"):
            raise RequestError(
                f"messages.{len(body.messages) - 1}: the last turn calls tools; their results come next",
                "messages",
            )
        fields["continue_final_message"] = True
    return _made(fields)


def _made(fields: dict[str, Any]) -> WishedBody:
    try:
        return WishedBody.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, RequestError):
            raise cause from None
        place = ".".join(map(str, problem["loc"])) or "the body"
        raise RequestError(
            f"{place}: {problem['msg']}", str(problem["loc"][0]) if problem["loc"] else None
        ) from None


def _tools(body: PromptBody) -> dict[str, Any]:
    blocks = (block for message in body.messages for block in message.blocks)
    results = (block for block in blocks if isinstance(block, ToolResultBlock))
    referred = {
        part.tool_name for block in results for part in block.parts if isinstance(part, ToolReferenceBlock)
    }
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
        found["reasoning_effort"] = EFFORTS.get(effort, effort)
    said = body.chat_template_kwargs or {}
    return {name: value for name, value in found.items() if name not in said}


# Turns


def _system(body: PromptBody) -> list[dict[str, Any]]:
    """The system's turn, of what it says before anybody else does."""
    first = next(
        (i for i, message in enumerate(body.messages) if message.role != "system"), len(body.messages)
    )
    texts = [*_texts(body.system), *(text for each in body.messages[:first] for text in _texts(each.content))]
    return [{"role": "system", "content": BETWEEN.join(texts)}] if texts else []


def _texts(said: str | Sequence[Any] | None) -> list[str]:
    blocks: Sequence[Any] = () if isinstance(said, str) else said or ()
    texts = [said] if isinstance(said, str) else [block.text for block in blocks]
    return [text for text in texts if text and not text.startswith(BILLING)]


def _turns(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """What comes after the system's turn."""
    rest = list(_after_system(messages))
    names = {
        block.id: block.name for each in rest for block in each.blocks if isinstance(block, ToolUseBlock)
    }
    begun = 0
    while begun < len(rest):
        is_answer = rest[begun].role == "assistant"
        end = begun
        while end < len(rest) and (rest[end].role == "assistant") == is_answer:
            end += 1
        turn = rest[begun:end]
        yield from [_answer(turn)] if is_answer else _asked(turn, names)
        begun = end


def _after_system(messages: Sequence[Message]) -> Iterator[Message]:
    """Messages but for what the system says first, and what of it is over."""
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    has_begun = False
    for i, message in enumerate(messages):
        has_begun = has_begun or message.role != "system"
        is_over = message.clear_at == "next_user_message" and bool(users) and users[-1] > i
        if has_begun and not is_over:
            yield message


def _answer(turn: Sequence[Message]) -> dict[str, Any]:
    """An assistant's turn. Blocks of text in one message are one text: they may have been cut anywhere."""
    texts = ["".join(block.text for block in each.blocks if isinstance(block, TextBlock)) for each in turn]
    blocks = [block for message in turn for block in message.blocks]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock) and block.thinking]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in blocks
        if isinstance(block, ToolUseBlock)
    ]
    found: dict[str, Any] = {"role": "assistant", "content": BETWEEN.join(text for text in texts if text)}
    if thoughts:
        found["reasoning_content"] = BETWEEN.join(thoughts)
    if calls:
        found["tool_calls"] = calls
    return found


def _asked(turn: Sequence[Message], names: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A user's turn, with the results of tools before it."""
    shown: list[dict[str, Any]] = []
    for message in turn:
        for block in message.blocks:
            if isinstance(block, ToolResultBlock):
                result, pictures = _result(block)
                shown += pictures
                named = {"name": names[block.tool_use_id]} if block.tool_use_id in names else {}
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": result, **named}
    asked = [part for message in turn for part in _parts_of(message)]
    has_results = any(isinstance(block, ToolResultBlock) for message in turn for block in message.blocks)
    parts = list(_joined([*shown, *asked]))
    if parts or not has_results:
        is_text = all(part["type"] == "text" for part in parts)
        yield {"role": "user", "content": parts[0]["text"] if is_text and parts else parts or ""}


def _parts_of(message: Message) -> Iterator[dict[str, Any]]:
    for block in message.blocks:
        if message.role == "system":
            yield _text(f"<system>\n{block.text}\n</system>")
        elif not isinstance(block, ToolResultBlock):
            yield from _parts(block)


def _parts(block: Any) -> Iterator[dict[str, Any]]:
    """What a block shows, as parts of a chat's content."""
    match block:
        case TextBlock():
            yield _text(block.text)
        case ImageBlock():
            yield {"type": "image_url", "image_url": {"url": block.source.address}}
        case DocumentBlock():
            head = "".join(f"{line}\n" for line in (block.title, block.context) if line)
            source = block.source
            if source.type == "text":
                yield _text(head + source.data)
            elif isinstance(source.content, str):
                yield _text(head + source.content)
            else:
                yield from [_text(head.rstrip("\n"))] if head else []
                for inner in source.content:
                    yield from _parts(inner)
        case SearchResultBlock():
            yield _text(
                BETWEEN.join([f"{block.title}\n{block.source}", *(each.text for each in block.content)])
            )
        case ToolReferenceBlock():
            yield _text(f"The tool {block.tool_name} is there now.")


def _result(block: ToolResultBlock) -> tuple[str, list[dict[str, Any]]]:
    """What a tool says, and the pictures that it shows."""
    parts = [part for each in block.parts for part in _parts(each)]
    pictures = [part for part in parts if part["type"] != "text"]
    texts = [part["text"] if part["type"] == "text" else PICTURE_BELOW for part in parts]
    said = BETWEEN.join(text for text in texts if text)
    if block.is_error and not said.lower().startswith(("error", "<tool_use_error>")):
        said = FAILED + said
    return said, pictures


def _joined(parts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Parts, of which no two that follow each other are text, and none is empty."""
    texts: list[str] = []
    for part in parts:
        if part["type"] == "text":
            texts += [part["text"]] if part["text"] else []
            continue
        if texts:
            yield _text(BETWEEN.join(texts))
            texts = []
        yield part
    if texts:
        yield _text(BETWEEN.join(texts))


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
