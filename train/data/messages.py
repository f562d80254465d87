"""Turns as files spell them -> messages with role and content, and what is wrong with them. Knows no rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from serve.model.messages import HALF, MEDIA_PARTS, leaves
from train.data.example import Message

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""`from` of a ShareGPT turn -> our role; a `function_call` turn's value is the call as JSON."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of an assistant's turn that hold its thoughts; transformers gives a template each under the name it reads."""

TRAINED = ("train", "training", "weight")
"""Keys that say whether a turn is learned from: axolotl's are true or false, OpenAI's is 0 or 1."""


def turns_of(value: Any) -> list[Any]:
    """A turn, or a list of turns in either spelling -> a list in ours; whatever is no turn stays as it is."""
    listed = [value] if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else []
    return [_from_sharegpt(turn) if _is_sharegpt(turn) else _from_functions(turn) for turn in listed]


def half_characters(parts: Any, row: Mapping[str, Any]) -> Iterator[str]:
    """A line for each place of the row with half a surrogate pair, if what is used of it has one.

    No tokenizer reads it. Where the row holds it in JSON text, it is named where that text is taken to.
    """
    if any(HALF.search(text) for text in leaves(parts)):
        yield from list(_halves(row)) or _halves(parts)


def _halves(value: Any) -> Iterator[str]:
    for name, text in _named(value, ""):
        half = HALF.search(text)
        if half is not None:
            yield (
                f"{name}: found half a surrogate pair ({ascii(half.group())[1:-1]}) at character "
                f"{half.start() + 1}; expected whole characters"
            )


def _named(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """(where it stands, text) of every text in a row; a key stands in its object."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield f"a key of {name or 'the row'}", str(key)
            here = ascii(str(key))[1:-1] if HALF.search(str(key)) else str(key)
            yield from _named(item, f"{name}.{here}" if name else here)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _named(item, f"{name}.{index}")


def problems_of(value: Any, name: str) -> Iterator[str]:
    """What is wrong with turns, a line each, starting with the key's name."""
    if not isinstance(value, (list, tuple)):
        yield f"{name}: found {kind_of(value)}; expected a list of messages"
        return
    if not value:
        yield f"{name}: found an empty list; expected at least one message"
    for index, turn in enumerate(value):
        found = _sharegpt_problems(turn) if _is_sharegpt(turn) else _message_problems(turn)
        yield from (f"{name}.{index}{problem}" for problem in found)


def no_turn_of(roles: Collection[str], turns: Sequence[Message], untrained: Collection[int]) -> str | None:
    """The problem of a conversation without a turn of these roles; no roles are no demand."""
    learned = [turn for index, turn in enumerate(turns) if turn["role"] in roles and index not in untrained]
    if not roles or learned:
        return None
    found = ", ".join(str(turn["role"]) for turn in turns)
    more = "; the rest is marked as not to be trained on" if untrained else ""
    return f"no turn of {' or '.join(roles)} to learn from; found {found}{more}"


def untrained_turns(turns: Sequence[Message]) -> tuple[int, ...]:
    """Indices of turns that say they are not to be learned from: `train: false`, or `weight: 0`."""
    off = (False, 0)
    return tuple(
        index
        for index, turn in enumerate(turns)
        if any(turn.get(name) is not None and turn[name] in off for name in TRAINED)
    )


def without_marks(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns as templates see them, without the keys of `untrained_turns`."""
    return tuple({key: value for key, value in turn.items() if key not in TRAINED} for turn in turns)


def parse_json_list(value: Any) -> Any:
    """Tools and messages may be JSON text, since tables have no such columns; anything else is given back."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def kind_of(value: Any) -> str:
    """A value as messages name it: `a number (3)`."""
    if value is None:
        return "nothing"
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    shown = repr(value)
    return (
        f"{names.get(type(value), type(value).__name__)} ({shown if len(shown) <= 40 else shown[:39] + '…'})"
    )


def _message_problems(message: Any) -> Iterator[str]:
    if not isinstance(message, Mapping):
        yield f": found {kind_of(message)}; expected an object with role and content"
        return
    if not isinstance(message.get("role"), str):
        yield f".role: found {kind_of(message.get('role'))}; expected a string"
    content = message.get("content")
    calls = message.get("tool_calls") or message.get("function_call")
    if isinstance(content, (list, tuple)):
        for index, part in enumerate(content):
            if not (_is_text_part(part) or _is_media_part(part)):
                yield f".content.{index}: found {kind_of(part)}; expected {{type: text, text: …}} or a picture's part"
    elif not isinstance(content, str) and not (content is None and (calls or _reasoning(message))):
        yield f".content: found {kind_of(content)}; expected a string"
    called = message.get("tool_calls")
    if called is not None and not _is_list_of_objects(called):
        yield f".tool_calls: found {kind_of(called)}; expected a list of objects"
    legacy = message.get("function_call")
    if legacy is not None and not isinstance(legacy, Mapping):
        yield f".function_call: found {kind_of(legacy)}; expected an object with name and arguments"
    yield from _reasoning_problems(message)
    yield from _mark_problems(message)


def _reasoning_problems(message: Message) -> Iterator[str]:
    for name in REASONING:
        if message.get(name) is not None and not isinstance(message[name], str):
            yield f".{name}: found {kind_of(message[name])}; expected a string"


def _mark_problems(message: Message) -> Iterator[str]:
    for name in TRAINED:
        mark = message.get(name)
        fits = mark in (0, 1) if name == "weight" else isinstance(mark, bool)
        if mark is not None and not fits:
            yield f".{name}: found {kind_of(mark)}; expected {'0 or 1' if name == 'weight' else 'true or false'}"


def _reasoning(message: Message) -> str | None:
    return next((message[name] for name in REASONING if message.get(name)), None)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_media_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in MEDIA_PARTS


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, Mapping) for item in value)


