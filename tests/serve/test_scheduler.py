"""The scheduler alone: no arrays, no model."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

from serve.cache.capacity import RowCost
from serve.engine.plan import Drawn, Plan, SequenceState
from serve.engine.request import Request, Sampling
from serve.engine.scheduler import Budget, Scheduler
from serve.model.prompt import Prompt

BUDGET = Budget(
    max_rows=4,
    prefill_chunk_tokens=32,
    max_bytes=4 * 512,
    row_cost=RowCost(position_bytes=1),
)


def budget(**changes) -> Budget:
    return replace(BUDGET, **changes)


def sequence(name: str, num_prompt_tokens: int = 8, max_tokens: int = 8, *, group: str = "") -> SequenceState:
    prompt = Prompt(tuple(range(num_prompt_tokens)))
    return SequenceState(Request(name, prompt, Sampling(max_tokens=max_tokens), group=group))


def run(scheduler: Scheduler) -> Plan:
    """One step as the engine makes it: every row that draws gets a token, and one that has all of them leaves."""
    plan = scheduler.schedule()
    drawing = [*plan.decode, *(chunk.sequence for chunk in plan.prefill if chunk.is_last)]
    scheduler.commit(plan, [Drawn(one, (7,)) for one in drawing])
    scheduler.check_integrity()
    scheduler.remove([one for one in drawing if one.num_tokens >= one.max_total_tokens])
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


def test_nobody_overtakes_the_first_in_the_queue_when_it_does_not_fit():
    scheduler = Scheduler(budget(max_bytes=2 * 256))
    scheduler.add(sequence("running", max_tokens=100))
    run(scheduler)
    scheduler.add(sequence("big", 300, max_tokens=8))  # 2 rows x 512 positions: does not fit beside the other
    scheduler.add(sequence("small", max_tokens=8))  # 2 rows x 256 would
    for _ in range(99):
        assert names(c.sequence for c in run(scheduler).prefill) == []
        assert names(scheduler.waiting) == ["big", "small"]
    assert names(c.sequence for c in run(scheduler).prefill) == ["big"]


def test_rows_stay_compact_with_decoding_rows_first_whatever_leaves():
    rng = random.Random(0)
    scheduler = Scheduler(budget(max_rows=7, max_bytes=8 * 256))
    contents: dict[int, str] = {}  # what a cache would hold at each row
    num_rows = 0  # rows that a cache would have memory for
    for step in range(800):
        if not scheduler.has_work:
            num_rows = 0  # an idle engine gives its memory back
        if (rng.random() < 0.3 or not scheduler.has_work) and step % 100 < 50:
            lengths = rng.choice([(10, 30), (90, 400), (300, 200)])
            scheduler.add(
                sequence(f"s{step}", rng.randint(1, lengths[0]), lengths[1], group=rng.choice("abc"))
            )
        plan = scheduler.schedule()
        assert all(target < num_rows for _, target in plan.moves), (
            "a move beyond the rows there is memory for"
        )
        copies = {target: contents[source] for source, target in plan.moves}
        contents.update(copies)
        for chunk in plan.prefill:
            if chunk.start == 0:
                contents[chunk.sequence.row] = chunk.sequence.request.id
        for running in (*plan.decode, *(c.sequence for c in plan.prefill)):
            assert contents[running.row] == running.request.id, "a row lost its keys and values"
        assert [s.row for s in plan.decode] == list(range(len(plan.decode)))
        drawing = [*plan.decode, *(c.sequence for c in plan.prefill if c.is_last)]
        scheduler.commit(plan, [Drawn(one, (7,)) for one in drawing])
        scheduler.check_integrity()
        in_use = [s for s in scheduler.running if s.num_cached_tokens]
        assert all(s.row < plan.num_rows for s in in_use)
        assert max((s.num_cached_tokens for s in in_use), default=0) <= plan.num_positions
        num_rows = max(num_rows, plan.num_rows)
        scheduler.remove([s for s in scheduler.running if rng.random() < 0.03])
    assert scheduler.num_preempted > 2


def test_recurrent_rows_of_one_step_take_equally_many_tokens_and_begin_together():
    rng = random.Random(1)
    cost = RowCost(position_bytes=0, state_bytes=100)
    scheduler = Scheduler(budget(max_bytes=400, row_cost=cost))
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
        if plan.prefill:
            first = plan.prefill[0]
            wanted = min(first.sequence.num_prompt_tokens - first.start, 32)
            assert first.stop - first.start == wanted, "the first in line takes a whole chunk"
        scheduler.remove([s for s in scheduler.decoding if rng.random() < 0.3])
    assert sorted(began, key=added.index) == added[: len(began)], "nobody is left behind"
    assert len(added) - len(began) <= 6 + 4
    assert max(widths) > 1, "rows must share a forward where they can"


def test_states_are_counted_by_rows_in_use():
    cost = RowCost(position_bytes=1, state_bytes=100)
    assert cost.batch_bytes(3, 10) == 4 * 256 + 3 * 100
    scheduler = Scheduler(budget(max_bytes=2 * 256 + 200, row_cost=cost))
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


def test_one_group_gives_rows_back_while_others_wait_and_takes_them_again_afterwards():
    scheduler = Scheduler(BUDGET)
    for index in range(8):
        scheduler.add(sequence(f"n{index}", max_tokens=200, group="n"))
    for _ in range(5):
        run(scheduler)
    assert len(scheduler.decoding) == 4
    scheduler.add(sequence("single", 3, max_tokens=3))
    steps = 0
    while "single" in names([*scheduler.waiting, *scheduler.running]):
        run(scheduler)
        steps += 1
        assert steps <= 6, "three tokens must not wait for a request of another's"
    for _ in range(60):
        run(scheduler)
    assert len(scheduler.running) == 4
    assert scheduler.num_preempted == 1


def test_rows_are_shared_evenly_between_groups_that_all_want_more():
    rng = random.Random(3)
    scheduler = Scheduler(budget(max_rows=6, max_bytes=10**6))
    for group, count in (("a", 40), ("b", 9), ("c", 40)):
        for index in range(count):
            scheduler.add(sequence(f"{group}{index}", 4, rng.randint(30, 60), group=group))
        for _ in range(10):
            run(scheduler)
    held = Counter(one.group for one in scheduler.running)
    assert held == {"a": 2, "b": 2, "c": 2}


def test_a_preempted_sequence_keeps_its_tokens_and_computes_them_anew():
    scheduler = Scheduler(budget(max_bytes=2 * 512))
    for name in ("old", "young"):
        scheduler.add(sequence(name, 200, max_tokens=500))
    young = scheduler.waiting[1]
    for _ in range(400):
        if not scheduler.num_preempted:
            run(scheduler)
    assert names(scheduler.waiting) == ["young"]
    assert young.num_cached_tokens == 0
    assert 250 < len(young.generated) < 400
    generated = list(young.generated)
    for _ in range(600):
        if young not in scheduler.running:
            run(scheduler)
    assert "old" not in names(scheduler.running), "both never fit again"
    while young not in scheduler.decoding:
        plan = run(scheduler)
        assert all(chunk.stop <= young.num_prompt_tokens + len(generated) for chunk in plan.prefill)
    assert young.generated[: len(generated)] == generated
    assert len(young.generated) == len(generated) + 1


def test_a_row_that_asks_for_a_whole_context_keeps_nobody_out():
    scheduler = Scheduler(budget(max_bytes=4 * 512))
    scheduler.add(sequence("agent", 10, max_tokens=2000))
    for name in ("a", "b", "c"):
        scheduler.add(sequence(name, 10, max_tokens=20))
    run(scheduler)
    assert len(scheduler.running) == 4


def test_short_prompts_pass_a_long_one_and_do_not_starve_it():
    scheduler = Scheduler(budget(max_rows=64, max_bytes=10**8))
    scheduler.add(sequence("long", 32 * 100))
    run(scheduler)
    waits, steps = [], 0
    while "long" not in names(scheduler.decoding):
        scheduler.add(short := sequence(f"s{steps}", 20, max_tokens=2))
        began = steps
        while short.num_cached_tokens == 0 and steps < began + 9:
            run(scheduler)
            steps += 1
        waits.append(steps - began)
        assert steps <= 210, "the long one has every second step"
    assert max(waits) <= 3, "a short prompt waits for a chunk or two, not for a long prompt"


def test_a_budget_says_how_long_one_row_may_become():
    for max_bytes in (0, 255, 256, 1000, 2**20, 2**40):
        longest = budget(max_bytes=max_bytes).max_positions
        cost = BUDGET.row_cost
        assert longest == 0 or cost.batch_bytes(1, longest) <= max_bytes
        assert longest >= 2**31 - 1 or cost.batch_bytes(1, longest + 1) > max_bytes
