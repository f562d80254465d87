"""JSON that comes piece by piece: where a value ends, and the parts of a call that is written as an object.

What is told does not depend on how the text is cut. Each character is looked at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal

NAME_KEYS = ("name", "tool_name")
ARGUMENTS_KEYS = ("arguments", "parameters", "args", "input")
FUNCTION = "function"
"""A key whose value is a name, or an object with a name."""
MAX_NAME_CHARS = 1024
_IN_STRING = re.compile(r'["\\]')
_LITERAL_END = re.compile(r"[\s,\]}]")
_WHITE = re.compile(r"\s*")
# JSON knows no control characters inside strings; models write them.
_ESCAPES = {code: json.dumps(chr(code))[1:-1] for code in range(0x20)}


def loads(text: str) -> Any:
    """The value of a JSON text, whose strings may hold control characters. ValueError for none."""
    try:
        return json.loads(text, strict=False)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_clean(text: str) -> bool:
    """Whether it can be sent: no half of a surrogate pair is in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Value:
    """One JSON value that has begun, up to its end."""

    def __init__(self, first: str, marks: Sequence[str] = ()) -> None:
        """first: its first character, which is yet to be pushed. marks: text at which a list or an object is over,
        whole or not, where it stands outside of strings."""
        self.is_over = False
        self._marks = tuple(marks)
        self._kind = "string" if first == '"' else "container" if first in "{[" else "literal"
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        firsts = "".join(sorted({re.escape(mark[0]) for mark in self._marks}))
        self._outside = re.compile(rf'["{{}}\[\]{firsts}]')

    def push(self, text: str, at: int) -> tuple[int, str]:
        """How far it goes from there on, and what is read of it; what is left may be a mark's beginning."""
        if self._kind == "literal":
            found = _LITERAL_END.search(text, at)
            self.is_over = found is not None
            end = found.start() if found else len(text)
            return end, text[at:end]
        pieces: list[str] = []
        while at < len(text) and not self.is_over:
            end = self._inside(text, at) if self._in_string else self._outside_strings(text, at)
            # The quote that ends a string is none of its characters, and not changed by this either.
            pieces.append(text[at:end].translate(_ESCAPES) if self._was_string else text[at:end])
            if end == at:
                break
            at = end
        return at, "".join(pieces)

    _was_string = False

    def _inside(self, text: str, at: int) -> int:
        """Past the end of a string, or of what there is of it."""
        self._was_string = True
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        while (found := _IN_STRING.search(text, at)) is not None:
            at = found.end()
            if found[0] == '"':
                self._in_string = False
                self.is_over = self._kind == "string"
                return at
            if at == len(text):
                self._is_escaped = True
                return at
            at += 1
        return len(text)

    def _outside_strings(self, text: str, at: int) -> int:
        """Past the next character that counts; where a mark stands, or may, before it."""
        self._was_string = False
        while (found := self._outside.search(text, at)) is not None:
            character, at = found[0], found.end()
            mark = "none" if character == '"' else begins(text, found.start(), self._marks)
            if mark != "none":
                self.is_over = mark == "whole"
                return found.start()
            if character == '"':
                self._in_string = True
                return at
            if character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_over = True
                    return at
        return len(text)


