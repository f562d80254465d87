"""Several models, of which some are loaded: who asks for one gets a lease on it, now or once it has been brought.

A model is loaded once, however many ask for it, and stays as long as anybody has a lease. One thread loads and
unloads, one thing at a time; what it does next is `rule`'s. A load that fails answers everybody who waited; the
next who asks has it tried again. What broke while it was loaded goes at once and is loaded anew by the next who asks;
one that breaks again and again is left alone for a while. Who no longer wants to wait leaves, and holds up nobody.
Safe to call from any thread.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from serve.errors import (
    ForbiddenError,
    LatheError,
    ModelLoadError,
    NotFoundError,
    OverloadedError,
    StoppedError,
)
from serve.pool.member import Member, State, Terms
from serve.pool.rule import Bounds, Step, next_step

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_WAITERS = 1024
"""For one model."""
FULL_RETRY_AFTER_S = 10.0
STEADY_S = 300.0
"""What breaks after so long breaks for the first time."""
FIRST_BACK_OFF_S, MAX_BACK_OFF_S = 1.0, 60.0
"""How long a model stays away that has broken twice in a row; and at most, doubled each time."""


@dataclass(frozen=True)
class Standing:
    """A model as it is now."""

    name: str
    state: State
    is_pinned: bool
    num_leases: int
    num_waiters: int
    num_loads: int
    num_failed: int
    load_s: float
    problem: str | None
    """Of the last load, or of what was loaded; None: there was none."""
    num_breaks: int
    """In a row, of what was loaded; it may be loaded again `retry_s` from now."""
    retry_s: float
    idle_s: float | None
    """It leaves so long from now, if nobody asks for it; None: it does not, or is not there."""


class Lease(Generic[T]):
    """Keeps a model loaded until it is released, by whoever has it, once or several times."""

    def __init__(self, pool: Pool[T], member: Member[T], loaded: T) -> None:
        self.loaded = loaded
        self._pool = pool
        self._member = member

    def again(self) -> Lease[T]:
        """Another on the same model, to be released too. StoppedError where this one's time is over."""
        return self._pool._again(self._member, self)

    def release(self) -> None:
        """The model may go, for all that this one cares."""
        self._pool._release(self._member, self)


class Waiter(Generic[T]):
    """Somebody's turn to get a lease. Whoever has it either takes the lease or leaves."""

    def __init__(self, pool: Pool[T], member: Member[T], asked_s: float, *, tells: bool = False) -> None:
        """tells: why there is no lease is told by whoever waits, and not logged too."""
        self.asked_s = asked_s
        self.tells = tells
        self.future: Future[Lease[T]] = Future()
        self._pool = pool
        self._member = member

    @property
    def is_served(self) -> bool:
        """The lease is there, or why there is none."""
        return self.future.done()

    async def taken(self) -> Lease[T]:
        """The lease, once it is there, or what loading raised. Cancelled, the turn is still held."""
        if self.future.done():
            return self.future.result()
        return await asyncio.shield(asyncio.wrap_future(self.future))

    def leave(self) -> None:
        """Give up the turn, or the lease if it has come."""
        self._pool._leave(self._member, self)


