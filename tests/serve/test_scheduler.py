"""The scheduler alone: no arrays, no model."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from serve.cache.capacity import RowCost
from serve.engine.plan import Plan, Sequence
from serve.engine.request import Request, Sampling
from serve.engine.scheduler import Budget, Scheduler
from serve.errors import ContextLengthError, OverloadedError, RequestError
from serve.model.prompt import Prompt

BUDGET = Budget(
    max_rows=4,
    max_waiting=8,
    prefill_chunk_tokens=32,
    max_context=512,
    max_bytes=4 * 512,
    row_cost=RowCost(position_bytes=1),
)


def sequence(name: str, num_prompt_tokens: int = 8, max_tokens: int = 8) -> Sequence:
    return Sequence(Request(name, Prompt(tuple(range(num_prompt_tokens))), Sampling(max_tokens=max_tokens)))


def run(scheduler: Scheduler) -> Plan:
    plan = scheduler.schedule()
    scheduler.commit(plan)
    scheduler.check_integrity()
    return plan


def names(sequences) -> list[str]:
    return [s.request.id for s in sequences]


def test_the_scheduler_imports_no_mlx():
    code = "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None; import serve.engine.scheduler"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_long_prompt_is_computed_in_chunks_beside_a_running_row():
    scheduler = Scheduler(BUDGET)
    scheduler.add(sequence("short"))
    run(scheduler)
    scheduler.add(sequence("long", num_prompt_tokens=100))
    widths = []
    for _ in range(4):
        plan = run(scheduler)
        assert names(plan.decode) == ["short"]
        widths += [chunk.stop - chunk.start for chunk in plan.prefill]
    assert widths == [32, 32, 32, 4]
    assert names(run(scheduler).decode) == ["short", "long"]


def test_short_prompts_share_a_prefill_and_padding_counts_against_its_budget():
    scheduler = Scheduler(BUDGET)
    for name, length in (("a", 10), ("b", 10), ("c", 16), ("d", 3)):
        scheduler.add(sequence(name, length))
    assert names(c.sequence for c in run(scheduler).prefill) == ["a", "b"]  # 3 x 16 would be 48 > 32
    assert names(c.sequence for c in run(scheduler).prefill) == ["c", "d"]


def test_nobody_overtakes_the_first_in_the_queue():
    scheduler = Scheduler(Budget(**{**BUDGET.__dict__, "max_bytes": 1024}))
    scheduler.add(sequence("running", max_tokens=300))
    run(scheduler)
    scheduler.add(sequence("big", max_tokens=500))  # would need 2 rows x 512 positions: fits only just
    scheduler.add(sequence("third", max_tokens=8))  # 3 rows round up to 4: would not fit
    plan = run(scheduler)
    assert names(c.sequence for c in plan.prefill) == ["big"]
    assert names(scheduler.waiting) == ["third"]


def test_rows_stay_compact_with_decoding_rows_first_whatever_leaves():
    rng = random.Random(0)
    scheduler = Scheduler(Budget(**{**BUDGET.__dict__, "max_rows": 7, "max_bytes": 10**6}))
    contents: dict[int, str] = {}  # what a cache would hold at each row
    for step in range(400):
        if rng.random() < 0.5 and len(scheduler.waiting) < 4:
            scheduler.add(sequence(f"s{step}", rng.randint(1, 90), 30))
        plan = scheduler.schedule()
        copies = {target: contents[source] for source, target in plan.moves}
        contents.update(copies)
        for chunk in plan.prefill:
            if chunk.start == 0:
                contents[chunk.sequence.row] = chunk.sequence.request.id
        for running in (*plan.decode, *(c.sequence for c in plan.prefill)):
            assert contents[running.row] == running.request.id, "a row lost its keys and values"
        assert [s.row for s in plan.decode] == list(range(len(plan.decode)))
        scheduler.commit(plan)
        scheduler.check_integrity()
        running = [*scheduler.decoding, *scheduler.prefilling]
        scheduler.remove([s for s in running if rng.random() < 0.1])
    assert step == 399


def test_recurrent_rows_of_one_step_take_equally_many_tokens_and_begin_together():
    rng = random.Random(1)
    cost = RowCost(position_bytes=0, state_bytes=100)
    scheduler = Scheduler(Budget(**{**BUDGET.__dict__, "max_bytes": 400, "row_cost": cost}))
    added, began, widths = [], [], []
    for step in range(600):
        if rng.random() < 0.4 and len(scheduler.waiting) < 6:
            scheduler.add(sequence(f"s{step}", rng.choice([1, 2, 9, 10, 40, 100]), 5))
            added.append(f"s{step}")
        plan = run(scheduler)
        assert len({chunk.stop - chunk.start for chunk in plan.prefill}) <= 1
        assert len({chunk.start == 0 for chunk in plan.prefill}) <= 1
        began += [chunk.sequence.request.id for chunk in plan.prefill if chunk.start == 0]
        widths.append(len(plan.prefill))
        if scheduler.prefilling or plan.prefill:
            assert plan.prefill[0].stop - plan.prefill[0].start == min(
                plan.prefill[0].sequence.num_prompt_tokens - plan.prefill[0].start, 32
            ), "the first in line takes a whole chunk"
        scheduler.remove([s for s in scheduler.decoding if rng.random() < 0.3])
    assert began == added[: len(began)], "in order of arrival"
    assert len(added) - len(began) <= 6
    assert max(widths) > 1, "rows must share a forward where they can"


def test_states_are_counted_by_rows_in_use():
    cost = RowCost(position_bytes=1, state_bytes=100)
    assert cost.batch_bytes(3, 10) == 4 * 256 + 3 * 100
    scheduler = Scheduler(Budget(**{**BUDGET.__dict__, "max_bytes": 2 * 256 + 200, "row_cost": cost}))
    for name in "abc":
        scheduler.add(sequence(name))
    assert names(c.sequence for c in run(scheduler).prefill) == ["a", "b"]
    assert names(scheduler.waiting) == ["c"]


def test_a_step_with_the_same_rows_moves_nothing_and_keeps_its_composition():
    scheduler = Scheduler(BUDGET)
    scheduler.add(sequence("a"))
    scheduler.add(sequence("b"))
    run(scheduler)
    first, second = run(scheduler), run(scheduler)
    assert first.composition == second.composition
    assert first.moves == second.moves == ()
    scheduler.remove([scheduler.decoding[0]])
    assert run(scheduler).composition != first.composition


def test_what_can_never_run_is_refused_and_a_full_queue_says_so():
    scheduler = Scheduler(BUDGET)
    with pytest.raises(ContextLengthError, match="512 tokens; the prompt has 500"):
        scheduler.add(sequence("too long", 500, 100))
    with pytest.raises(RequestError, match="prompt is empty"):
        scheduler.add(sequence("empty", 0))
    with pytest.raises(RequestError, match="max_tokens is 0"):
        scheduler.add(sequence("none", 4, 0))
    for index in range(BUDGET.max_rows + BUDGET.max_waiting):
        scheduler.add(sequence(str(index)))
    with pytest.raises(OverloadedError, match="12 requests are running or waiting"):
        scheduler.add(sequence("one more"))
