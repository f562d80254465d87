"""What only an admin's key may do, where there are keys."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends

from serve.api.exchange import current
from serve.api.state import AppState, StateDep
from serve.errors import ForbiddenError


def check_admin(state: AppState) -> None:
    """ForbiddenError for a key that may only ask. Without keys everybody may do everything, as ever."""
    exchange = current()
    if state.keys is None or exchange is None:
        return
    key = exchange.key
    if key is None or not key.is_admin:
        name = "a request without a key" if key is None else f"key {key.name!r}"
        raise ForbiddenError(f"{name} may not do this: it takes a key with admin: true")


async def _check_admin(state: StateDep) -> None:
    check_admin(state)


def may_change(state: AppState) -> bool:
    """Whether whoever asks may change the server."""
    exchange = current()
    return state.keys is None or bool(exchange and exchange.key and exchange.key.is_admin)


ADMIN = Depends(_check_admin)
"""Among the `dependencies` of each route that changes the server, or shows what is everybody's."""


async def _sees_all(state: StateDep) -> bool:
    return may_change(state)


SeesAllDep = Annotated[bool, Depends(_sees_all)]
"""Whether whoever asks may see what others do."""


def has_name_of_ours(state: AppState) -> bool:
    """Whether whoever asks has shown a key, or none is needed."""
    exchange = current()
    return state.keys is None or bool(exchange and exchange.key)
