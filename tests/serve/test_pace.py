"""What decoding rows wait for prompts, over given times: no arrays, no clock."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from dry_engine import BUDGET, decode, run, sequence

from serve.engine.budget import Budget
from serve.engine.pace import FIRST_TOKENS, GAP_FORWARDS, LEAST_TOKENS, Pace
from serve.engine.plan import Plan
from serve.engine.scheduler import Scheduler


def machine_of(fixed_s: float, row_s: float, token_s: float) -> Callable[[int, int], float]:
    """(rows, tokens) → seconds of a step."""
    return lambda rows, tokens: (
        (fixed_s + rows * row_s if rows else 0) + (fixed_s + tokens * token_s if tokens else 0)
    )


MACHINES = {
    "a slow cpu": machine_of(0.060, 0.003, 0.0021),
    "a cpu": machine_of(0.021, 0.0011, 0.00095),
    "a laptop's gpu": machine_of(0.015, 0.0002, 0.0016),
    "a large gpu": machine_of(0.006, 0.00002, 0.00002),
}


def costs(plan: Plan) -> tuple[int, int]:
    return plan.num_single, plan.num_padded


@pytest.mark.parametrize("step_s", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("max_gap_s", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("seed", range(2))
def test_rows_wait_for_prompts_no_longer_than_is_said_on_any_machine(step_s, max_gap_s, seed):
    """With noise, with steps that compile, and with padding counted. The bound is used too, where there is demand."""
    rng = random.Random(seed)
    pace = Pace(max_gap_s)
    bounds = Budget(max_rows=32, prefill_chunk_tokens=4096, max_bytes=10**9, row_cost=BUDGET.row_cost)
    scheduler = Scheduler(bounds, pace=pace)
    waits = []
    for step in range(250):
        if step % 100 < 60 and len(scheduler.waiting) < 20:
            for number in range(rng.choice([0, 0, 2, 8])):
                length = rng.choice([20, 74, 300, 2500, 5000])
                scheduler.add(sequence(f"s{step}-{number}", length, rng.randint(5, 60)))
        plan = run(scheduler)
        rows, tokens = costs(plan)
        duration_s = step_s(rows, tokens) * rng.uniform(0.98, 1.05)
        is_first_touch = step % 37 == 0
        pace.note(rows, tokens, duration_s * (30 if is_first_touch else 1))
        if rows and tokens and step > 40 and scheduler.prefilling:
            waits.append((step_s(rows, tokens) - step_s(rows, 0), tokens))
    assert len(waits) > 10
    allowed = [wait for wait, tokens in waits if tokens > LEAST_TOKENS]
    assert max(allowed, default=0) <= max_gap_s * 1.15
    reachable = min(max_gap_s, step_s(0, 4096))
    if reachable > step_s(0, 64):
        assert max(allowed) > 0.6 * reachable, "the time is not used"


@pytest.mark.parametrize("step_s", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("rows_seen", [(1, 2, 30), (31, 32), (5,)])
def test_where_nobody_says_rows_wait_as_often_the_fixed_part_of_a_forward(step_s, rows_seen):
    rng, pace = random.Random(0), Pace()
    assert pace.gap_s is None
    assert pace.max_tokens == FIRST_TOKENS
    for _ in range(5):
        for rows in rows_seen:
            pace.note(rows, 0, step_s(rows, 0) * rng.uniform(1, 1.2))
            pace.note(rows, 400, step_s(rows, 400))
    fixed_s = step_s(1, 0)
    tolerance = 1.3 if len(rows_seen) > 2 else 2.7  # rows of one number do not tell the parts apart
    assert GAP_FORWARDS * fixed_s / tolerance < pace.gap_s < GAP_FORWARDS * fixed_s * tolerance * 1.1
    wait_s = step_s(0, pace.max_tokens)
    assert pace.gap_s / 1.4 < wait_s < pace.gap_s * 1.4, "what it takes for a token is not what it takes"


@pytest.mark.parametrize("num_odd", range(5))
def test_first_touches_and_compilations_poison_nothing(num_odd):
    step_s, pace = MACHINES["a cpu"], Pace(0.3)
    expected = 0.3 / 0.00095
    for number in range(9):
        pace.note(4, 0, step_s(4, 0) * (50 if number < num_odd else 1))
        pace.note(4, 300, step_s(4, 300) * (50 if number < num_odd else 1))
    assert expected * 0.8 < pace.max_tokens < expected * 1.1


def test_a_machine_that_becomes_slower_is_noticed_within_a_few_steps():
    pace = Pace(0.3)
    for factor in (1, 4):
        for _ in range(6):
            pace.note(4, 0, factor * MACHINES["a cpu"](4, 0))
            pace.note(4, 300, factor * MACHINES["a cpu"](4, 300))
        assert 0.6 < pace.max_tokens * factor * 0.00095 / 0.3 < 1.1


def test_nobody_who_decodes_is_nobody_who_waits():
    pace = Pace(0.001)
    bounds = Budget(max_rows=64, prefill_chunk_tokens=4096, max_bytes=10**9, row_cost=BUDGET.row_cost)
    scheduler = Scheduler(bounds, pace=pace)
    for number in range(40):
        scheduler.add(sequence(f"s{number}", 74, 20))
    plan = run(scheduler)
    assert costs(plan) == (0, 40 * 74), "a burst is computed in one"
    for _ in range(9):
        pace.note(40, 0, 0.06)
        pace.note(0, 2000, 2.0)
    scheduler.add(sequence("late", 2000, 20))
    plan = run(scheduler)
    assert len(decode(plan)) == 40
    assert costs(plan) == (40, LEAST_TOKENS), "prompts go on, however little time there is"
