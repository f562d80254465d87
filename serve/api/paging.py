"""Pages of a list, in the words that OpenAI's and Anthropic's lists share: ids of the first and the last, and whether
there is more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.errors import RequestError

Items = Sequence[dict[str, Any]]


def after(items: Items, id: str | None, param: str) -> Items:
    """What stands behind the item of that id; all, if there is none to stand behind. RequestError."""
    return items if id is None else items[_index(items, id, param) + 1 :]


def before(items: Items, id: str | None, param: str) -> Items:
    """What stands before it. RequestError."""
    return items if id is None else items[: _index(items, id, param)]


def page(items: Items, limit: int | None, *, is_last: bool = False) -> dict[str, Any]:
    """The first so many, or the last; all without a limit."""
    found = list(items if limit is None else items[-limit:] if is_last else items[:limit])
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else None,
        "last_id": found[-1]["id"] if found else None,
        "has_more": len(found) < len(items),
    }


def _index(items: Items, id: str, param: str) -> int:
    for index, item in enumerate(items):
        if item["id"] == id:
            return index
    raise RequestError(f"{param}: there is no {id!a:.120} in this list", param)
