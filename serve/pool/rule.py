"""Members and the time in, the one thing to do next out: load, drain, unload, or wait until when. Changes nothing.

Whoever waits longest is served first. For it that model leaves which nobody uses and nobody has used longest. Where
all are in use, the one that has been ready longest takes no more requests and ends those that it has: not before it
has been ready for `min_resident_s`, so that two models that are asked for in turn change places a few times a minute
and not with each request, and not for longer than `max_drain_s`, so that one long answer starves nobody.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from serve.pool.member import Member

T = TypeVar("T")


@dataclass(frozen=True)
class Bounds:
    """Of a pool.

    max_resident    models that are loaded at once
    max_bytes       that they take together; None: whatever they do
    min_resident_s  for which a model that is in use stays at least
    max_drain_s     for which a model that is to leave lets its requests go on at most
    """

    max_resident: int = 1
    max_bytes: int | None = None
    min_resident_s: float = 5.0
    max_drain_s: float = 300.0


@dataclass(frozen=True)
class Step(Generic[T]):
    """What to do.

    look    see whether it is there at all, and how large, before another leaves for it
    load    bring it
    unload  let it go, with whatever requests it still has
    drain   it takes no more requests
    resume  it does again: another makes the room
    refuse  those who wait for it never get it
    wait    nothing, before `until_s`
    """

    kind: Literal["look", "load", "unload", "drain", "resume", "refuse", "wait"]
    member: Member[T] | None = None
    until_s: float = math.inf


def next_step(members: Sequence[Member[T]], bounds: Bounds, now_s: float) -> Step[T]:
    """The next thing to do in a pool in which nothing is under way."""
    wanted = _first_wanted(members)
    for member in members:
        if member.is_broken:
            return Step("unload", member)
    for member in members:
        if member.state == "draining":
            return _go_on(member, wanted, members, bounds, now_s)
    for member in members:
        if member.is_to_leave and member.state == "ready":
            return Step("drain", member)
    if wanted is not None:
        return _make_room(wanted, members, bounds, now_s)
    return _let_idle_go(members, now_s)


def _go_on(
    member: Member[T], wanted: Member[T] | None, members: Sequence[Member[T]], bounds: Bounds, now_s: float
) -> Step[T]:
    """Of a model that is on its way out."""
    if not member.leases:
        return Step("unload", member)
    if not member.is_to_leave and (wanted is None or _fits(wanted, members, bounds) or _idle(members)):
        return Step("resume", member)
    end_s = member.draining_since_s + bounds.max_drain_s
    return Step("unload", member) if now_s >= end_s else Step("wait", until_s=end_s)


def _make_room(wanted: Member[T], members: Sequence[Member[T]], bounds: Bounds, now_s: float) -> Step[T]:
    if not wanted.is_looked_at:
        return Step("look", wanted)
    if _fits(wanted, members, bounds):
        return Step("load", wanted)
    if not _fits(wanted, [member for member in members if member.terms.is_pinned], bounds):
        return Step("refuse", wanted)  # whoever may leave would leave in vain
    if idle := _idle(members):
        return Step("unload", min(idle, key=lambda member: member.used_s))
    busy = [member for member in members if member.state == "ready" and not member.terms.is_pinned]
    if not busy:
        return Step("refuse", wanted)
    longest = min(busy, key=lambda member: member.ready_since_s)
    end_s = longest.ready_since_s + bounds.min_resident_s
    return Step("drain", longest) if now_s >= end_s else Step("wait", until_s=end_s)


def _let_idle_go(members: Iterable[Member[T]], now_s: float) -> Step[T]:
    first = Step[T]("wait")
    for member in members:
        after_s = member.idle_s
        if after_s is None or not member.is_idle:
            continue
        end_s = member.used_s + after_s
        if now_s >= end_s:
            return Step("unload", member)
        if end_s < first.until_s:
            first = Step("wait", until_s=end_s)
    return first


def _first_wanted(members: Iterable[Member[T]]) -> Member[T] | None:
    """The model somebody has waited for longest."""
    asked = [
        (since_s, member)
        for member in members
        if member.state == "unloaded" and (since_s := member.wanted_since_s) is not None
    ]
    return min(asked, key=lambda pair: pair[0])[1] if asked else None


def _idle(members: Iterable[Member[T]]) -> list[Member[T]]:
    return [
        member
        for member in members
        if member.state == "ready" and not member.leases and not member.terms.is_pinned
    ]


def _fits(wanted: Member[T], members: Iterable[Member[T]], bounds: Bounds) -> bool:
    resident = [member for member in members if member.is_resident]
    if len(resident) >= bounds.max_resident:
        return False
    taken = sum(member.terms.num_bytes for member in resident)
    return bounds.max_bytes is None or taken + wanted.terms.num_bytes <= bounds.max_bytes
