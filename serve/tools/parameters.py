"""A call that is written parameter by parameter, between marks: its arguments as JSON, told as they come.

A text is told piece by piece where it is sure to be one; any other value is told when it is whole. What is told does
not depend on how the answer is cut. Each character is looked at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from serve.tools.scan import begins, is_clean, loads, overlap
from serve.tools.tool import Tool, properties_of
from serve.tools.values import kinds_of, read_value

MAX_OPENING_CHARS = 1024
MAX_WHITE = 1024
"""Between a value's end and what follows."""
Trim = Literal["white", "lines", "none"]
"""What around a value is none of it: white space, one line break at either end, or nothing."""
_QUOTED = re.compile(r"""(["'])(.*)\1""", re.DOTALL)


class Marks(NamedTuple):
    """How a format writes parameters."""

    head: re.Pattern[str]
    """All of the call before its first parameter; its `name` is who is called."""
    begin: str
    """What a parameter begins with."""
    opens: str
    """The end of that which stands before its value."""
    opening: re.Pattern[str]
    """All that stands there: its `name`, and its `kind` where it says whether the value is a text."""
    close: str
    """Behind the value. `{name}` stands for the parameter's."""
    trim: Trim = "white"
    text_kinds: tuple[str | None, ...] = ()
    """What `kind` says of texts; empty: the schema says it."""
    wraps: str = ""
    """What a value may begin with that is no plain text."""
    nests: bool = False
    """A value may hold elements that are written as parameters are, and a list may come one parameter an element. So
    what is no text is read when the call is whole."""


Read = Callable[[str], Mapping[str, Any]]
"""Parameters as they were written → name and value, as the format's own parser reads them; empty where it cannot."""


class _Written(NamedTuple):
    """A parameter whose value is no text."""

    name: str
    opening: str
    value: str
    close: str

    @property
    def whole(self) -> str:
        return self.opening + self.value + self.close


