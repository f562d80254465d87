"""What every object in a request's body is: fields that are known, in JSON's own types.

Unknown fields are refused by name, fields that Lathe does not do are taken with their neutral values only, and hints
are taken.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from serve.errors import RequestError

MAX_UNKNOWN = 16
MAX_NAME_CHARS = 80

Neutral = Mapping[str, tuple[Any, ...]]


class Body(BaseModel):
    """Base of every request body. A number without a fraction is an integer, however it was written."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    neutral: ClassVar[Neutral] = {}
    """Fields that exist elsewhere and have no effect here, with the values that ask for no effect."""

    hints: ClassVar[frozenset[str]] = frozenset()
    """Fields that exist elsewhere and ask nothing of the answer, whatever their value."""

    @model_validator(mode="before")
    @classmethod
    def _take_out_fields_without_effect(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known, integers = _names(cls), _integer_fields(cls)
        if len(data) > len(known) + MAX_UNKNOWN:
            unknown = next(name for name in data if name not in known)
            name = unknown[:MAX_NAME_CHARS]
            raise RequestError(f"{name}: unknown field, one of {len(data)} fields", name)
        for name, allowed in () if data.keys().isdisjoint(cls.neutral) else cls.neutral.items():
            if name in data and not any(_same(data[name], value) for value in allowed):
                choices = " or ".join(dict.fromkeys(_json(value) for value in allowed))
                raise RequestError(
                    f"{name}: found {_json(data[name])}; Lathe does not do this, so only {choices} is accepted",
                    name,
                )
        return {
            name: _as_integer(value) if name in integers else value
            for name, value in data.items()
            if name not in cls.neutral and name not in cls.hints
        }

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        """With the fields that have no effect."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        properties = schema.setdefault("properties", {})
        properties |= {name: {"enum": list(allowed)} for name, allowed in cls.neutral.items()}
        properties |= {name: {"description": "A hint, taken without effect."} for name in sorted(cls.hints)}
        return schema

    @classmethod
    def closest_field(cls, name: str) -> str | None:
        """A field that `name` may be a misspelling of."""
        names = [*cls.model_fields, *cls.neutral, *cls.hints]
        close = difflib.get_close_matches(name[:MAX_NAME_CHARS], names, n=1, cutoff=0.7)
        return close[0] if close else None


B = TypeVar("B", bound=Body)


def made_of(body: type[B], fields: Mapping[str, Any]) -> B:
    """A body that another one was translated into. RequestError names the first field that is wrong."""
    try:
        return body.model_validate(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, RequestError):
            raise cause from None
        place = ".".join(map(str, problem["loc"])) or "the body"
        param = str(problem["loc"][0]) if problem["loc"] else None
        raise RequestError(f"{place}: {problem['msg']}", param) from None


def _same(found: Any, allowed: Any) -> bool:
    """Equal, and a boolean only to a boolean (in Python, True == 1)."""
    return bool(found == allowed) and isinstance(found, bool) == isinstance(allowed, bool)


@cache
def _names(body: type[Body]) -> frozenset[str]:
    """All that a client may send."""
    return frozenset((*body.model_fields, *body.neutral, *body.hints))


@cache
def _integer_fields(body: type[Body]) -> frozenset[str]:
    """Fields of `body` that hold one integer."""
    return frozenset(
        name
        for name, field in body.model_fields.items()
        if field.annotation is int or int in map(_bare, get_args(field.annotation))
    )


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _as_integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
