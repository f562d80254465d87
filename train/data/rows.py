"""One parsed row of a data file -> an Example, or the reasons why not. No files, no tokens."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from serve.errors import DataError
from train.data.example import Example
from train.recipe import DatasetSource


def parse_row(row: Any, entry: DatasetSource, roles: Collection[str], source: str, line: int) -> Example:
    """The Example of a row; `roles` are those of which a conversation must hold a turn (none: any will do).

    DataError, a line for each problem, each starting with `source:line`.
    """
    place = f"{source}:{line}"
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: found {_kind(row)}; expected an object with keys")
    kind = entry.type if entry.type != "auto" else _kind_of_row(row, entry)
    if kind is None:
        raise DataError(f"{place}: {_unknown(row, entry)}")
    if kind == "chat":
        problems = list(_chat_problems(row, entry.chat_feature, roles))
        parts: dict[str, Any] = {
            "messages": _tuple(row.get(entry.chat_feature)),
            "tools": _tuple(row.get("tools")),
        }
    elif kind == "completion":
        names = (entry.prompt_feature, entry.completion_feature)
        problems = [problem for name in names for problem in _text_problems(row, name)]
        parts = {
            "prompt": row.get(names[0]),
            "completion": row.get(names[1]),
            "tools": _tuple(row.get("tools")),
        }
        problems += _tools_problems(row)
    else:
        problems = list(_text_problems(row, entry.text_feature))
        parts = {"text": row.get(entry.text_feature)}
    if problems:
        raise DataError("\n".join(f"{place}: {problem}" for problem in problems))
    return Example(source=source, line=line, **parts)


def _kind_of_row(row: Mapping[str, Any], entry: DatasetSource) -> str | None:
    """mlx-lm's order: prompt and completion, then messages, then text."""
    if row.get(entry.prompt_feature) is not None and row.get(entry.completion_feature) is not None:
        return "completion"
    if row.get(entry.chat_feature) is not None:
        return "chat"
    return "text" if row.get(entry.text_feature) is not None else None


def _unknown(row: Mapping[str, Any], entry: DatasetSource) -> str:
    wanted = f"{entry.chat_feature}, {entry.prompt_feature} and {entry.completion_feature}, or {entry.text_feature}"
    found = ", ".join(map(str, row)) or "nothing"
    if "conversations" in row:
        return f"found keys {found}; for conversations write chat_feature: conversations"
    names = [entry.chat_feature, entry.prompt_feature, entry.completion_feature, entry.text_feature]
    for key in row:
        if close := difflib.get_close_matches(str(key), names, n=1):
            return f"found keys {found}; expected {wanted}; did you mean {close[0]} by {key}?"
    return f"found keys {found}; expected {wanted} (or name the keys by chat_feature, prompt_feature, …)"


def _chat_problems(row: Mapping[str, Any], name: str, roles: Collection[str]) -> Iterator[str]:
    messages = row.get(name)
    if not isinstance(messages, (list, tuple)):
        yield f"{name}: found {_kind(messages)}; expected a list of messages"
        return
    for index, message in enumerate(messages):
        for problem in _message_problems(message):
            yield f"{name}.{index}{problem}"
    found = [str(message.get("role")) for message in messages if isinstance(message, Mapping)]
    if roles and not any(role in roles for role in found):
        yield f"{name}: no turn of {' or '.join(roles)} to learn from; found {', '.join(found) or 'no turns'}"
    yield from _tools_problems(row)


def _message_problems(message: Any) -> Iterator[str]:
    if not isinstance(message, Mapping):
        yield f": found {_kind(message)}; expected an object with role and content"
        return
    if not isinstance(message.get("role"), str):
        hint = (
            "; a ShareGPT row has from and value: rename them to role and content"
            if "from" in message
            else ""
        )
        yield f".role: found {_kind(message.get('role'))}; expected a string{hint}"
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, (list, tuple)):
        for index, part in enumerate(content):
            if (
                not isinstance(part, Mapping)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                yield f".content.{index}: found {_kind(part)}; expected {{type: text, text: …}}"
    elif not isinstance(content, str) and not (content is None and calls):
        yield f".content: found {_kind(content)}; expected a string"
    if calls is not None and not (
        isinstance(calls, (list, tuple)) and all(isinstance(c, Mapping) for c in calls)
    ):
        yield f".tool_calls: found {_kind(calls)}; expected a list of objects"


def _tools_problems(row: Mapping[str, Any]) -> Iterator[str]:
    tools = row.get("tools")
    if tools is not None and not (
        isinstance(tools, (list, tuple)) and all(isinstance(t, Mapping) for t in tools)
    ):
        yield f"tools: found {_kind(tools)}; expected a list of objects"


def _text_problems(row: Mapping[str, Any], name: str) -> Iterator[str]:
    value = row.get(name)
    if not isinstance(value, str):
        yield f"{name}: found {_kind(value)}; expected a string"
    elif not value:
        yield f"{name}: found an empty string; expected text"


def _tuple(value: Any) -> tuple[Any, ...] | None:
    return tuple(value) if isinstance(value, (list, tuple)) and value else None


def _kind(value: Any) -> str:
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