# OpenAI's earlier names


def _from_functions(turn: Any) -> Any:
    """A turn of `function_call`, or of role `function`, by the names that templates know."""
    if not isinstance(turn, Mapping):
        return turn
    renamed = {key: value for key, value in turn.items() if key != "function_call"}
    if isinstance(turn.get("function_call"), Mapping) and not turn.get("tool_calls"):
        renamed["tool_calls"] = [{"type": "function", "function": dict(turn["function_call"])}]
    if turn.get("role") == "function":
        renamed["role"] = "tool"
    return renamed if turn.get("function_call") or turn.get("role") == "function" else turn


# ShareGPT


def _is_sharegpt(turn: Any) -> bool:
    return isinstance(turn, Mapping) and "from" in turn and "role" not in turn


def _sharegpt_problems(turn: Mapping[str, Any]) -> Iterator[str]:
    speaker, value = turn["from"], turn.get("value")
    if speaker not in SHAREGPT_ROLES:
        known = ", ".join(SHAREGPT_ROLES)
        yield f".from: found {kind_of(speaker)}; expected one of {known}"
    elif not isinstance(value, str):
        yield f".value: found {kind_of(value)}; expected a string"
    elif speaker == "function_call" and _calls(value) is None:
        yield f".value: found {kind_of(value)}; expected a call as JSON: {{name: …, arguments: {{…}}}}, or a list"
    yield from _mark_problems(turn)


def _from_sharegpt(turn: Mapping[str, Any]) -> dict[str, Any]:
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    role, value = SHAREGPT_ROLES.get(turn["from"], turn["from"]), turn.get("value")
    if turn["from"] == "function_call" and (calls := _calls(value)):
        return {**others, "role": role, "content": "", "tool_calls": calls}
    return {**others, "role": role, "content": value}


def _calls(value: Any) -> list[dict[str, Any]] | None:
    try:
        parsed = json.loads(value)
    except (ValueError, TypeError):
        return None
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return None
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]
