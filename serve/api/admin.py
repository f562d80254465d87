"""What only an admin's key may do, where there are keys; and which models a key may ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from fastapi import Depends

from serve.adapters.sums.expression import parse_expression
from serve.api.bases import Bases
from serve.api.exchange import current
from serve.api.state import AppState, StateDep
from serve.errors import ForbiddenError, RequestError
from serve.keys.key import Key

VERSION = re.compile(r"@\d+\Z")


def _admin(state: StateDep) -> None:
    """ForbiddenError for a key that may only ask. Without keys everybody may do everything, as ever."""
    exchange = current()
    if state.keys is None or exchange is None:
        return
    key = exchange.key
    if key is None or not key.is_admin:
        name = "a request without a key" if key is None else f"key {key.name!r}"
        raise ForbiddenError(f"{name} may not do this: it takes a key with admin: true")


ADMIN = Depends(_admin)
"""Among the `dependencies` of each route that changes the server, or shows what is everybody's."""


def _sees_all(state: StateDep) -> bool:
    exchange = current()
    return state.keys is None or bool(exchange and exchange.key and exchange.key.is_admin)


SeesAllDep = Annotated[bool, Depends(_sees_all)]
"""Whether whoever asks may see what others do."""


def has_name_of_ours(state: AppState) -> bool:
    """Whether whoever asks has shown a key, or none is needed."""
    exchange = current()
    return state.keys is None or bool(exchange and exchange.key)


def may_ask(name: str) -> bool:
    """Whether the key of this request may ask for a model of that name."""
    exchange = current()
    return exchange is None or exchange.key is None or exchange.key.allows(name)


def check_name(name: str) -> None:
    """ForbiddenError where the request's key may not ask for what is called so and nothing else."""
    exchange = current()
    if exchange is not None and exchange.key is not None and not exchange.key.allows(name):
        raise _forbidden(exchange.key, name)


def check_model(bases: Bases, model: str) -> None:
    """ForbiddenError where the request's key may not ask for `model`, or for one of the adapters that it adds up.

    By names alone, before anything is looked up or loaded.
    """
    exchange = current()
    key = exchange.key if exchange else None
    if key is None or key.models is None:
        return
    for name in _names_in(bases, model):
        base = bases.find(name)  # an alias stands for what it is an alias of
        if not _allows(key, name) and not (base is not None and key.allows(base.name)):
            raise _forbidden(key, name, "" if name == model else f" ({model!a:.200} adds it)")


def _names_in(bases: Bases, model: str) -> Sequence[str]:
    """What `model` names: itself, or the adapters that it adds up; nothing where it cannot be read and is refused."""
    if model in bases.experiments.runs or bases.find(model) is not None:
        return [model]
    try:
        terms = parse_expression(model, lambda name: bases.of_adapter(name) is not None)
    except RequestError:
        return []
    return [model] if terms is None else [term.name for term in terms]


def _forbidden(key: Key, name: str, part: str = "") -> ForbiddenError:
    may = ", ".join(key.models or ())
    return ForbiddenError(f"key {key.name!r} may not ask for model {name!a:.200}{part}; it may ask for {may}")


def _allows(key: Key, name: str) -> bool:
    return key.allows(name) or key.allows(VERSION.sub("", name))
