"""Several models of which some are loaded: laws on tiny ones, and on a clock that the test turns."""

from __future__ import annotations

import asyncio
import gc
import math
import random
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from waiting import until

from serve.errors import ModelError, ModelLoadError, NotFoundError, OverloadedError, StoppedError
from serve.pool.member import Member, Terms
from serve.pool.pool import Lease, Pool
from serve.pool.rule import Bounds, next_step


class Thing:
    """A loaded model that knows its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_stopped = False


class Shop:
    """A pool of Things, and what was done to them."""

    def __init__(self, bounds: Bounds) -> None:
        self.loads: list[str] = []
        self.stops: list[str] = []
        self.resident: set[str] = set()
        self.most_resident = 0
        self.doors: dict[str, threading.Event] = {}
        """A load of that name waits until it is open."""
        self.failing: dict[str, BaseException] = {}
        self.missing: set[str] = set()
        self.pool: Pool[Thing] = Pool(self.look, self.load, self.stop, lambda: None, bounds)

    def look(self, name: str) -> int:
        if name in self.missing:
            raise NotFoundError(f"no model folder at {name}")
        return 0

    def load(self, name: str) -> Thing:
        self.loads.append(name)
        if (door := self.doors.get(name)) is not None:
            assert door.wait(30)
        if name in self.failing:
            raise self.failing[name]
        self.resident.add(name)
        self.most_resident = max(self.most_resident, len(self.resident))
        return Thing(name)

    def stop(self, thing: Thing) -> None:
        assert not thing.is_stopped
        assert self.pool.loaded()[thing.name] is thing, (
            "what it knows can be asked for until it has been kept"
        )
        thing.is_stopped = True
        self.stops.append(thing.name)
        self.resident.remove(thing.name)


@contextmanager
def open_shop(names: str = "ab", terms: dict[str, Terms] | None = None, **bounds: object) -> Iterator[Shop]:
    shop = Shop(Bounds(**{"min_resident_s": 0.0, **bounds}))
    for name in names:
        shop.pool.add(name, (terms or {}).get(name, Terms()))
    shop.pool.start()
    try:
        yield shop
        shop.pool.check_integrity()
    finally:
        for door in shop.doors.values():
            door.set()
        shop.pool.close()
    assert not shop.resident, "what was loaded has been stopped"


def test_a_model_is_loaded_once_however_many_ask_and_another_takes_its_place():
    with open_shop() as shop:
        shop.doors["a"] = threading.Event()
        waiters = [shop.pool.ask("a") for _ in range(50)]
        assert not any(waiter.is_served for waiter in waiters)
        shop.doors["a"].set()
        leases = [waiter.future.result(30) for waiter in waiters]
        assert {lease.loaded.name for lease in leases} == {"a"}
        assert shop.loads == ["a"]
        for lease in leases:
            lease.release()
        shop.pool.lease("b").release()
        assert (shop.loads, shop.stops, shop.most_resident) == (["a", "b"], ["a"], 1)


def test_a_model_in_use_lets_its_requests_end_takes_no_more_and_comes_back_for_those_who_came_meanwhile():
    with open_shop() as shop:
        first = shop.pool.lease("a")
        wants_b = shop.pool.ask("b")
        until(lambda: shop.pool.standings()[0].state == "draining")
        late = shop.pool.ask("a")  # a request that came after b's
        again = first.again()  # what already runs may hold it on
        first.release()
        assert not wants_b.is_served
        assert not late.is_served
        assert not again.loaded.is_stopped
        again.release()
        lease_b = wants_b.future.result(30)
        assert lease_b.loaded.name == "b"
        assert not late.is_served
        lease_b.release()
        assert late.future.result(30).loaded.name == "a"
        late.leave()
        assert shop.loads == ["a", "b", "a"]


def test_a_model_that_was_to_leave_goes_on_where_another_makes_the_room():
    with open_shop("abc", max_resident=2) as shop:
        held_a, held_b = shop.pool.lease("a"), shop.pool.lease("b")
        wants_c = shop.pool.ask("c")
        until(lambda: shop.pool.standings()[0].state == "draining")
        late = shop.pool.ask("a")
        assert not late.is_served
        held_b.release()
        assert late.future.result(30).loaded is held_a.loaded
        assert wants_c.future.result(30).loaded.name == "c"
        assert shop.stops == ["b"]
        for waiter in (late, wants_c):
            waiter.leave()
        held_a.release()
        again = [shop.pool.lease(name) for name in "ac"]
        wants_b = shop.pool.ask("b")
        until(lambda: "draining" in [each.state for each in shop.pool.standings()])
        wants_b.leave()
        until(lambda: "draining" not in [each.state for each in shop.pool.standings()])
        for lease in again:
            lease.release()


def test_a_load_that_fails_answers_everybody_by_name_and_the_next_request_tries_it_again():
    with open_shop() as shop:
        shop.doors["a"] = threading.Event()
        shop.failing["a"] = ModelError("its weights are not whole")
        waiters = [shop.pool.ask("a") for _ in range(5)]
        shop.doors["a"].set()
        errors = [waiter.future.exception(30) for waiter in waiters]
        assert all(
            isinstance(error, ModelLoadError) and "'a' cannot be loaded" in str(error) for error in errors
        )
        assert len(set(map(id, errors))) == 5, "each has an error of their own"
        assert shop.pool.standings()[0].problem == "model 'a' cannot be loaded: its weights are not whole"
        shop.failing["a"] = RuntimeError("out of memory")
        with pytest.raises(ModelLoadError, match="'a' cannot be loaded: RuntimeError\\('out of memory'\\)"):
            shop.pool.lease("a")
        del shop.failing["a"]
        shop.pool.lease("a").release()
        standing = shop.pool.standings()[0]
        assert (standing.num_loads, standing.num_failed, standing.problem) == (1, 2, None)


@pytest.mark.parametrize(
    "problem", [ModelError("its weights are not whole"), RuntimeError("a fault of ours")]
)
def test_a_load_that_fails_is_told_once(caplog, problem):
    """By whom it is raised to, where that is who starts a server, else in the log; a traceback in the log alone."""
    with open_shop() as shop:
        shop.failing["a"] = problem
        with pytest.raises(ModelLoadError):
            shop.pool.lease("a")
        assert [record.exc_info is not None for record in caplog.records] == (
            [] if isinstance(problem, ModelError) else [True]
        )
        caplog.clear()
        assert isinstance(shop.pool.ask("a").future.exception(30), ModelLoadError)
        assert len(caplog.records) == 1, "who asks over HTTP is told, and so is who runs the server"


def test_nobody_leaves_for_a_model_that_is_not_there():
    with open_shop() as shop:
        shop.missing.add("b")
        shop.pool.lease("a").release()
        with pytest.raises(ModelLoadError, match="'b' cannot be loaded: no model folder at b"):
            shop.pool.lease("b")
        assert (shop.loads, shop.stops) == (["a"], [])
        shop.missing.clear()
        shop.pool.lease("b").release()
        assert shop.stops == ["a"]


def test_who_leaves_holds_up_nobody_and_a_load_that_has_begun_goes_on():
    with open_shop() as shop:
        shop.doors["a"] = threading.Event()
        stays, leaves = shop.pool.ask("a"), shop.pool.ask("a")
        until(lambda: shop.loads == ["a"])
        never_begun = shop.pool.ask("b")
        leaves.leave()
        leaves.leave()
        never_begun.leave()
        shop.doors["a"].set()
        assert stays.future.result(30).loaded.name == "a"
        taken_and_left = shop.pool.ask("a")
        assert taken_and_left.is_served
        taken_and_left.leave()
        stays.leave()
        standing = shop.pool.standings()[0]
        assert (standing.num_leases, standing.num_waiters) == (0, 0)
        assert shop.loads == ["a"], "b was given up before its turn came"


def test_a_cancelled_wait_leaves_no_lease_behind():
    async def ask(pool: Pool[Thing], name: str) -> str:
        waiter = pool.ask(name)
        try:
            return (await waiter.taken()).loaded.name
        finally:
            waiter.leave()

    async def storm(shop: Shop) -> None:
        draw = random.Random(3)
        for _ in range(40):
            tasks = [asyncio.ensure_future(ask(shop.pool, draw.choice("ab"))) for _ in range(6)]
            await asyncio.sleep(draw.choice((0, 0, 0.001, 0.003)))
            for task in tasks:
                if draw.random() < 0.5:
                    task.cancel()
            await asyncio.wait(tasks)

    with open_shop() as shop:
        asyncio.run(storm(shop))
        until(lambda: all(not each.num_leases and not each.num_waiters for each in shop.pool.standings()))
        assert len(shop.loads) > 10


def test_requests_that_come_as_a_model_leaves_for_idleness_are_all_answered():
    """A race that has locked up others: the time is over, and somebody asks."""
    with open_shop("a", {"a": Terms(idle_unload_s=0.0005)}) as shop:
        waited, draw = threading.Event(), random.Random(1)
        for _ in range(300):
            waiter = shop.pool.ask("a")
            waiter.future.result(30).release()
            waited.wait(draw.choice((0, 0.001, 0.002, 0.004)))
        assert len(shop.loads) > 5


def test_a_load_that_takes_longer_than_idleness_may_is_not_cut_short():
    with open_shop("a", {"a": Terms(idle_unload_s=0.01)}) as shop:
        shop.doors["a"] = threading.Event()
        waiter = shop.pool.ask("a")
        until(lambda: shop.loads == ["a"])
        assert threading.Event().wait(0.1) is False
        shop.doors["a"].set()
        lease = waiter.future.result(30)
        assert not lease.loaded.is_stopped
        lease.release()
        assert shop.loads == ["a"]


def test_whatever_a_load_raises_others_are_loaded_after_it():
    with open_shop() as shop:
        for error in (SystemExit(1), MemoryError(), KeyboardInterrupt()):
            shop.failing["a"] = error
            with pytest.raises(ModelLoadError, match=type(error).__name__):
                shop.pool.lease("a")
            shop.pool.lease("b").release()
        assert shop.loads == ["a", "b", "a", "b", "a", "b"]


def test_one_long_answer_starves_nobody():
    with open_shop(max_drain_s=0.05) as shop:
        endless = shop.pool.lease("a")
        assert shop.pool.lease("b").loaded.name == "b"
        assert endless.loaded.is_stopped
        endless.release()
        with pytest.raises(StoppedError, match="'a' has been unloaded"):
            endless.again()


def test_a_model_without_requests_leaves_in_time_and_a_pinned_one_stays():
    terms = {"a": Terms(idle_unload_s=0.03), "b": Terms(is_pinned=True, idle_unload_s=0.03)}
    with open_shop("abc", terms, max_resident=2) as shop:
        held = shop.pool.lease("a")
        shop.pool.lease("b").release()
        assert threading.Event().wait(0.1) is False
        assert shop.stops == []
        held.release()
        until(lambda: shop.stops == ["a"])
        shop.pool.lease("a").release()
        shop.pool.lease("c").release()
        assert shop.resident >= {"b", "c"}


def test_whoever_was_used_least_lately_leaves_first_and_memory_is_kept_to():
    terms = {name: Terms(num_bytes=4) for name in "abc"} | {"d": Terms(num_bytes=11)}
    with open_shop("abcd", terms, max_resident=3, max_bytes=10) as shop:
        for name in "abab":
            shop.pool.lease(name).release()
        shop.pool.lease("c").release()
        assert shop.stops == ["a"], "only two of them fit"
        with pytest.raises(OverloadedError, match=r"'d' is not loaded and needs .* no room"):
            shop.pool.lease("d")
        assert shop.stops == ["a"], "nobody leaves in vain"
        shop.pool.charge("d", 9)
        shop.pool.lease("d").release()
        assert shop.resident == {"d"}


def test_a_model_that_is_told_to_leave_ends_its_requests_first_and_is_loaded_again_by_the_next():
    with open_shop() as shop:
        shop.pool.unload("a").result(30)
        held = shop.pool.lease("a")
        gone = shop.pool.unload("a")
        until(lambda: shop.pool.standings()[0].state == "draining")
        next_one = shop.pool.ask("a")
        assert not gone.done()
        held.release()
        gone.result(30)
        assert next_one.future.result(30).loaded is not held.loaded
        next_one.leave()
        with pytest.raises(NotFoundError):
            shop.pool.unload("z")
        with pytest.raises(NotFoundError):
            shop.pool.ask("z")


def test_a_pool_that_closes_answers_who_waits():
    with open_shop() as shop:
        shop.doors["a"] = threading.Event()
        loading, waiting = shop.pool.ask("a"), shop.pool.ask("b")
        until(lambda: shop.loads == ["a"])
        closing = threading.Thread(target=shop.pool.close)
        closing.start()
        shop.doors["a"].set()
        closing.join(30)
        assert loading.future.result(30).loaded.is_stopped
        with pytest.raises(StoppedError):
            waiting.future.result(30)
        with pytest.raises(StoppedError):
            shop.pool.ask("b")
    assert not closing.is_alive()


def test_nothing_keeps_a_model_that_has_left():
    with open_shop() as shop:
        lease = shop.pool.lease("a")
        thing = weakref.ref(lease.loaded)
        lease.release()
        del lease
        shop.pool.lease("b").release()
        gc.collect()
        assert thing() is None


class Simulated:
    """The rule alone, on a clock: requests come, run for a while and go; a load takes a while too."""

    LOAD_S = 0.5

    def __init__(self, names: str, bounds: Bounds) -> None:
        self.members = {name: Member[Thing](name, Terms()) for name in names}
        self.bounds = bounds
        self.now_s = 0.0
        self.waits: dict[str, list[float]] = {name: [] for name in names}
        self.running: list[tuple[float, Member[Thing], object]] = []
        self.num_swaps = 0
        self.busy_until_s = 0.0
        self.under_way: tuple[str, Member[Thing]] | None = None

    def ask(self, name: str, run_s: float) -> None:
        member = self.members[name]
        member.waiters.append(_Asked(self.now_s, run_s))  # type: ignore[arg-type]
        self._serve(member)

    def _serve(self, member: Member[Thing]) -> None:
        while member.state == "ready" and member.waiters:
            asked = member.waiters.popleft()
            self.waits[member.name].append(self.now_s - asked.asked_s)
            lease = object()
            member.leases.add(lease)  # type: ignore[arg-type]
            member.used_s = self.now_s
            self.running.append((self.now_s + asked.run_s, member, lease))  # type: ignore[attr-defined]

    def advance(self, until_s: float, tick_s: float = 0.05) -> None:
        while self.now_s < until_s:
            self.now_s += tick_s
            for end in [each for each in self.running if each[0] <= self.now_s]:
                self.running.remove(end)
                end[1].leases.discard(end[2])  # type: ignore[arg-type]
                end[1].used_s = self.now_s
            self._act()

    def _act(self) -> None:
        if self.under_way is not None:
            kind, member = self.under_way
            if self.now_s < self.busy_until_s:
                return
            self.under_way = None
            if kind == "load":
                member.state, member.ready_since_s, member.used_s = "ready", self.now_s, self.now_s
                self._serve(member)
            else:
                member.state = "unloaded"
        for _ in range(10):
            step = next_step(list(self.members.values()), self.bounds, self.now_s)
            if step.kind in ("wait", "refuse"):
                return
            assert step.member is not None
            if step.kind == "drain":
                step.member.state, step.member.draining_since_s = "draining", self.now_s
            elif step.kind == "look":
                step.member.is_looked_at = True
            elif step.kind == "resume":
                step.member.state = "ready"
                self._serve(step.member)
            else:
                step.member.state = "loading" if step.kind == "load" else "unloading"
                self.num_swaps += step.kind == "load"
                self.under_way = (step.kind, step.member)
                self.busy_until_s = self.now_s + (self.LOAD_S if step.kind == "load" else 0.1)
                return


class _Asked:
    def __init__(self, asked_s: float, run_s: float) -> None:
        self.asked_s = asked_s
        self.run_s = run_s


@pytest.mark.parametrize("names", ["ab", "abc", "abcde"])
@pytest.mark.parametrize("max_resident", [1, 2])
def test_models_that_everybody_wants_at_once_take_turns_and_none_waits_for_ever(names, max_resident):
    """Each of them is asked for ten times a second, for answers that take less than the load."""
    simulated = Simulated(names, Bounds(max_resident, min_resident_s=5.0, max_drain_s=60.0))
    draw = random.Random(len(names))
    for tick in range(10 * 120):
        for name in names:
            simulated.ask(name, 0.2 + 0.3 * draw.random())
        simulated.advance((tick + 1) / 10)
    # A turn: load, stay, and let what runs end.
    turn_s = Simulated.LOAD_S + 5 + 0.5 + 0.2
    worst = max(max(waits) for waits in simulated.waits.values())
    waiting = max((120 - m.wanted_since_s for m in simulated.members.values() if m.wanted_since_s), default=0)
    assert all(len(waits) > 100 for waits in simulated.waits.values()), "everybody had turns"
    assert max(worst, waiting) <= turn_s * (len(names) - max_resident + 1), (worst, waiting)
    assert simulated.num_swaps <= max_resident * 120 / 5 + len(names), (
        "they do not change places with each request"
    )


def test_one_client_that_asks_in_turn_waits_for_loads_alone():
    simulated = Simulated("ab", Bounds(1, min_resident_s=5.0))
    for turn in range(10):
        simulated.ask("ab"[turn % 2], 0.5)
        simulated.advance(simulated.now_s + 4)
    waits = [wait for each in simulated.waits.values() for wait in each]
    assert len(waits) == 10
    assert max(waits) <= Simulated.LOAD_S + 0.3, "a model nobody uses makes room at once"


def test_the_rule_changes_nothing():
    members = [Member[Thing]("a", Terms(), state="ready"), Member[Thing]("b", Terms())]
    members[1].waiters = deque([_Asked(0.0, 1.0)])  # type: ignore[list-item]
    step = next_step(members, Bounds(1), 10.0)
    assert (step.kind, step.member) == ("look", members[1])
    members[1].is_looked_at = True
    step = next_step(members, Bounds(1), 10.0)
    assert (step.kind, step.member) == ("unload", members[0])
    assert members[0].state == "ready"
    assert isinstance(Lease, type)


def test_what_breaks_is_brought_anew_and_what_keeps_breaking_is_left_alone_longer_each_time():
    clock, broken, pool_loads = [0.0], set(), []

    def load(name: str) -> Thing:
        pool_loads.append(name)
        return Thing(name)

    def failure(thing: Thing) -> BaseException | None:
        return RuntimeError("gone") if thing in broken else None

    pool: Pool[Thing] = Pool(
        lambda _: 0, load, lambda _: None, lambda: None, clock=lambda: clock[0], failure=failure
    )
    pool.add("a", Terms(is_pinned=True))
    pool.start()
    try:
        for count, wait_s in enumerate((0, 1, 2, 4, 8, 16, 32, 60, 60), start=1):
            lease = pool.lease("a")
            broken.add(lease.loaded)
            assert pool.lease_if_loaded("a") is None
            until(lambda: pool.standings()[0].state == "unloaded")  # whoever has it has nothing
            (standing,) = pool.standings()
            assert (standing.num_breaks, standing.retry_s) == (count, wait_s)
            lease.release()
            if wait_s:
                with pytest.raises(OverloadedError, match=f"broken {count} times.*gone"):
                    pool.ask("a")
            clock[0] += wait_s
        pool.lease("a").release()
        clock[0] += 1000
        broken.add(pool.lease("a").loaded)
        assert pool.standings()[0].num_breaks == 1, "what has run for long breaks for the first time"
        until(lambda: pool.standings()[0].state == "unloaded")
        assert len(pool_loads) == 10
        pool.check_integrity()
    finally:
        pool.close()


@pytest.mark.parametrize("keep_s", [0.0, 5.0, math.inf])
def test_a_model_that_is_to_stay_so_long_does_and_is_as_it_was_when_it_comes_back(keep_s):
    member = Member("a", Terms(idle_unload_s=100.0), state="ready", loaded=Thing("a"))
    pinned = Member("b", Terms(is_pinned=True), state="ready", loaded=Thing("b"))
    member.keep_s = pinned.keep_s = keep_s
    member.used_s = pinned.used_s = 10.0
    before, after = (next_step([pinned, member], Bounds(), 10 + keep_s * part + 0.0) for part in (0.5, 1.0))
    if math.isinf(keep_s):
        assert next_step([member], Bounds(), 1e9).kind == "wait"
    else:
        assert (before.kind, before.until_s) == ("wait", 10 + keep_s) if keep_s else before.kind == "unload"
        assert (after.kind, after.member) == ("unload", member)
    with open_shop("a", terms={"a": Terms(idle_unload_s=None)}) as shop:
        lease = shop.pool.lease("a")
        shop.pool.keep("a", 0)
        assert shop.pool.ask("a").is_served, "it takes requests as long as it is there"
        assert not shop.stops
        lease.release()