class ParameterCall:
    """One call, from its first parameter on."""

    def __init__(
        self, marks: Marks, end: str, tool: Tool | None, read: Read, follows: Sequence[str] = ()
    ) -> None:
        """end: of the call. tool: which it is, if that is known. follows: what may stand behind a call's end.

        What looks like a value's end and has nothing behind it that may follow is a part of the value.
        """
        self._marks, self._end, self._tool, self._read = marks, end, tool, read
        self._follows = tuple(dict.fromkeys((marks.begin, end, *follows)))
        self.is_over = False
        self._suspect: list[str] = []
        """Of a text, from where the call's end stands in it: the text's own, or, where its end was left out, none."""
        self._state: Callable[[str, int], int] = self._between
        self._told: list[str] = ["{"]
        self._names: set[str] = set()
        self._rest: list[_Written] = []  # read when the call is whole
        self._name = self._opening = self._close = ""
        self._depth = 0  # of elements that are named as the parameter
        self._pieces: list[str] = []  # of a value, which is read when it is whole
        self._since: list[str] = []  # of these, what came since an element's end
        self._is_first = True  # nothing has come of a text
        self._white = ""  # that is the text's if more comes

    def take(self) -> str:
        """What was added to its arguments since they were last taken."""
        told, self._told = "".join(self._told), []
        return told

    def push(self, text: str, at: int) -> int:
        """How far it goes from there on; what is left may be a mark's beginning."""
        while not self.is_over and at < len(text):
            state = self._state
            moved = state(text, at)
            if moved == at and self._state == state:
                break
            at = moved
        return at

    def finish(self, held: str = "", *, is_cut: bool = False) -> str:
        """Nothing follows. A call whose end alone is missing is one, and so is one whose last value's end is; what is
        cut inside a parameter stays cut. What stands behind the call is given back."""
        rest = ""
        if self.is_over:
            return rest
        if self._state in (self._in_text, self._in_value, self._in_dropped) and held.startswith(self._close):
            self._close_value()
        elif not is_cut and self._state in (self._in_text, self._in_value):
            own = "".join((*(self._suspect or self._pieces), held))
            at = own.find(self._end)
            if at >= 0:
                rest = own[at + len(self._end) :]
                self._suspect, self._pieces = [], [own[:at]]
                self._close_value()
        if self._state == self._between:
            self._end_call()
        return rest

    def _close_value(self) -> None:
        """The value is over."""
        if self._state == self._in_text:
            self._say("".join(self._suspect))
            self._told.append('"')
        elif self._state == self._in_value:
            self._end_value(_Written(self._name, self._opening, "".join(self._pieces), self._close))
        self._suspect, self._state = [], self._between

    # Each of these is a state: it goes on from a place in the text, and says how far it came.

    def _between(self, text: str, at: int) -> int:
        """Outside of parameters, where whatever stands is nothing."""
        mark, at = first_mark(text, at, self._marks.begin, self._end)
        if mark == "end":
            self._end_call()
            return at + len(self._end)
        if mark == "begin":
            self._state = self._in_opening
        return at

    def _in_opening(self, text: str, at: int) -> int:
        """From a parameter's beginning to its value."""
        opens = text.find(self._marks.opens, at + len(self._marks.begin), at + MAX_OPENING_CHARS)
        end = text.find(self._end, at, at + MAX_OPENING_CHARS)
        if end >= 0 and not 0 <= opens < end:
            return self._leave(end)
        if opens < 0:
            return self._leave(at + 1) if len(text) - at >= MAX_OPENING_CHARS else at
        opens += len(self._marks.opens)
        found = self._marks.opening.fullmatch(text, at, opens)
        if found is None:
            return self._leave(opens)
        self._name, self._opening = unquoted(found["name"]), found[0]
        self._close = self._marks.close.replace("{name}", found["name"])
        self._depth, self._pieces, self._since = 1, [], []
        self._is_first, self._white = True, ""
        is_text = self._is_text(found.groupdict().get("kind"))
        self._state = self._text_begins if is_text else self._in_value
        if self._is_known_already(is_text=is_text):
            self._state = self._in_dropped
        return opens

    def _text_begins(self, text: str, at: int) -> int:
        """Up to what shows whether a text is plain."""
        if wraps := self._marks.wraps:
            end = len(text) - len(text[at:].lstrip())
            if len(text) - end < len(wraps) and wraps.startswith(text[end:]):
                return end
            if text.startswith(wraps, end):
                self._state = self._in_value
                return end
        self._tell_key(self._name)
        self._told.append('"')
        self._state = self._in_text
        return at

    def _in_text(self, text: str, at: int) -> int:
        end, is_close = self._close_in(text, at)
        if not self._suspect:
            ended = text.find(self._end, at, end)
            if ended < 0 and not is_close:
                end = min(end, len(text) - overlap(text, self._end, at))
            self._say(text[at : end if ended < 0 else ended])
            at = end if ended < 0 else ended
        if at < end:
            self._suspect.append(text[at:end])
        if not is_close:
            return end
        self._close_value()
        return end + len(self._close)

    def _close_in(self, text: str, at: int) -> tuple[int, bool]:
        """Where the value ends, or up to where it does not for certain; and whether it does."""
        while (found := text.find(self._close, at)) >= 0:
            behind = _past_white(text, found + len(self._close))
            if behind is None:
                return found, True
            state = begins(text, behind, self._follows)
            if state == "whole":
                return found, True
            if state == "part" or behind == len(text):
                return found, False
            at = found + len(self._close)
        return len(text) - overlap(text, self._close, at), False

    def _in_value(self, text: str, at: int) -> int:
        """Of a value that is read when it is whole."""
        end, is_close = self._close_in(text, at)
        self._pieces.append(text[at:end])
        if not is_close:
            self._since.append(text[at:end])
            return end
        if self._marks.nests:
            self._depth += "".join((*self._since, text[at:end])).count(self._opening) - 1
            self._since = []
            if self._depth > 0:
                self._pieces.append(self._close)
                return end + len(self._close)
        self._close_value()
        return end + len(self._close)

    def _in_dropped(self, text: str, at: int) -> int:
        """Of a parameter that has come before: the first one counts, since it has been told."""
        end, is_close = self._close_in(text, at)
        return self._leave(end + len(self._close)) if is_close else end

    def _leave(self, at: int) -> int:
        """A parameter is over."""
        self._state = self._between
        return at

    # What is told

    def _is_text(self, kind: str | None) -> bool:
        if self._marks.text_kinds:
            return kind in self._marks.text_kinds
        part = self._schema_of(self._name)
        return part is not None and kinds_of(part, self._root) == {"string"}

    def _is_known_already(self, *, is_text: bool) -> bool:
        if self._marks.nests and not is_text:
            return False  # another element of its list
        return self._name in self._names or not is_clean(self._name)

    def _schema_of(self, name: str) -> Any:
        """Of a parameter; None where nothing is known of it."""
        return None if self._tool is None else properties_of(self._tool).get(name)

    @property
    def _root(self) -> Mapping[str, Any]:
        return (self._tool.parameters if self._tool is not None else None) or {}

    def _say(self, piece: str) -> None:
        """A piece of a text, but for what may stand at its end and be none of it."""
        trim = self._marks.trim
        if self._is_first and piece and trim != "none":
            piece = piece.removeprefix("\n") if trim == "lines" else piece.lstrip()
            self._is_first = trim == "white" and not piece
        words = piece
        if trim == "lines":
            words = piece.removesuffix("\n")
        elif trim == "white":
            words = piece.rstrip()
        white = piece[len(words) :]
        if words or (white and trim == "lines"):
            words, self._white = self._white + words, ""
        self._white += white
        if words:
            self._told.append(json.dumps(words, ensure_ascii=False)[1:-1])

    def _tell_key(self, name: str) -> None:
        joint = ", " if self._names else ""
        self._names.add(name)
        self._told.append(f"{joint}{json.dumps(name, ensure_ascii=False)}: ")

    def _end_value(self, written: _Written) -> None:
        if self._marks.nests:
            self._rest.append(written)
        else:
            self._tell(written.name, self._value_of(written))

    def _tell(self, name: str, value: Any) -> None:
        try:
            told = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (ValueError, RecursionError):
            told = json.dumps(str(value))
        self._tell_key(name)
        self._told.append(told if is_clean(told) else json.dumps(value))

    def _value_of(self, written: _Written) -> Any:
        """What was written, by the schema; else as the format's own parser has it; else a text."""
        text = written.value.strip()
        if self._marks.trim == "lines":
            text = written.value.removeprefix("\n").removesuffix("\n")
        if self._marks.text_kinds:
            try:
                return loads(text)
            except ValueError:
                return text
        if not (self._marks.wraps and text.startswith(self._marks.wraps)):
            fits, value = read_value(text, self._schema_of(written.name), self._root)
            if fits:
                return value
        values = list(self._read(written.whole).values())
        return values[0] if len(values) == 1 else text

    def _end_call(self) -> None:
        for name in dict.fromkeys(each.name for each in self._rest):
            own = [each for each in self._rest if each.name == name]
            if len(own) == 1 and self._marks.begin not in own[0].value:
                self._tell(name, self._value_of(own[0]))
            else:
                values = self._read("".join(each.whole for each in own))
                self._tell(name, values.get(name, [each.value.strip() for each in own]))
        self._told.append("}")
        self.is_over = True


def _past_white(text: str, at: int) -> int | None:
    """Behind the white space there; None: there is so much that nothing may follow."""
    some = text[at : at + MAX_WHITE]
    rest = some.lstrip()
    return at + len(some) - len(rest) if rest or len(some) < MAX_WHITE else None


def first_mark(text: str, at: int, begin: str, end: str) -> tuple[Literal["begin", "end", "none"], int]:
    """Which of two marks comes first, and where; or up to where there is none for certain. One may begin as the other
    does."""
    begun, ended = text.find(begin, at), text.find(end, at)
    if ended >= 0 and not 0 <= begun < ended:
        return "end", ended
    if begun < 0:
        return "none", len(text) - max(overlap(text, begin, at), overlap(text, end, at))
    if len(text) - begun < len(end) and end.startswith(text[begun:]):
        return "none", begun
    return "begin", begun


def unquoted(name: str) -> str:
    """A name without the quotes around it."""
    found = _QUOTED.fullmatch(name.strip())
    return found[2] if found is not None else name.strip()
