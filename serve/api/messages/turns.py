"""Messages in Anthropic's words → the turns of a chat in OpenAI's.

Turns of one role that follow each other become one. Results of tools become turns of their own, also where their own
server ran them in the midst of an answer; pictures in them stand in the user's turn after them, and what the system
says later on is said in the user's turn where it stands, since many templates take a system's turn at the beginning
only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from serve.api.messages.blocks import (
    AnthropicMessage,
    DocumentBlock,
    ImageBlock,
    SearchResultBlock,
    TextBlock,
    ThinkingBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from serve.api.messages.hosted import HostedResultBlock, HostedUseBlock

CALLS = (ToolUseBlock, HostedUseBlock)
AT = "at"
"""Under which a turn, or a part of media, says where in the body it was said."""
BILLING = "x-anthropic-billing-header:"
"""How a line begins that Claude Code puts before the system's words, other with each request: nothing in it is for
the model, and no prompt would begin as another does."""
BETWEEN = "\n\n"
"""What stands between two blocks of text."""
FAILED = "Error: "
PICTURE_BELOW = "[image: see below]"


class _Said(NamedTuple):
    """A block, and where it stands."""

    at: str
    block: Any


class _Turn(NamedTuple):
    """Messages that follow each other, of an assistant or of others."""

    messages: Sequence[tuple[int, AnthropicMessage]]
    """With their numbers in the body."""

    @property
    def at(self) -> str:
        """Where it begins."""
        return f"messages.{self.messages[0][0]}"

    @property
    def blocks(self) -> Iterator[_Said]:
        """Of all its messages; what the system says stands in its mark."""
        for number, message in self.messages:
            for place, block in enumerate(message.blocks):
                if message.role == "system":
                    block = TextBlock(type="text", text=f"<system>\n{block.text}\n</system>")
                yield _Said(f"messages.{number}.content.{place}", block)


def turns_of(
    system: str | Sequence[TextBlock] | None, messages: Sequence[AnthropicMessage]
) -> list[dict[str, Any]]:
    """As ChatBody's `messages`, but for AT."""
    return [*_system(system, messages), *_turns(messages)]


def _system(
    system: str | Sequence[TextBlock] | None, messages: Sequence[AnthropicMessage]
) -> list[dict[str, Any]]:
    """The system's turn, of what it says before anybody else does."""
    first = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
    blocks = () if isinstance(system, str) else system or ()
    texts = [system] if isinstance(system, str) else [block.text for block in blocks]
    texts += [block.text for message in messages[:first] for block in message.blocks]
    kept = [text for text in texts if text and not text.startswith(BILLING)]
    return [{"role": "system", "content": BETWEEN.join(kept), AT: "system"}] if kept else []


def _turns(messages: Sequence[AnthropicMessage]) -> Iterator[dict[str, Any]]:
    """What comes after the system's turn."""
    rest = list(_after_system(messages))
    blocks = (block for _, message in rest for block in message.blocks)
    names = {block.id: block.name for block in blocks if isinstance(block, CALLS)}
    for is_answer, run in groupby(rest, lambda each: each[1].role == "assistant"):
        turn = _Turn([*run])
        yield from _answer(turn, names) if is_answer else _asked(turn, names)


def _after_system(messages: Sequence[AnthropicMessage]) -> Iterator[tuple[int, AnthropicMessage]]:
    """Messages but for what the system says first, and what of it is over, with their numbers."""
    last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
    has_begun = False
    for i, message in enumerate(messages):
        has_begun = has_begun or message.role != "system"
        is_over = message.clear_at == "next_user_message" and last_user > i
        if has_begun and not is_over:
            yield i, message


