"""A function that a model may call, and what an answer's text was found to say. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from serve.tools.call import CallPiece


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


def properties_of(tool: Tool) -> Mapping[str, Any]:
    """The schemas of its parameters, by name."""
    properties = (tool.parameters or {}).get("properties")
    return properties if isinstance(properties, Mapping) else {}


class Read(NamedTuple):
    """What a piece of an answer's text was found to say."""

    text: str
    """Outside of calls."""
    calls: tuple[CallPiece, ...] = ()
    parts: tuple[str | CallPiece, ...] = ()
    """Both, in the order in which they were said."""
