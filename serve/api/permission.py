"""What the key of a request may ask for, by names alone: before anything is looked up, loaded or connected."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from serve.adapters.sums.expression import parse_expression
from serve.api.exchange import current
from serve.errors import ForbiddenError, RequestError
from serve.keys.key import Key

if TYPE_CHECKING:
    from serve.api.bases import Bases

VERSION = re.compile(r"@\d+\Z")


def may_ask(name: str) -> bool:
    """Whether the key of this request may ask for a model of that name."""
    exchange = current()
    return exchange is None or exchange.key is None or exchange.key.allows(name)


def name_to_ask_by(name: str, aliases: Sequence[str] = ()) -> str | None:
    """The first of a model's names by which the key of this request may ask for it."""
    return next((each for each in (name, *aliases) if may_ask(each)), None)


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


def check_tools_of(server: str) -> None:
    """ForbiddenError where the request's key may not have tools of that MCP server run."""
    exchange = current()
    key = exchange.key if exchange else None
    if key is not None and not key.allows_tools_of(server):
        may = ", ".join(key.mcp_servers or ()) or "none"
        raise ForbiddenError(
            f"key {key.name!r} may not use tools of MCP server {server!a:.200}; it may use those of {may}"
        )


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