class Pool(Generic[T]):
    """Models by name. `start` before the first is to be brought, `close` after.

    look   the bytes that a model will take, as far as it can be told; raises LatheError where it cannot be loaded
    load   brings it; raises LatheError. All four run on the pool's thread
    stop   ends it: what still runs in it fails, its threads are joined
    tidy   once nothing refers to it any more: memory goes back

    failure  by what it has become useless; None: it has not. Of any thread
    """

    def __init__(
        self,
        look: Callable[[str], int],
        load: Callable[[str], T],
        stop: Callable[[T], None],
        tidy: Callable[[], None],
        bounds: Bounds = Bounds(),
        clock: Callable[[], float] = time.monotonic,
        failure: Callable[[T], BaseException | None] = lambda _: None,
    ) -> None:
        self._look = look
        self._load = load
        self._stop = stop
        self._tidy = tidy
        self._bounds = bounds
        self._clock = clock
        self._failure = failure
        self._changed = threading.Condition()  # guards what follows
        self._members: dict[str, Member[T]] = {}
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="lathe-models", daemon=True)

    def add(self, name: str, terms: Terms) -> None:
        """A model that may be asked for from now on; nothing where it is known already."""
        with self._changed:
            self._members.setdefault(name, Member(name, terms))

    def adopt(self, name: str, loaded: T) -> None:
        """A model that is loaded, by somebody who ends it after the pool: it never leaves."""
        member = Member(name, Terms(is_pinned=True), state="ready", loaded=loaded, num_loads=1)
        member.ready_since_s = member.used_s = self._clock()
        with self._changed:
            self._members[name] = member

    @property
    def is_started(self) -> bool:
        """Whether models are brought."""
        return self._thread.ident is not None

    def start(self) -> None:
        """From here on models are brought."""
        self._thread.start()

    def close(self) -> None:
        """End everything that was loaded here; who waits hears of it."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # Who uses a model

    def ask(self, name: str, *, tells: bool = False) -> Waiter[T]:
        """A turn to use a model, which is served at once where it is loaded. tells: as Waiter has it.

        NotFoundError; OverloadedError where too many wait; StoppedError.
        """
        with self._changed:
            member = self._members.get(name)
            if member is None:
                raise NotFoundError(f"no model {name!a:.200} is configured here")
            if self._is_closing:
                raise StoppedError("the server is shutting down")
            self._notice(member)
            if member.retry_s > self._clock():
                raise OverloadedError(
                    f"model {name!r} has broken {member.num_breaks} times in a row, and is not loaded again yet: "
                    f"{member.problem}",
                    member.retry_s - self._clock(),
                )
            if len(member.waiters) >= MAX_WAITERS:
                raise OverloadedError(
                    f"{MAX_WAITERS} requests wait for model {name!r} to be loaded", FULL_RETRY_AFTER_S
                )
            waiter = Waiter(self, member, self._clock(), tells=tells)
            member.waiters.append(waiter)
            if member.state == "ready" and not member.is_broken:
                self._serve(member)
            else:
                self._changed.notify_all()
            return waiter

    def lease(self, name: str) -> Lease[T]:
        """As `ask`, and waits; why it cannot be loaded is raised, and not logged too. Not for an event loop."""
        return self.ask(name, tells=True).future.result()

    def lease_if_loaded(self, name: str) -> Lease[T] | None:
        """A lease on a model that takes requests; None where it does not, and then it is not brought."""
        with self._changed:
            member = self._members.get(name)
            if member is None or member.state != "ready" or self._is_closing or self._notice(member):
                return None
            assert member.loaded is not None
            return self._lend(member, member.loaded)

    def unload(self, name: str) -> Future[None]:
        """Let a model go once its requests have ended, a pinned one too; done once it has gone. NotFoundError."""
        done: Future[None] = Future()
        with self._changed:
            member = self._members.get(name)
            if member is None:
                raise NotFoundError(f"no model {name!a:.200} is configured here")
            if member.state == "unloaded" and not member.waiters:
                done.set_result(None)
            elif not self._thread.is_alive():
                done.set_exception(
                    ForbiddenError(f"model {name!r} is the only one of this server, and stays")
                )
            else:
                member.is_to_leave = True
                member.leavers.append(done)
                self._changed.notify_all()
        return done

    def keep(self, name: str, idle_s: float) -> None:
        """Let a model that is loaded, or about to be, leave once nobody has asked for it for so long; 0: as soon as
        nobody has it; inf: never, but for another. That holds until it has left. A pinned one stays."""
        with self._changed:
            member = self._members[name]
            if member.is_resident or member.waiters:
                member.keep_s = idle_s
                self._changed.notify_all()

    def loaded(self) -> Mapping[str, T]:
        """Models in memory by name, without a hold on them: for a look."""
        with self._changed:
            return {
                member.name: member.loaded for member in self._members.values() if member.loaded is not None
            }

    def standings(self) -> list[Standing]:
        """Every model as it is now."""
        with self._changed:
            now_s = self._clock()
            for member in self._members.values():
                self._notice(member)
            return [
                Standing(
                    member.name,
                    member.state,
                    member.terms.is_pinned,
                    len(member.leases),
                    len(member.waiters),
                    member.num_loads,
                    member.num_failed,
                    member.load_s,
                    member.problem,
                    member.num_breaks,
                    max(member.retry_s - now_s, 0.0),
                    self._leaves_in(member, now_s),
                )
                for member in self._members.values()
            ]

    def charge(self, name: str, num_bytes: int) -> None:
        """What a model turned out to take."""
        with self._changed:
            member = self._members[name]
            member.terms = replace(member.terms, num_bytes=num_bytes)

    def check_integrity(self) -> None:
        """Between two requests: states, leases and waiters agree."""
        with self._changed:
            members = list(self._members.values())
            for member in members:
                has_it = member.state in ("ready", "draining")
                is_sure = member.state != "unloading"  # it is there until it has stopped
                assert not is_sure or (member.loaded is not None) == has_it, (
                    f"{member.name} is {member.state}"
                )
                assert has_it or not member.leases, f"{member.name} is {member.state} and leased"
                is_held_back = member.state != "ready" or member.is_broken
                assert is_held_back or not member.waiters, f"{member.name} is not handed out"
            resident = sum(member.is_resident for member in members)
            assert resident <= max(self._bounds.max_resident, 1), f"{resident} models are resident"

    # Under the lock

    def _notice(self, member: Member[T]) -> bool:
        """Whether what is loaded is of no use any more; then it goes, where somebody can bring it again."""
        if member.is_broken or member.state not in ("ready", "draining") or not self.is_started:
            return member.is_broken
        assert member.loaded is not None
        failure = self._failure(member.loaded)
        if failure is None:
            return False
        now_s = self._clock()
        is_first = now_s - member.ready_since_s >= STEADY_S
        member.num_breaks = 1 if is_first else member.num_breaks + 1
        if member.num_breaks > 1:
            member.retry_s = now_s + min(FIRST_BACK_OFF_S * 2.0 ** (member.num_breaks - 2), MAX_BACK_OFF_S)
        member.is_broken, member.problem = True, f"it broke: {failure!r}"
        self._changed.notify_all()
        return True

    def _leaves_in(self, member: Member[T], now_s: float) -> float | None:
        if member.idle_s is None or math.isinf(member.idle_s) or member.state not in ("ready", "draining"):
            return None
        return max((member.used_s if member.is_idle else now_s) + member.idle_s - now_s, 0.0)

    def _lend(self, member: Member[T], loaded: T) -> Lease[T]:
        lease = Lease(self, member, loaded)
        member.leases.add(lease)
        member.used_s = self._clock()
        return lease

    def _serve(self, member: Member[T]) -> None:
        """Everybody who waits for it gets a lease."""
        assert member.loaded is not None
        while member.waiters:
            waiter = member.waiters.popleft()
            lease = self._lend(member, member.loaded)
            waiter.future.set_result(lease)

    def _refuse(self, member: Member[T], error: LatheError) -> None:
        """Nobody who waits for it gets one. Each has an error of their own: what is raised keeps who raised it."""
        while member.waiters:
            member.waiters.popleft().future.set_exception(copy.copy(error))

    # Called by leases and waiters

    def _again(self, member: Member[T], lease: Lease[T]) -> Lease[T]:
        with self._changed:
            if lease not in member.leases:
                raise StoppedError(f"model {member.name!r} has been unloaded")
            return self._lend(member, lease.loaded)

    def _release(self, member: Member[T], lease: Lease[T]) -> None:
        with self._changed:
            if lease not in member.leases:
                return
            member.leases.remove(lease)
            member.used_s = self._clock()
            self._notice(member)
            if not member.leases:
                self._changed.notify_all()

    def _leave(self, member: Member[T], waiter: Waiter[T]) -> None:
        with self._changed:
            if waiter in member.waiters:
                member.waiters.remove(waiter)
                waiter.future.cancel()
                self._changed.notify_all()
                return
        if not waiter.future.cancelled() and waiter.future.exception() is None:
            waiter.future.result().release()

    # The pool's thread

    def _run(self) -> None:
        try:
            while (step := self._awaited_step()) is not None:
                self._do(step)
        except Exception:  # nobody would load anything any more, and everybody would wait
            logger.exception("the models' thread has failed")
        self._end()

    def _awaited_step(self) -> Step[T] | None:
        """The next thing to load or to let go; None: close."""
        with self._changed:
            while not self._is_closing:
                now_s = self._clock()
                step = next_step(list(self._members.values()), self._bounds, now_s)
                if step.kind == "wait":
                    self._changed.wait(None if math.isinf(step.until_s) else max(step.until_s - now_s, 0.001))
                elif self._is_work(step, now_s):
                    return step
        return None

    def _is_work(self, step: Step[T], now_s: float) -> bool:
        """Whether a step is to be done without the lock; one that is not is done here."""
        member = step.member
        assert member is not None
        match step.kind:
            case "drain":
                member.state, member.draining_since_s = "draining", now_s
            case "resume":
                member.state = "ready"
                self._serve(member)
            case "refuse":
                member.is_looked_at = False
                self._refuse(member, self._no_room(member))
            case _:
                if step.kind != "look":
                    member.state = "loading" if step.kind == "load" else "unloading"
                return True
        return False

    def _do(self, step: Step[T]) -> None:
        assert step.member is not None
        work = {"look": self._see, "load": self._bring, "unload": self._let_go}[step.kind]
        try:
            work(step.member)
        except LatheError as problem:
            error = ModelLoadError(f"model {step.member.name!r} cannot be loaded: {problem}", _bare(problem))
            if not self._is_told(step.member):
                logger.warning("%s", error)
        except BaseException as problem:  # whatever it is, everybody who waits must hear of it
            logger.exception("model %r cannot be loaded", step.member.name)
            error = ModelLoadError(f"model {step.member.name!r} cannot be loaded: {problem!r}")
        else:
            return
        self._fail(step.member, error)

    def _is_told(self, member: Member[T]) -> bool:
        """Somebody who waits for it tells why it cannot be loaded."""
        with self._changed:
            return any(waiter.tells for waiter in member.waiters)

    def _see(self, member: Member[T]) -> None:
        num_bytes = self._look(member.name)
        with self._changed:
            member.is_looked_at = True
            member.terms = replace(member.terms, num_bytes=max(num_bytes, member.terms.num_bytes))

    def _bring(self, member: Member[T]) -> None:
        started_s = self._clock()
        loaded = self._load(member.name)
        with self._changed:
            now_s = self._clock()
            member.state, member.loaded, member.problem = "ready", loaded, None
            member.ready_since_s = member.used_s = now_s
            member.num_loads += 1
            member.load_s += now_s - started_s
            member.is_looked_at = False
            self._serve(member)

    def _fail(self, member: Member[T], error: ModelLoadError) -> None:
        with self._changed:
            member.state, member.problem = "unloaded", str(error)
            member.num_failed += 1
            member.is_looked_at = False
            self._refuse(member, error)
            self._told(member)
        self._tidy()

    def _let_go(self, member: Member[T]) -> None:
        with self._changed:
            loaded = member.loaded
            member.leases.clear()  # of those whose time is over; they fail as it stops
        assert loaded is not None
        try:
            self._stop(loaded)
        except Exception:  # the others go on
            logger.exception("model %r did not end well", member.name)
        with self._changed:
            member.loaded = None  # and not before: what it knows is asked for until it has been kept
        del loaded
        self._tidy()
        with self._changed:
            member.state, member.is_broken, member.keep_s = "unloaded", False, None
            self._told(member)
            self._changed.notify_all()

    def _told(self, member: Member[T]) -> None:
        member.is_to_leave = False
        for leaver in member.leavers:
            if leaver.set_running_or_notify_cancel():  # who asked may have gone meanwhile
                leaver.set_result(None)
        member.leavers.clear()

    def _end(self) -> None:
        """Everything that was loaded here; nobody gets anything any more."""
        with self._changed:
            self._is_closing = True
            for member in self._members.values():
                self._refuse(member, StoppedError("the server is shutting down"))
            leaving = [member for member in self._members.values() if member.loaded is not None]
            for member in leaving:
                member.state = "unloading"
            for member in self._members.values():
                if member not in leaving:
                    self._told(member)
        for member in leaving:
            self._let_go(member)

    def _no_room(self, member: Member[T]) -> OverloadedError:
        pinned = [each.name for each in self._members.values() if each.is_resident]
        room = f"{self._bounds.max_resident} may be loaded at once"
        if self._bounds.max_bytes is not None:
            room += f", of {self._bounds.max_bytes / 2**30:.3g} GiB together"
        needs = f" and needs {member.terms.num_bytes / 2**30:.3g} GiB" if member.terms.num_bytes else ""
        return OverloadedError(
            f"model {member.name!r} is not loaded{needs}, and there is no room for it: {room}, and none of "
            f"{', '.join(pinned) or 'the others'} may leave for it"
        )


def _bare(error: LatheError) -> LatheError:
    """The same, without the frames that raised it: they hold what was half loaded."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
