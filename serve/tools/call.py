"""What is said of tools: one that a model may call, and a call of one, whole or piece by piece. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Tool:
    """A function that a model may call."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    """The JSON Schema of its arguments; None: it has none."""
    strict: bool = False
    """Arguments keep to the schema, by grammar."""

    def for_template(self) -> dict[str, Any]:
        """As chat templates and parsers know tools: OpenAI's object, with every field that they read."""
        function = {
            "name": self.name,
            "description": self.description or "",
            "parameters": dict(self.parameters or {"type": "object", "properties": {}}),
        }
        return {"type": "function", "function": function}


class CallPiece(NamedTuple):
    """What is new of one call of an answer."""

    index: int
    """Of the call in its answer."""
    id: str | None
    """In the first piece of a call only, as the name."""
    name: str | None
    arguments: str
    """What is added to the JSON text."""


@dataclass
class Call:
    """One call of an answer, as it grows."""

    id: str
    name: str
    arguments: str = ""
    """JSON as the model wrote it; where the answer was cut, or the model wrote no JSON, it is none."""


@dataclass
class Calls:
    """All of one answer."""

    made: list[Call] = field(default_factory=list)

    def add(self, piece: CallPiece) -> None:
        """Append what a piece brought."""
        if piece.id is not None:
            self.made.append(Call(piece.id, piece.name or ""))
        self.made[piece.index].arguments += piece.arguments


class Read(NamedTuple):
    """What a piece of an answer's text was found to say."""

    text: str
    """Outside of calls."""
    calls: tuple[CallPiece, ...] = ()
