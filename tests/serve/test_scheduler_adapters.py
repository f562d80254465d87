"""The scheduler, where adapters have fewer slots than names: no arrays."""

from __future__ import annotations

import random

import pytest
from dry_engine import Machine, Slots, adapter, budget, decode, names, run, sequence

from serve.engine.plan import SequenceState
from serve.engine.request import Request, Sampling
from serve.engine.scheduler import Scheduler
from serve.engine.shares import Shares
from serve.errors import AdapterError
from serve.model.prompt import Prompt


def test_who_waits_for_an_adapter_is_passed_and_keeps_its_turn():
    slots = Slots(2, load_steps=5)
    scheduler = Scheduler(budget(max_rows=2), adapters=slots)
    scheduler.add(sequence("runs", max_tokens=9))
    run(scheduler)
    scheduler.add(sequence("absent", adapter=adapter("a")))
    scheduler.add(sequence("base", max_tokens=3))
    run(scheduler)
    assert names(scheduler.running) == ["runs", "base"]
    assert names(scheduler.waiting) == ["absent"]
    scheduler.add(sequence("later"))
    for _ in range(5):
        slots.tick()
    scheduler.wake()
    while "base" in names(scheduler.running):
        assert "absent" not in names(scheduler.running), "no row is free"
        run(scheduler)
    run(scheduler)
    assert names(scheduler.running) == ["runs", "absent"], "who came later takes the row it has waited for"
    assert scheduler.decoding[-1].slot == slots.slots["a"]


def test_a_scheduler_in_which_all_wait_for_adapters_is_asleep_until_it_is_woken():
    slots = Slots(2)
    scheduler = Scheduler(budget(), adapters=slots)
    for index in range(3):
        scheduler.add(sequence(f"s{index}", adapter=adapter("a")))
    assert not scheduler.is_asleep
    assert scheduler.schedule().is_empty
    assert scheduler.is_asleep
    num_asked = slots.num_asked
    assert scheduler.schedule().is_empty
    assert slots.num_asked == num_asked, "nothing has changed, and yet it is asked"
    slots.finish()
    scheduler.wake()
    assert not scheduler.is_asleep
    assert len(scheduler.schedule().chunks) == 3


def test_an_adapter_that_cannot_come_ends_those_that_wait_for_it_alone():
    slots = Slots(4, broken=["bad"])
    machine = Machine(budget(), slots=slots)
    for index in range(6):
        name = "bad" if index % 3 == 1 else f"a{index}"
        machine.add(Request(f"s{index}", Prompt((index, 1)), Sampling(max_tokens=4), adapter=adapter(name)))
    for _ in range(60):
        machine.step()
    assert not machine.has_work
    assert {request.id for request, _ in machine.refused} == {"s1", "s4"}
    assert all(isinstance(error, AdapterError) for _, error in machine.refused)
    assert {request.id for request, _ in machine.answers} == {"s0", "s2", "s3", "s5"}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_every_adapter_gets_its_turn_however_few_slots_there_are(ahead, seed):
    """Whatever comes, goes, is preempted or cannot be loaded: slots are held by rows alone, and answers are right."""
    rng = random.Random(seed)
    slots = Slots(rng.choice([1, 2, 5]), load_steps=rng.choice([1, 4, 20]), broken=["a2"])
    machine = Machine(
        budget(max_rows=6, max_bytes=rng.choice([4, 8]) * 256), ahead=ahead, has_prefixes=True, slots=slots
    )
    for step in range(800):
        if rng.random() < 0.4 and len(machine.scheduler.waiting) < 20:
            version = rng.choice(
                [None, *(adapter(f"a{min(int(rng.expovariate(0.5)), 9)}") for _ in range(5))]
            )
            first = 1000 * rng.randrange(4)
            prompt = Prompt(tuple(range(first, first + rng.randint(1, 200))))
            sampling = Sampling(max_tokens=rng.randint(1, 120))
            machine.add(Request(f"s{step}", prompt, sampling, group=rng.choice("abc"), adapter=version))
        machine.step()
        machine.cancel([one for one in machine.alive if rng.random() < 0.005])
    for _ in range(20_000):
        machine.step()
        if not machine.has_work:
            break
    assert not machine.has_work, "somebody starves"
    assert slots.holders.total() == 0, "a slot is held by nobody's row"
    assert len(machine.answers) > 30
    for request, answer in machine.answers:
        assert answer == machine.alone(request)
    assert machine.refused
    assert {request.adapter.name for request, _ in machine.refused} == {"a2"}


def test_requests_of_the_base_pass_whoever_waits_for_a_slot():
    slots = Slots(1)
    scheduler = Scheduler(budget(max_rows=4, max_bytes=10**6), adapters=slots)
    scheduler.add(sequence("a", max_tokens=500, adapter=adapter("a")))
    scheduler.schedule()
    slots.finish()
    scheduler.wake()
    run(scheduler)
    scheduler.add(sequence("b", adapter=adapter("b")))
    for index in range(20):
        scheduler.add(sequence(f"base{index}", max_tokens=2))
        run(scheduler)
        assert f"base{index}" in names([*scheduler.running, *decode(run(scheduler))])
    assert names(scheduler.waiting) == ["b"]


@pytest.mark.parametrize("num_waiting", [50, 400])
def test_who_waits_for_a_slot_costs_a_step_no_look_at_all_the_others(num_waiting):
    """Work is counted, not timed: how often it is worked out whose turn it is."""
    slots = Slots(4)
    scheduler = Scheduler(budget(max_rows=8, max_bytes=10**6), adapters=slots, shares=(shares := Counting()))
    for index in range(4):
        scheduler.add(sequence(f"runs{index}", max_tokens=3, adapter=adapter(f"a{index}")))
    scheduler.schedule()
    slots.finish()
    scheduler.wake()
    run(scheduler)
    assert len(scheduler.running) == 4
    for index in range(num_waiting):
        scheduler.add(sequence(f"waits{index}", adapter=adapter(f"b{index}")))
    shares.num_turns = 0
    num_asked = slots.num_asked
    run(scheduler)
    assert slots.num_asked - num_asked == num_waiting, "not everybody is asked for"
    assert shares.num_turns == num_waiting


class Counting(Shares):
    """Shares that count how often they are asked."""

    def __init__(self) -> None:
        super().__init__({"a0": 1.0})
        self.num_turns = 0

    def turn(self, one: SequenceState) -> tuple[float, ...]:
        self.num_turns += 1
        return super().turn(one)
