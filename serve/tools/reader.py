"""An answer's text, piece by piece → its text outside of calls, and its calls. One ToolReader an answer.

What is told in sum does not depend on how the text is cut. Text goes on as it comes, but for white space that may
stand before a call, and for what may be the beginning of a mark. A call that is a JSON object is told as soon as its
arguments open, and these as they come; one that is written parameter by parameter as its first one begins; any other
when it is whole. What is no call after all is text.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serve.tools.call import CallPiece
from serve.tools.format import ToolFormat, Whole
from serve.tools.parameters import Marks, ParameterCall, first_mark, unquoted
from serve.tools.scan import ObjectCall, Value, begins, is_name, overlap
from serve.tools.tool import Read, Tool

MAX_HEADER_CHARS = 1024
"""Of what says who is called."""
_SHORT = string.ascii_letters + string.digits
_WHITE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s,;]*")


def new_call_id(format: ToolFormat) -> str:
    """One that nobody has had, in the form that the family's templates take."""
    if format.short_ids:
        return "".join(secrets.choice(_SHORT) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


class ToolReader:
    """Reads one answer."""

    def __init__(
        self,
        format: ToolFormat,
        tools: Sequence[Tool],
        new_id: Callable[[ToolFormat], str] = new_call_id,
        *,
        is_single: bool = False,
    ) -> None:
        """is_single: nothing is read behind the first call."""
        self._is_single = is_single
        self._format = format
        self._tools = tools
        self._names = frozenset(tool.name for tool in tools)
        self._new_id = new_id
        self.num_calls = 0
        """Calls that were told."""
        self._state: Callable[[str, int], int] = self._start if format.bare else self._text
        self._held = ""
        self._white = ""  # of the text, whose next is not known
        self._raw: list[str] = []  # of what may come to be a call, and may be text
        self._parts: list[str | CallPiece] = []  # that were told, and not yet given
        self._object: ObjectCall | None = None
        self._arguments: Value | None = None
        self._whole: Whole | None = None
        self._body: list[str] = []
        self._is_odd = False  # what the call's parameters follow is no head of one
        self._parameters: ParameterCall | None = None
        self._in_list = False
        self._is_bare = False  # no mark stands before the call
        self._num_before = 0  # calls told when the mark came
        # A mark that is the beginning of another is complete first, and counts.
        self._marks = format.marks
        self._firsts = re.compile("[" + "".join(sorted({re.escape(mark[0]) for mark in self._marks})) + "]")
        self._all_ends = (*format.ends, *format.marks)

    @property
    def is_over(self) -> bool:
        """Whether what follows is not read: the only call that is wanted has been told to its end."""
        is_open = self._arguments is not None or self._parameters is not None
        is_open |= self._object is not None and self._object.name is not None
        return self._is_single and self.num_calls > 0 and not is_open

    def push(self, text: str) -> Read:
        """What is certain now."""
        text, at = self._held + text, 0
        while at < len(text) and not self.is_over:
            state = self._state
            moved = state(text, at)
            if moved == at and self._state == state:
                break
            at = moved
        self._held = text[at:] if not self.is_over else ""
        return self._read()

    def finish(self, *, is_cut: bool = False) -> Read:
        """What was held, when nothing follows. is_cut: the answer did not end by itself."""
        held, self._held = "" if self.is_over else self._held, ""
        if self._state == self._in_body and not is_cut and self._is_balanced(held):
            self._end_whole("".join((*self._body, held)), "")
        elif self._parameters is not None:
            rest = self._parameters.finish(held, is_cut=is_cut)
            self._add(self._parameters.take())
            if self._parameters.is_over:
                self._parameters, self._state = None, self._after
            if rest:  # behind a call of which a value's end was left out
                self._held = ""
                early = self.push(rest).parts
                late = self.finish(is_cut=is_cut).parts
                return _joined((*early, *late))
        elif self._object is not None:
            was_told = self._object.name is not None
            self._object.finish()
            self._tell_object(was_told)
            if self._object.is_broken:
                self._break(held)
        elif self._state == self._after or (self._state == self._opened and self._in_list and self._has_told):
            self._raw.clear()
        elif self._state in (self._start, self._text):
            self._say(held)
        elif self._arguments is None:
            self._break(held)
        if not self.num_calls:
            self._parts.append(self._white)
        self._white = ""
        return self._read()

    def _is_balanced(self, held: str) -> bool:
        """Whether no parameter of the call is cut, as far as its format tells."""
        parameters = self._format.writing.parameters
        if parameters is None or (self._whole is not None and self._whole.marks is not None):
            return True
        body = "".join((*self._body, held))
        before, after = parameters.before.partition("{")[0], parameters.after.strip()
        return not after or body.count(before) == body.count(after)

    def _read(self) -> Read:
        parts = tuple(part for part in self._parts if part)
        self._parts.clear()
        return _joined(parts)

    # Each of these is a state: it goes on from a place in the text, and says how far it came.

    def _start(self, text: str, at: int) -> int:
        """Nothing but white space has come of the answer."""
        end = _end(_WHITE, text, at)
        self._white += text[at:end]
        if end == len(text):
            return end
        self._state = self._text
        if text[end] in "{[":
            self._state, self._is_bare, self._num_before = self._opened, True, self.num_calls
        return end

    def _text(self, text: str, at: int) -> int:
        """Outside of calls."""
        begun = at
        while (found := self._firsts.search(text, at)) is not None:
            state = begins(text, found.start(), self._marks)
            if state == "whole":
                mark = next(each for each in self._marks if text.startswith(each, found.start()))
                self._say(text[begun : found.start()])
                if any(whole.begin == mark for whole in self._format.wholes):
                    return self._open(text, found.start(), found.start())
                return self._open(text, found.start(), found.start() + len(mark))
            if state == "part":
                self._say(text[begun : found.start()])
                return found.start()
            at = found.end()
        self._say(text[begun:])
        return len(text)

    def _open(self, text: str, begun: int, end: int) -> int:
        self._raw.append(text[begun:end])
        self._state, self._is_bare, self._num_before = self._opened, False, self.num_calls
        return end

    @property
    def _has_told(self) -> bool:
        """Whether a call has been told since its mark."""
        return self.num_calls > self._num_before

    def _opened(self, text: str, at: int) -> int:
        """Behind a mark; a call is to come."""
        end = _end(_BETWEEN if self._in_list else _WHITE, text, at)
        self._raw.append(text[at:end])
        if end == len(text):
            return end
        if self._in_list and text[end] == "]" and self._has_told:
            self._raw.clear()
            self._in_list, self._state = False, self._after
            return end + 1
        format = self._format
        wholes = [whole for whole in format.wholes if whole.begin]
        state = begins(text, end, [*(whole.begin for whole in wholes), *self._marks])
        if state == "part":
            return end
        if state == "whole":
            whole = next((each for each in wholes if text.startswith(each.begin, end)), None)
            if whole is not None:
                return self._begin_whole(whole, text, end)
            mark = next(each for each in self._marks if text.startswith(each, end))
            self._raw.append(mark)
            return end + len(mark)
        if format.has_objects and text[end] in "{[":
            return self._begin_object(text, end)
        inner = next((each for each in format.wholes if not each.begin), None)
        if inner is not None:
            return self._begin_whole(inner, text, end)
        if format.header is not None:
            self._state = self._in_header
            return end
        return self._break_at(end)

    def _begin_whole(self, whole: Whole, text: str, at: int) -> int:
        self._whole, self._body, self._state, self._is_odd = whole, [], self._in_body, False
        end = at + len(whole.begin)
        if whole.begin:
            self._body.append(text[at:end])
        return end

    def _begin_object(self, text: str, at: int) -> int:
        if text[at] == "[":
            if self._in_list:
                return self._break_at(at)
            self._in_list = True
            self._raw.append("[")
            return at + 1
        self._object = ObjectCall(self._all_ends, names=self._names if self._is_bare else None)
        self._state = self._in_object
        return at

    def _in_object(self, text: str, at: int) -> int:
        """Inside a call that is an object."""
        call = self._object
        assert call is not None
        was_told = call.name is not None
        end = call.push(text, at)
        if not was_told:
            self._raw.append(text[at:end])
        self._tell_object(was_told)
        if call.is_broken:
            return self._break_at(end)
        if call.is_over:
            self._object = None
            self._state = self._opened if self._in_list else self._after
        return end

    def _in_header(self, text: str, at: int) -> int:
        """Inside what says who is called, up to the arguments."""
        limit = at + MAX_HEADER_CHARS - sum(map(len, self._body))
        brace = text.find("{", at, limit)
        end = brace if brace >= 0 else min(len(text), limit)
        self._body.append(text[at:end])
        if brace < 0 and end < limit:
            return end
        header, self._body = "".join(self._body), []
        self._raw.append(header)
        assert self._format.header is not None
        found = self._format.header.fullmatch(header) if brace >= 0 else None
        if found is None:
            return self._break_at(end)
        self._tell(found["name"], found.groupdict().get("id"))
        self._arguments, self._state = Value("{", self._all_ends), self._in_arguments
        return end

    def _in_arguments(self, text: str, at: int) -> int:
        """Inside a JSON object of arguments."""
        assert self._arguments is not None
        end, piece = self._arguments.push(text, at)
        self._add(piece)
        if self._arguments.is_over:
            self._arguments, self._state = None, self._after
        return end

    def _in_body(self, text: str, at: int) -> int:
        """Inside a call that is read when it is whole."""
        whole = self._whole
        assert whole is not None
        if whole.marks is not None and not self._is_odd:
            mark, end = first_mark(text, at, whole.marks.begin, whole.end)
            self._body.append(text[at:end])
            at = end
            if mark == "none" or (mark == "begin" and self._begin_parameters(whole, whole.marks)):
                return end
        end = text.find(whole.end, at)
        if end < 0:
            end = len(text) - overlap(text, whole.end, at)
            self._body.append(text[at:end])
            return end
        self._body.append(text[at:end])
        self._end_whole("".join(self._body), whole.end)
        return end + len(whole.end)

    def _begin_parameters(self, whole: Whole, marks: Marks) -> bool:
        """The first parameter of a call comes. False where what stands before it is no head of one: then it is read
        when it is whole."""
        head = "".join(self._body)
        found = marks.head.fullmatch(head)
        name = "" if found is None else unquoted(found["name"])
        tool = next((tool for tool in self._tools if tool.name == name), None)
        if tool is None and not is_name(name):
            self._is_odd = True
            return False
        self._body, self._whole = [], None

        def read(parameters: str) -> Mapping[str, Any]:
            return whole.members(head + parameters, self._tools)

        self._parameters, self._state = (
            ParameterCall(marks, whole.end, tool, read, self._all_ends),
            self._in_parameters,
        )
        self._tell(name, None)
        return True

    def _in_parameters(self, text: str, at: int) -> int:
        """Inside a call that is told parameter by parameter."""
        assert self._parameters is not None
        end = self._parameters.push(text, at)
        self._add(self._parameters.take())
        if self._parameters.is_over:
            self._parameters, self._state = None, self._after
        return end

    def _end_whole(self, body: str, end: str) -> None:
        """Of a call that is there, with its end or, where the answer left that out, without."""
        whole, self._whole, self._body = self._whole, None, []
        assert whole is not None
        try:
            found = whole.parse(body if whole.is_inner else body + whole.end, self._tools)
        except ValueError:
            self._break(body + end)
            return
        self._state = self._after
        for call in found[:1] if self._is_single else found:
            self._tell(call.name, None)
            self._add(call.arguments)

    def _after(self, text: str, at: int) -> int:
        """Behind a call: marks that end it are dropped, and another may follow."""
        format = self._format
        end = _end(_BETWEEN, text, at)
        if end == len(text):
            self._white += text[at:end]
            return end
        state = begins(text, end, self._all_ends)
        if state == "part":
            self._white += text[at:end]
            return end
        ended = next((mark for mark in format.ends if text.startswith(mark, end)), None)
        if ended is not None:
            self._white = ""
            return end + len(ended)
        if text[end] in "]}" and format.has_objects and state == "none":  # one more than there should be
            self._white = ""
            return end + 1
        self._white += text[at:end]
        self._state = self._text
        if text[end] == "{" and format.has_objects:
            self._state, self._num_before = self._opened, self.num_calls
        return end

    # What is told

    def _say(self, text: str) -> None:
        """Words, but for the white space at their end."""
        words = text.rstrip()
        if words:
            self._parts += (self._white, words)
            self._white = ""
        self._white += text[len(words) :]

    def _tell_object(self, was_told: bool) -> None:
        """What has come of the object's call."""
        call = self._object
        assert call is not None
        if call.name is not None and not was_told:
            self._tell(call.name, None)
        self._add(call.take())

    def _tell(self, name: str, id: str | None) -> None:
        self._parts.append(CallPiece(self.num_calls, id or self._new_id(self._format), name, ""))
        self.num_calls += 1
        self._raw.clear()
        self._white = ""

    def _add(self, arguments: str) -> None:
        if arguments:
            self._parts.append(CallPiece(self.num_calls - 1, None, None, arguments))

    def _break_at(self, at: int) -> int:
        self._break("")
        return at

    def _break(self, rest: str) -> None:
        """What seemed a call was none: all that was kept is text."""
        words = "".join((*self._raw, *self._body, rest))
        self._raw.clear()
        self._body = []
        self._in_list, self._object, self._state, self._is_bare = False, None, self._text, False
        self._say(words)


def _joined(parts: tuple[str | CallPiece, ...]) -> Read:
    words = "".join(part for part in parts if isinstance(part, str))
    return Read(words, tuple(part for part in parts if isinstance(part, CallPiece)), parts)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    assert found is not None  # it matches nothing too
    return found.end()
