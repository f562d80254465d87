"""One way to write calls: the marks around them, how they are read, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from serve.tools.parameters import Marks
from serve.tools.parsers import Parse
from serve.tools.scan import loads
from serve.tools.tool import Tool


class Whole(NamedTuple):
    """A call that is read when all of it is there."""

    begin: str
    """"" : any text."""
    end: str
    parse: Parse
    """Of what begins with `begin` and goes up to `end`."""
    is_inner: bool = False
    """`parse` gets what is between the two."""
    marks: Marks | None = None
    """How its parameters are written, where they are told as they come."""

    def members(self, text: str, tools: Sequence[Tool]) -> Mapping[str, Any]:
        """The arguments of a call whose end alone is missing; none where it is no call."""
        try:
            found = self.parse(text if self.is_inner else text + self.end, tools)
        except ValueError:
            return {}
        arguments: Mapping[str, Any] = loads(found[0].arguments)
        return arguments


class Parameters(NamedTuple):
    """How arguments are written one by one. `{name}` stands for the parameter's, `{kind}` for the value's JSON type,
    `{is_text}` for whether it is a text: true or false."""

    before: str
    after: str
    joint: str = ""
    quotes: tuple[str, str] | None = ("", "")
    """Around texts; None: they are JSON."""
    names: re.Pattern[str] = re.compile(r"""[^\s<>"'](?:[^<>"\n]*[^\s<>"'])?""")
    """Of parameters that can be written."""

    def opening(self, name: str, kind: str) -> str:
        """What stands before the value of a parameter, of that JSON type."""
        told = "number" if kind == "integer" else kind
        is_text = "true" if kind == "string" else "false"
        return self.before.replace("{name}", name).replace("{kind}", told).replace("{is_text}", is_text)

    @property
    def says_kinds(self) -> bool:
        """Whether the value's type stands before it."""
        return "{kind}" in self.before or "{is_text}" in self.before


class Headers(NamedTuple):
    """What messages of an answer begin with where a header says of each what it is, and how one is followed by the
    next. A call's header is its Writing's."""

    thought: str
    words: str
    """That are said before a call."""
    answer: str
    following: str


class Writing(NamedTuple):
    """How a model writes calls where a grammar says that it must. `{name}` stands for the function's."""

    before: str
    after: str
    joint: str = ""
    parameters: Parameters | None = None
    """None: the arguments are a JSON object."""
    opening: str = ""
    """Before the first call."""
    closing: str = ""
    """After the last."""
    headers: Headers | None = None
    """None: what is no call has none."""


@dataclass(frozen=True)
class ToolFormat:
    """One way to write calls."""

    name: str
    marks: tuple[str, ...]
    """Where calls begin, in free text."""
    writing: Writing = field(kw_only=True)
    ends: tuple[str, ...] = ()
    """What may follow a call, and is dropped."""
    has_objects: bool = False
    """Calls are JSON objects, or lists of them."""
    header: re.Pattern[str] | None = None
    """What stands before a JSON object: who is called, and perhaps by which id."""
    wholes: tuple[Whole, ...] = ()
    bare: bool = False
    """An answer that is nothing but the JSON of known functions' calls is those."""
    tokens: tuple[str, ...] = ()
    """Special tokens inside calls, beside those of the marks."""
    end_tokens: tuple[str, ...] = ()
    """Special tokens after which the tool's answer is due."""
    short_ids: bool = False
    """Calls have ids of nine letters and digits, as Mistral's templates demand."""
    signs: tuple[tuple[str, ...], ...] = ()
    """A template that holds all of one group is this format's."""
    vocabulary: tuple[str, ...] = ()
    """Tokens that tell the format, where no template does."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All that it knows as marks."""
        wholes = (text for whole in self.wholes for text in (whole.begin, whole.end) if text)
        return tuple(dict.fromkeys((*self.marks, *self.ends, *wholes, *self.tokens)))
