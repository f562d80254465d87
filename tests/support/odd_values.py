"""What a JSON value may be and nobody expects, and how to put it anywhere into a body."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

Place = tuple[str | int, ...]

EDGES = [0, -1, 1, 1.5, 16.0, -0.0, 5e-324, -5e-324, 1e-45, 1e38, 1e39, 1e308, -1e308, True, "1", "x", None]
EDGES += [sign * (2**bits + plus) for bits in (31, 32, 53, 63, 64) for plus in (-1, 0) for sign in (1, -1)]
EDGES += [10**400, -(10**400)]
ODD = [
    {"type": {}},
    [{"type": None}],
    None,
    {},
    [],
    [[]],
    [{}],
    {"type": []},
    [{"type": {}}],
    [None],
    True,
    "",
    0,
]
ODD += [1.5, [[[]]], {"": ""}, ["text"], "\x00", "x" * 10_000, [0] * 1000, {str(i): i for i in range(200)}]


def edges_of(number: int) -> list[Any]:
    """For the field of that number: a third of EDGES, another one for the next. Fields are read by a few types, which
    so meet them all."""
    return ["x", *EDGES[number % 3 :: 3]]


def places(value: Any, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value inside `value`, with where it stands."""
    if at:
        yield at, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*at, key))


def with_(body: dict, place: Place, value: Any) -> dict:
    """`body` with `value` at `place`."""
    changed = copy.deepcopy(body)
    inside: Any = changed
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    return changed


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_switch(how: dict[str, Any]) -> bool:
    """Whether a field of this JSON schema is true, false or left out."""
    return {each.get("type") for each in how.get("anyOf", [how])} <= {"boolean", "null"}
