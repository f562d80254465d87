"""Items of a conversation -> a chat's messages, each with the place in the body that it comes from.

Thoughts, words and calls that follow each other are one turn of the assistant's, as they were when a model wrote
them, so what was computed for it is found again. Instructions, and what systems and developers say before anybody
else, are one message: many templates take a system's message first, and once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from serve.api.parts import TextPart
from serve.api.responses.items import (
    ActionItem,
    CallOutputItem,
    Contents,
    CustomToolCallItem,
    FunctionCallItem,
    HostedCallItem,
    InputFile,
    InputText,
    McpCallItem,
    MessageItem,
    PassedItem,
    ReasoningItem,
    Refusal,
    ShellOutputItem,
)
from serve.api.strict import Body

SYSTEMS = ("system", "developer")
CALLS = (FunctionCallItem, CustomToolCallItem, ActionItem)
RESULTS = (CallOutputItem, ShellOutputItem)
_WORDS = (InputText, TextPart, Refusal, InputFile)


@dataclass(frozen=True)
class Placed:
    """An item and where the body has it: `input.3`, or the field that brought it."""

    item: Body
    place: str


@dataclass
class Turn:
    """One message of a chat."""

    role: str
    place: str
    content: str | list[dict[str, Any]] = ""
    part_places: list[str] = field(default_factory=list)
    """Of each part of `content`."""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    call_id: str | None = None
    """Of the call whose result it is."""
    has_words: bool = False

    @property
    def said(self) -> dict[str, Any]:
        """As a chat's body has it."""
        said: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            said["reasoning_content"] = self.reasoning
        if self.calls:
            said["tool_calls"] = self.calls
        if self.call_id is not None:
            said["tool_call_id"] = self.call_id
        return said

    @property
    def shows(self) -> bool:
        """True if it holds more than words."""
        return isinstance(self.content, list) and any(part["type"] != "text" for part in self.content)


def turns_of(instructions: str | None, items: Iterable[Placed]) -> list[Turn]:
    """The messages of a conversation."""
    turns: list[Turn] = []
    if instructions:
        turns.append(Turn("system", "instructions", instructions, ["instructions"]))
    for placed in _paired(list(items)):
        _add(turns, placed)
    return turns


def _paired(items: Sequence[Placed]) -> Iterator[Placed]:
    """The items, results behind the calls that they are of: Codex's hooks write a developer's message between them,
    and templates know a result by the turn that it follows."""
    behind: dict[str, int] = {}
    moved: dict[int, list[Placed]] = {}
    for number, placed in enumerate(items):
        item = placed.item
        if isinstance(item, CALLS):
            behind[item.call_id] = _end_of_turn(items, number)
        elif isinstance(item, RESULTS) and number > behind.get(item.of_call, number):
            moved.setdefault(behind[item.of_call], []).append(placed)
    taken = {id(placed) for late in moved.values() for placed in late}
    for number, placed in enumerate(items):
        yield from moved.get(number, ())
        if id(placed) not in taken:
            yield placed


def _end_of_turn(items: Sequence[Placed], number: int) -> int:
    """Where what an assistant says or calls, and what comes of it, is over."""
    for end, placed in enumerate(items[number:], number):
        item = placed.item
        is_said = isinstance(item, MessageItem) and item.role == "assistant"
        if not is_said and not isinstance(item, (*CALLS, *RESULTS, HostedCallItem, McpCallItem, PassedItem)):
            return end
    return len(items)


def adapted(turns: Sequence[Turn]) -> list[Turn] | None:
    """The same for templates that take a system's message first alone, and no picture from a tool: what systems say
    later stands in the first message, and what tools show in one of the user's behind it. None: it is the same."""
    is_late = [turn.role in SYSTEMS and number > 0 for number, turn in enumerate(turns)]
    shown = [turn.role == "tool" and turn.shows for turn in turns]
    if not any(is_late) and not any(shown):
        return None
    first = [turn for turn in turns[:1] if turn.role in SYSTEMS]
    late = [turn for turn, late in zip(turns, is_late, strict=True) if late]
    others = [turn for turn, late in zip(turns[len(first) :], is_late[len(first) :], strict=True) if not late]
    systems = [*first, *late]
    head = [_joined(systems)] if systems else []
    return [*head, *_shown_by_users(others)]


