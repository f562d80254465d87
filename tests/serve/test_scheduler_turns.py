"""Whose turn it is: priorities, shares of adapters and tenants. The scheduler alone, no arrays."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from dry_engine import Machine, Slots, adapter, budget, decode, names, prefill, run, sequence

from serve.engine.request import Request, Sampling
from serve.engine.scheduler import MAX_OVERTAKEN, Scheduler
from serve.engine.shares import Shares
from serve.model.prompt import Prompt


def test_rows_go_to_the_lowest_priority_number_and_by_arrival_among_equals():
    scheduler = Scheduler(budget(max_rows=1))
    for index, priority in enumerate([0, 5, -3, 0, -3, 2]):
        scheduler.add(sequence(f"{priority}-{index}", max_tokens=2, priority=priority))
    order = []
    while scheduler.has_work:
        order += [chunk.sequence.request.id for chunk in prefill(run(scheduler))]
    assert order == ["-3-2", "-3-4", "0-0", "0-3", "2-5", "5-1"]


@pytest.mark.parametrize("priority", [1, 10**6])
def test_a_late_priority_waits_long_under_a_stream_of_earlier_ones_and_not_for_ever(priority):
    scheduler = Scheduler(budget(max_rows=2))
    scheduler.add(sequence("runs"))
    scheduler.add(sequence("runs too"))
    run(scheduler)
    scheduler.add(sequence("late", priority=priority))
    num_passed = 0
    while "late" in names(scheduler.waiting):
        while len(scheduler.waiting) < 4:
            scheduler.add(sequence(f"urgent{num_passed}-{len(scheduler.waiting)}", max_tokens=2))
        num_passed += len(prefill(run(scheduler)))
        assert num_passed <= MAX_OVERTAKEN + 2
    assert num_passed >= MAX_OVERTAKEN, "it has not waited for them"


def test_where_memory_runs_out_the_latest_priority_gives_its_row_back():
    scheduler = Scheduler(budget(max_bytes=2 * 512))
    scheduler.add(sequence("late but old", 200, max_tokens=500, priority=1))
    scheduler.add(sequence("urgent", 200, max_tokens=500, priority=-1))
    while not scheduler.num_preempted:
        run(scheduler)
    assert names(scheduler.waiting) == ["late but old"]


def test_a_late_priority_takes_no_row_from_an_earlier_one_that_holds_many():
    scheduler = Scheduler(budget())
    for index in range(4):
        scheduler.add(sequence(f"n{index}", max_tokens=40, group="n", priority=-1))
    run(scheduler)
    scheduler.add(sequence("late"))
    for _ in range(30):
        run(scheduler)
    assert names(scheduler.waiting) == ["late"]
    assert scheduler.num_preempted == 0


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("weights", [{}, {"a": 1.0, "b": 1.0}, {"a": 3.0}, {"a": 10.0, "b": 0.5}])
def test_adapters_that_all_want_more_have_tokens_in_proportion_to_their_weights(weights, seed):
    """Whatever their prompts and answers are like, and however unevenly they ask."""
    rng = random.Random(seed)
    slots = Slots(3, load_steps=1)
    scheduler = Scheduler(
        budget(max_rows=5, max_bytes=10**6), adapters=slots, shares=Shares(weights or {"c": 1.0})
    )
    lengths = {"a": (4, 60), "b": (90, 20), "c": (30, 30)}
    had: Counter[str] = Counter()
    for step in range(1500):
        slots.tick()
        scheduler.wake()
        waiting = Counter(one.request.adapter.name for one in scheduler.waiting)
        for name, (prompt, answer) in lengths.items():
            while waiting[name] < (20 if name == "a" else 3):
                waiting[name] += 1
                fields = {"adapter": adapter(name), "group": f"{name}{step}{waiting[name]}"}
                prompt_tokens, max_tokens = rng.randint(1, 2 * prompt), rng.randint(2, 2 * answer)
                scheduler.add(sequence(fields["group"], prompt_tokens, max_tokens, **fields))
        plan = run(scheduler)
        if step > 100:
            for chunk in plan.chunks:
                had[chunk.sequence.request.adapter.name] += chunk.num_tokens
    per_weight = [had[name] / weights.get(name, 1.0) for name in lengths]
    assert max(per_weight) < 1.25 * min(per_weight) + 400


def test_who_asked_for_nothing_for_a_while_has_saved_nothing_up():
    scheduler = Scheduler(budget(max_rows=1), shares=Shares(tenants={"busy": 1.0}))
    order: list[str] = []
    for index in range(200):
        if len(scheduler.waiting) < 3:
            scheduler.add(sequence(f"busy{index}", max_tokens=2, tenant="busy"))
        run(scheduler)
    for index in range(20):
        scheduler.add(sequence(f"idle{index}", max_tokens=2, tenant="idle"))
    for index in range(60):
        if len(scheduler.waiting) < 30:
            scheduler.add(sequence(f"more{index}", max_tokens=2, tenant="busy"))
        order += [chunk.sequence.request.tenant for chunk in prefill(run(scheduler))]
    first = Counter(order[:16])
    assert 6 <= first["busy"] <= 10, "one of them has all rows"


def test_shares_of_adapters_hold_inside_a_tenants():
    slots = Slots(2, load_steps=1)
    shares = Shares({"a": 3.0}, {"small": 1.0, "large": 4.0})
    scheduler = Scheduler(budget(max_rows=4, max_bytes=10**6), adapters=slots, shares=shares)
    had: Counter[tuple[str, str]] = Counter()
    for step in range(1500):
        slots.tick()
        scheduler.wake()
        waiting = Counter((one.request.tenant, one.request.adapter.name) for one in scheduler.waiting)
        for tenant in ("small", "large"):
            for name in "ab":
                while waiting[tenant, name] < 3:
                    waiting[tenant, name] += 1
                    id = f"{tenant}{name}{step}{waiting[tenant, name]}"
                    scheduler.add(sequence(id, 10, 20, adapter=adapter(name), tenant=tenant))
        for chunk in run(scheduler).chunks:
            had[chunk.sequence.request.tenant, chunk.sequence.request.adapter.name] += chunk.num_tokens
    for tenant in ("small", "large"):
        assert 2.4 < had[tenant, "a"] / had[tenant, "b"] < 3.6
    small, large = (had[tenant, "a"] + had[tenant, "b"] for tenant in ("small", "large"))
    assert 3.4 < large / small < 4.6


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_with_priorities_shares_and_few_slots_everybody_is_answered_and_rightly(ahead, seed):
    rng = random.Random(seed)
    slots = Slots(2, load_steps=3, broken=["a3"])
    shares = Shares({"a0": 5.0}, {"x": 2.0} if seed else {})
    bounds = budget(max_rows=5, max_bytes=5 * 256)
    machine = Machine(bounds, ahead=ahead, has_prefixes=True, slots=slots, shares=shares)
    for step in range(700):
        if rng.random() < 0.3 and len(machine.scheduler.waiting) < 20:
            version = adapter(f"a{rng.randrange(5)}") if rng.random() < 0.7 else None
            first = 1000 * rng.randrange(4)
            machine.add(
                Request(
                    f"s{step}",
                    Prompt(tuple(range(first, first + rng.randint(1, 150)))),
                    Sampling(max_tokens=rng.randint(1, 90)),
                    group=rng.choice("abc"),
                    adapter=version,
                    tenant=rng.choice(["x", "y", ""]),
                    priority=rng.choice([0, 0, 0, -4, 9]),
                )
            )
        machine.step()
        machine.cancel([one for one in machine.alive if rng.random() < 0.005])
    for _ in range(20_000):
        machine.step()
        if not machine.has_work:
            break
    assert not machine.has_work, "somebody starves"
    for request, answer in machine.answers:
        assert answer == machine.alone(request)
    assert len(machine.answers) > 30
    assert machine.refused
    assert not shares._num_open, "who has left is counted"
    assert not shares._charged


def test_the_step_of_an_urgent_prompt_comes_before_that_of_an_older_one():
    scheduler = Scheduler(budget(max_rows=8, max_bytes=10**6))
    scheduler.add(sequence("old", 32 * 40))
    for _ in range(3):
        run(scheduler)
    scheduler.add(sequence("urgent", 64, max_tokens=2, priority=-1))
    scheduler.add(sequence("other", 64, max_tokens=2))
    widths = []
    while "urgent" in names(scheduler.prefilling + scheduler.waiting):
        plan = run(scheduler)
        widths += names(chunk.sequence for chunk in [*prefill(plan)])
        assert not decode(plan)
    assert widths.count("old") <= 2