def overlap(text: str, mark: str, at: int = 0) -> int:
    """Length of the longest end of `text`, from a place on, that begins `mark`."""
    for length in range(min(len(mark) - 1, len(text) - at), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


def is_name(text: str) -> bool:
    """Whether a function may be called that."""
    return 0 < len(text) <= MAX_NAME_CHARS and is_clean(text) and not any(map(str.isspace, text))


def begins(text: str, at: int, marks: Sequence[str]) -> str:
    """Whether one of the marks stands there: "whole", "part" of one at the text's end, or "none"."""
    rest = len(text) - at
    state = "none"
    for mark in marks:
        if text.startswith(mark, at):
            return "whole"
        if rest < len(mark) and mark.startswith(text[at:]):
            state = "part"
    return state


class ObjectCall:
    """One call as a JSON object: who is called, and with what. Its arguments are told as they come, if the name is
    known by then."""

    def __init__(self, marks: Sequence[str] = (), *, names: frozenset[str] | None = None) -> None:
        """marks: see Value. names: it is a call only of one of these, and with arguments."""
        self._marks = tuple(marks)
        self._names = names
        self.name: str | None = None
        """Once the call is told."""
        self.is_over = False
        self.is_broken = False
        """It is no call. One that was told before stays one."""
        self._state: Literal["begin", "key", "colon", "value", "arguments"] = "begin"
        self._key = ""
        self._value: Value | None = None
        self._pieces: list[str] = []  # of the value, which is not told
        self._told: list[str] = []
        self._named: str | None = None
        self._arguments: str | None = None

    def take(self) -> str:
        """What was added to its arguments since they were last taken."""
        told, self._told = "".join(self._told), []
        return told

    def push(self, text: str, at: int) -> int:
        """How far it goes from there on; what is left may be a mark's beginning."""
        while not (self.is_over or self.is_broken) and at < len(text):
            if self._value is None:
                at = _WHITE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too
                at = self._structure(text, at) if at < len(text) else at
                continue
            at, piece = self._value.push(text, at)
            (self._told if self._state == "arguments" else self._pieces).append(piece)
            if not self._value.is_over:
                break
            self._end_value()
        return at

    def finish(self) -> None:
        """Nothing follows: a call whose end alone is missing is one."""
        if self.is_over or self.is_broken or self.name is not None:
            return
        if self._value is not None:
            self.is_broken = True
        else:
            self._end()

    def _structure(self, text: str, at: int) -> int:
        character = text[at]
        match self._state:
            case "begin":
                self._state = "key"
            case "key" if character == '"':
                self._value = Value('"')
                return at
            case "key" if character == ",":
                pass
            case "key" if character == "}":
                self._end()
            case "colon" if character == ":":
                self._state = "value"
            case "value" if character not in ",:]}":
                self._value = Value(character, self._marks)
                if self._key in ARGUMENTS_KEYS and character == "{" and self._is_wanted and self.name is None:
                    self._state, self.name = "arguments", self._named
                return at
            case _:
                self.is_over = self.name is not None
                self.is_broken = not self.is_over
                return at
        return at + 1

    @property
    def _is_wanted(self) -> bool:
        return self._named is not None and (self._names is None or self._named in self._names)

    def _end_value(self) -> None:
        text, self._pieces, self._value = "".join(self._pieces), [], None
        state, self._state = self._state, "key"
        if state == "key":
            self._key, self._state = str(_loaded(text)), "colon"
        elif state == "arguments" or self.name is not None:
            pass
        elif self._key in NAME_KEYS or (self._key == FUNCTION and text.startswith('"')):
            self._named = _name(_loaded(text))
            self.is_broken = self._named is None
        elif self._key in ARGUMENTS_KEYS:
            self._arguments = _arguments(text)
            self.is_broken = self._arguments is None
        elif self._key == FUNCTION:
            self._take_function(_loaded(text))

    def _take_function(self, function: Any) -> None:
        if isinstance(function, dict):
            self._named = _name(function.get("name"))
            value: Any = next((function[key] for key in ARGUMENTS_KEYS if key in function), {})
            self._arguments = _arguments(json.dumps(value, ensure_ascii=False))

    def _end(self) -> None:
        if self.name is None:
            if not self._is_wanted or (self._names is not None and self._arguments is None):
                self.is_broken = True
                return
            self.name = self._named
            self._told.append(self._arguments or "{}")
        self.is_over = True


def _loaded(text: str) -> Any:
    try:
        return loads(text)
    except ValueError:
        return None


def _name(value: Any) -> str | None:
    """A name; None for what is none."""
    is_name = isinstance(value, str) and 0 < len(value.strip()) <= MAX_NAME_CHARS and is_clean(value)
    return value.strip() if is_name else None


def _arguments(text: str) -> str | None:
    """Arguments as an object's text: they may be written as one, as text that holds one, or as none."""
    value: Any = _loaded(text)
    if isinstance(value, str):
        text, value = value.strip() or "{}", _loaded(value.strip() or "{}")
    if text.strip() == "null":
        return "{}"
    return text.strip() if isinstance(value, dict) and is_clean(text) else None