def _add(turns: list[Turn], placed: Placed) -> None:
    item, place = placed.item, placed.place
    if isinstance(item, MessageItem):
        _add_message(turns, item, place)
    elif isinstance(item, ReasoningItem):
        if item.text:
            _assistant(turns, place, is_new=_is_told(turns)).reasoning = item.text
    elif isinstance(item, CALLS):
        _assistant(turns, place).calls.append(_call(item.call_id, item.called, item.said))
    elif isinstance(item, McpCallItem):
        _assistant(turns, place).calls.append(_call(item.id, item.name, item.arguments))
        result = item.output if item.error is None else json.dumps(item.error)
        turns.append(Turn("tool", place, result or "", [place], call_id=item.id))
    elif isinstance(item, HostedCallItem) and item.result is not None:
        _assistant(turns, place).calls.append(_call(item.id, item.name, item.arguments))
        turns.append(Turn("tool", place, item.result, [place], call_id=item.id))
    elif isinstance(item, ShellOutputItem):
        turns.append(Turn("tool", place, json.dumps(item.output), [place], call_id=item.of_call))
    elif isinstance(item, CallOutputItem):
        content, part_places = _content(item.output or "", f"{place}.output")
        turns.append(Turn("tool", place, content, part_places, call_id=item.of_call))


def _add_message(turns: list[Turn], item: MessageItem, place: str) -> None:
    content, part_places = _content(item.content, f"{place}.content")
    if item.role == "assistant":
        turn = _assistant(turns, place, is_new=_is_told(turns) and turns[-1].has_words)
        turn.content, turn.part_places, turn.has_words = content, part_places, True
        return
    turn = Turn(item.role, place, content, part_places)
    if item.role in SYSTEMS and turns and all(each.role in SYSTEMS for each in turns):
        turns[-1:] = [_joined([turns[-1], turn])]
    else:
        turns.append(turn)


def _is_told(turns: Sequence[Turn]) -> bool:
    """Whether the last turn is an assistant's that has said something, or called."""
    return bool(turns) and turns[-1].role == "assistant" and (turns[-1].has_words or bool(turns[-1].calls))


def _assistant(turns: list[Turn], place: str, *, is_new: bool = False) -> Turn:
    """The assistant's turn that goes on, or a new one."""
    if is_new or not turns or turns[-1].role != "assistant":
        turns.append(Turn("assistant", place))
    return turns[-1]


def _call(call_id: str, name: str, arguments: str | dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _content(content: str | Contents, place: str) -> tuple[str | list[dict[str, Any]], list[str]]:
    """As a chat's message has it, and where each part stands. Words alone are one text."""
    if isinstance(content, str):
        return content, [place]
    if all(isinstance(part, _WORDS) for part in content):
        return "".join(part.text for part in content if isinstance(part, _WORDS)), [place]
    parts = [
        {"type": "text", "text": part.text}
        if isinstance(part, _WORDS)
        else part.model_dump(exclude_none=True)
        for part in content
    ]
    return parts, [f"{place}.{number}" for number in range(len(parts))]


def _joined(turns: Sequence[Turn]) -> Turn:
    """Several messages of systems as one."""
    if len(turns) == 1:
        return turns[0]
    if all(isinstance(turn.content, str) for turn in turns):
        words = "\n\n".join(str(turn.content) for turn in turns if turn.content)
        return replace(turns[0], role="system", content=words)
    parts = [part for turn in turns for part in _parts(turn)]
    places = [place for turn in turns for place in turn.part_places]
    return replace(turns[0], role="system", content=parts, part_places=places)


def _parts(turn: Turn) -> list[dict[str, Any]]:
    return [{"type": "text", "text": turn.content}] if isinstance(turn.content, str) else turn.content


def _shown_by_users(turns: Sequence[Turn]) -> Iterator[Turn]:
    """What tools show stands in a message of the user's, behind the last result of the same turn."""
    waiting: list[tuple[dict[str, Any], str]] = []
    for turn in turns:
        if turn.role != "tool" and waiting:
            yield Turn("user", turn.place, [part for part, _ in waiting], [place for _, place in waiting])
            waiting = []
        if turn.role != "tool" or not turn.shows:
            yield turn
            continue
        parts = list(zip(_parts(turn), turn.part_places, strict=True))
        words = "".join(part["text"] for part, _ in parts if part["type"] == "text")
        waiting += [(part, place) for part, place in parts if part["type"] != "text"]
        yield replace(turn, content=words, part_places=[turn.place])
    if waiting:
        yield Turn("user", "input", [part for part, _ in waiting], [place for _, place in waiting])
