"""A chat that is longer than the model's context → one that fits, by dropping its oldest turns or summing them up.

What a system or developer message says stays, and so does the turn that is to be answered. A tool call and its
results stay or go together. What cannot be made to fit is left as it is, for the prompt to be refused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from serve.api.message_bodies import Message
from serve.api.parts import WORDS, TextPart
from serve.api.schemas import ChatBody

NUM_KEPT = 6
"""Messages at the end that are never summed up."""
ROOM_SHARE = 4
"""The answer has the room that it asks for, up to one in so many tokens of the context."""
SUMMARY = "[Summary of the conversation before this message]"
SYSTEM = ("system", "developer")
RESULTS = ("tool", "function")

Fits = Callable[[ChatBody], Awaitable[bool]]
Sum = Callable[[Sequence[Message]], Awaitable[str]]


@dataclass(frozen=True)
class Shortened:
    """A chat, and how many of its messages are not in it any more."""

    body: ChatBody
    num_dropped: int = 0
    is_summed_up: bool = False

    @property
    def note(self) -> str:
        """For a header; empty where nothing is missing."""
        if not self.num_dropped:
            return ""
        return f"{'summarized' if self.is_summed_up else 'truncated'}; messages={self.num_dropped}"


async def truncated(body: ChatBody, fits: Fits) -> Shortened:
    """With as many of its oldest turns dropped as it takes; where the last turn alone is too long, with the oldest
    answers and calls in it dropped too."""
    messages = body.messages
    steps = list(droppable(messages))
    low, high = 0, len(steps)  # so many steps are too few; so many are all there are
    while low < high:
        middle = (low + high) // 2
        if await fits(_without(body, steps[:middle])):
            high = middle
        else:
            low = middle + 1
    dropped = [index for step in steps[:low] for index in step]
    return Shortened(_without(body, steps[:low]), len(dropped))


async def summed_up(body: ChatBody, sum_up: Sum) -> Shortened:
    """With a summary in place of all but the last messages."""
    older = _older(body.messages)
    if not older:
        return Shortened(body)
    text = (await sum_up([body.messages[index] for index in older])).strip()
    if not text:
        return Shortened(body)
    kept = [message for index, message in enumerate(body.messages) if index not in set(older)]
    return Shortened(body.model_copy(update={"messages": _told_before(kept, text)}), len(older), True)


def transcript(messages: Sequence[Message]) -> str:
    """What was said, by whom; of what was shown, that it was."""
    return "\n\n".join(f"{message.role}: {_said(message)}" for message in messages)


def _said(message: Message) -> str:
    content = message.content
    parts = [content] if isinstance(content, str) else []
    if isinstance(content, list):
        parts = [part.text if isinstance(part, WORDS) else f"[{part.kind}]" for part in content]
    parts += [f"[calls {call.function.name} with {call.function.arguments}]" for call in message.calls]
    return "\n".join(parts)


def _told_before(messages: list[Message], summary: str) -> list[Message]:
    """A user's message begins with the summary: the first of them, or one of its own where somebody else goes on."""
    first = next((i for i, message in enumerate(messages) if message.role not in SYSTEM), len(messages))
    text = f"{SUMMARY}\n{summary}"
    if first == len(messages) or messages[first].role != "user":
        own = Message(role="user", content=text)
        return [*messages[:first], own, *messages[first:]]
    told = messages[first]
    if isinstance(told.content, list):
        content: str | list[object] = [TextPart(type="text", text=f"{text}\n\n"), *told.content]
    else:
        content = f"{text}\n\n{told.content}"
    return [*messages[:first], told.model_copy(update={"content": content}), *messages[first + 1 :]]


def _older(messages: Sequence[Message]) -> list[int]:
    """Numbers of the messages that a summary may stand for: all before the last few, and no call without its results.
    Of those that are left the first begins no later than the last turn."""
    units = list(_units(messages))
    num_left, cut = 0, len(units)
    while cut > 0 and (num_left < NUM_KEPT or not _has_user(messages, units[cut:])):
        cut -= 1
        num_left += len(units[cut])
    return [index for unit in units[:cut] for index in unit]


def _has_user(messages: Sequence[Message], units: Sequence[Sequence[int]]) -> bool:
    return any(messages[index].role == "user" for unit in units for index in unit)


def droppable(messages: Sequence[Message]) -> Iterator[list[int]]:
    """Numbers of messages that may go, the first to go first: older turns as wholes, then what stands between the
    last user's message and the last that came after it."""
    turns: list[list[list[int]]] = []
    for unit in _units(messages):
        if not turns or messages[unit[0]].role == "user":
            turns.append([])
        turns[-1].append(unit)
    for turn in turns[:-1]:
        yield [index for unit in turn for index in unit]
    yield from turns[-1][1:-1] if turns else ()


def _units(messages: Sequence[Message]) -> Iterator[list[int]]:
    """Numbers of messages that stay or go together, without system's."""
    unit: list[int] = []
    for index, message in enumerate(messages):
        if message.role in SYSTEM:
            continue
        if message.role not in RESULTS and unit:
            yield unit
            unit = []
        unit.append(index)
    if unit:
        yield unit


def _without(body: ChatBody, steps: Sequence[Sequence[int]]) -> ChatBody:
    gone = {index for step in steps for index in step}
    if not gone:
        return body
    kept = [message for index, message in enumerate(body.messages) if index not in gone]
    return body.model_copy(update={"messages": kept})