def _answer(turn: _Turn, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """An assistant's turn. What came of calls that its server ran stands between what was said before and after."""
    said: list[_Said] = []
    has_results = False
    for each in turn.blocks:
        block = each.block
        if not isinstance(block, HostedResultBlock):
            said.append(each)
            continue
        if said:
            yield {**_spoken(said), AT: turn.at}
        said, has_results = [], True
        yield _told(block, _failed(block.text) if block.is_error else block.text, names, each.at)
    if said or not has_results:
        yield {**_spoken(said), AT: turn.at}


def _spoken(said: Sequence[_Said]) -> dict[str, Any]:
    """What was thought, said and called. Blocks of text in one message are one: they may have been cut anywhere."""
    texts = [
        "".join(each.block.text for each in of_message if isinstance(each.block, TextBlock))
        for _, of_message in groupby(said, lambda each: each.at.partition(".content.")[0])
    ]
    blocks = [block for _, block in said]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock) and block.thinking]
    calls = [
        {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}
        for block in blocks
        if isinstance(block, CALLS)
    ]
    found: dict[str, Any] = {"role": "assistant", "content": BETWEEN.join(text for text in texts if text)}
    if thoughts:
        found["reasoning_content"] = BETWEEN.join(thoughts)
    if calls:
        found["tool_calls"] = calls
    return found


def _told(
    block: ToolResultBlock | HostedResultBlock, said: str, names: Mapping[str, str], at: str
) -> dict[str, Any]:
    """The turn of a tool."""
    id = block.tool_use_id
    named = {"name": names[id]} if id in names else {}
    return {"role": "tool", "tool_call_id": id, "content": said, **named, AT: at}


def _asked(turn: _Turn, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """A user's turn, with the results of tools before it."""
    shown: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    has_results = False
    for at, block in turn.blocks:
        if not isinstance(block, ToolResultBlock):
            asked += _parts(block, at)
            continue
        has_results = True
        said, pictures = _result(block, at)
        shown += pictures
        yield _told(block, said, names, at)
    parts = list(_joined([*shown, *asked]))
    if parts or not has_results:
        is_text = all(part["type"] == "text" for part in parts)
        content = "".join(part["text"] for part in parts) if is_text else parts
        yield {"role": "user", "content": content, AT: turn.at}


def _parts(block: Any, at: str) -> Iterator[dict[str, Any]]:
    """What a block says and shows, as parts of a chat's content."""
    match block:
        case TextBlock():
            yield _text(block.text)
        case ImageBlock():
            yield {"type": "image_url", "image_url": {"url": block.source.address}, AT: at}
        case DocumentBlock():
            head = "\n".join(line for line in (block.title, block.context) if line)
            inside = block.source.parts
            yield from [_text(head)] if head else []
            for number, inner in enumerate(inside):
                yield from _parts(inner, f"{at}.source.content.{number}")
        case SearchResultBlock():
            yield _text(f"{block.title}\n{block.source}")
            yield from (_text(each.text) for each in block.content)
        case ToolReferenceBlock():
            yield _text(f"The tool {block.tool_name} is there now.")


def _result(block: ToolResultBlock, at: str) -> tuple[str, list[dict[str, Any]]]:
    """What a tool says, and the pictures that it shows."""
    parts = [
        part for number, each in enumerate(block.parts) for part in _parts(each, f"{at}.content.{number}")
    ]
    pictures = [part for part in parts if part["type"] != "text"]
    texts = [part["text"] if part["type"] == "text" else PICTURE_BELOW for part in parts]
    said = BETWEEN.join(text for text in texts if text)
    return _failed(said) if block.is_error else said, pictures


def _failed(said: str) -> str:
    """The same, which says that it is an error."""
    return said if said.lower().startswith(("error", "<tool_use_error>")) else FAILED + said


def _joined(parts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The parts, of which no two that follow each other are text, and none is empty."""
    for is_text, run in groupby(parts, lambda part: part["type"] == "text"):
        if not is_text:
            yield from run
        elif joint := BETWEEN.join(part["text"] for part in run if part["text"]):
            yield _text(joint)


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
