"""What a request says its answer must be, as plain data: before it is compiled, and without llguidance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

ConstraintKind = Literal["json", "regex", "choice", "grammar"]


@dataclass(frozen=True)
class ConstraintSpec:
    """A rule for a whole answer. Two of the same kind and text are the same rule."""

    kind: ConstraintKind
    text: str
    """A JSON Schema or a list of strings as JSON; a regular expression; a Lark grammar or one in GBNF."""
    place: str = field(default="structured_outputs", compare=False)
    """Where it stands in the request: what an error is about."""

    @classmethod
    def of_schema(cls, schema: Any, place: str) -> ConstraintSpec:
        """Of a JSON Schema. The order of its properties counts: it is theirs in the answer."""
        return cls("json", json.dumps(schema, ensure_ascii=False, separators=(",", ":")), place)

    @classmethod
    def of_choices(cls, choices: Sequence[str], place: str) -> ConstraintSpec:
        """Of strings, one of which is the answer."""
        return cls("choice", json.dumps(list(choices)), place)
