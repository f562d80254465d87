"""What the schema of a tool's parameter lets its value be, and a text as a value of these. Plain data."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from serve.tools.scan import loads

MAX_DEPTH = 16
"""Of alternatives within alternatives."""
_KINDS = (
    ("boolean", bool),
    ("integer", int),
    ("number", float),
    ("string", str),
    ("array", list),
    ("object", dict),
    ("null", type(None)),
)
"""A boolean is an int in Python, so it stands first."""
_ALTERNATIVES = ("anyOf", "oneOf")


def alternatives(part: Any, root: Mapping[str, Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The schemas of which a value keeps to one: references within `root` followed, unions and lists of types apart.
    One of no kind in particular is given as it is."""
    if not isinstance(part, Mapping) or depth > MAX_DEPTH:
        yield {}
        return
    target = _target(part.get("$ref"), root)
    if target is not None:
        rest = {key: value for key, value in part.items() if key != "$ref"}
        yield from alternatives({**target, **rest}, root, depth + 1)
        return
    for key in _ALTERNATIVES:
        if isinstance(options := part.get(key), list) and options:
            rest = {name: value for name, value in part.items() if name != key}
            for option in options:
                own = option if isinstance(option, Mapping) else {}
                yield from alternatives({**rest, **own}, root, depth + 1)
            return
    if isinstance(kinds := part.get("type"), list):
        for kind in kinds:
            yield from _of_kind({**part, "type": kind})
        return
    yield part


def kind_of(value: Any) -> str:
    """The JSON type of a value."""
    return next(name for name, kind in _KINDS if isinstance(value, kind))


def kinds_of(part: Any, root: Mapping[str, Any]) -> frozenset[str] | None:
    """The JSON types that a value may have; None: not said."""
    kinds: set[str] = set()
    for option in alternatives(part, root):
        own = _kinds(option)
        if not own:
            return None
        kinds |= own
    return frozenset(kinds)


def read_value(text: str, part: Any, root: Mapping[str, Any]) -> tuple[bool, Any]:
    """Whether the text is a value that the schema's types let through, and that value: what JSON says, or Python, or
    the text itself."""
    kinds = kinds_of(part, root)
    if kinds is None:
        return False, None
    for value in _readings(text):
        kind = kind_of(value)
        fits = kind in kinds or (kind == "integer" and "number" in kinds)
        if fits and any(_is_among(value, option) for option in alternatives(part, root)):
            return True, value
    return False, None


def _readings(text: str) -> Iterator[Any]:
    try:
        yield loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text.strip())
            kind_of(value)
            yield value
        except (ValueError, SyntaxError, StopIteration, RecursionError, MemoryError):
            pass
    yield text


def _is_among(value: Any, option: Mapping[str, Any]) -> bool:
    """Whether an option's own list of values has it, if it has one."""
    listed = option.get("enum", [option["const"]] if "const" in option else None)
    return not isinstance(listed, list) or any(
        value == each and kind_of(value) == kind_of(each) for each in listed
    )


def _kinds(option: Mapping[str, Any]) -> set[str]:
    kind = option.get("type")
    if isinstance(kind, str):
        return {kind}
    listed = option.get("enum", [option["const"]] if "const" in option else None)
    return {kind_of(each) for each in listed} if isinstance(listed, list) else set()


def _of_kind(option: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The option less the values of other types; nothing where none is left."""
    listed, kind = option.get("enum"), option["type"]
    if not isinstance(listed, list):
        yield option
        return
    fitting = [
        each for each in listed if kind_of(each) == kind or (kind, kind_of(each)) == ("number", "integer")
    ]
    if fitting:
        yield {**option, "enum": fitting}


def _target(reference: Any, root: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a reference within the schema means; None for one that leads elsewhere."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: Any = root
    for name in reference[2:].split("/"):
        name = name.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or name not in found:
            return None
        found = found[name]
    return found if isinstance(found, Mapping) else None
