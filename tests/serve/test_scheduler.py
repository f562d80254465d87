"""The scheduler alone: no arrays, no model."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest
from dry_engine import (
    BUDGET,
    Machine,
    Towers,
    budget,
    decode,
    media,
    names,
    pictured,
    prefill,
    row_cost,
    run,
    sequence,
)

from serve.cache.capacity import Bucket
from serve.cache.precision import PLAIN, KvPrecision
from serve.engine.placement import least_bytes
from serve.engine.plan import Drawn, SequenceState
from serve.engine.request import Request, Sampling
from serve.engine.scheduler import Scheduler
from serve.model.prompt import Prompt


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
        assert names(decode(plan)) == ["short"]
        widths += [chunk.stop - chunk.start for chunk in prefill(plan)]
    assert widths == [32, 32, 32, 4]
    assert names(decode(run(scheduler))) == ["short", "long"]


def test_short_prompts_share_a_prefill_and_padding_counts_against_its_budget():
    scheduler = Scheduler(BUDGET)
    for name, length in (("a", 10), ("b", 10), ("c", 16), ("d", 3)):
        scheduler.add(sequence(name, length))
    assert names(c.sequence for c in prefill(run(scheduler))) == ["a", "b", "d"]  # 3 x 16 is 48 > 32
    assert names(c.sequence for c in prefill(run(scheduler))) == ["c"]


def test_nobody_overtakes_the_first_in_the_queue_when_it_does_not_fit():
    scheduler = Scheduler(budget(max_bytes=2 * 256))
    scheduler.add(sequence("running", max_tokens=100))
    run(scheduler)
    scheduler.add(sequence("big", 300, max_tokens=8))  # 2 rows x 512 positions: does not fit beside the other
    scheduler.add(sequence("small", max_tokens=8))  # 2 rows x 256 would
    for _ in range(99):
        assert names(c.sequence for c in prefill(run(scheduler))) == []
        assert names(scheduler.waiting) == ["big", "small"]
    assert names(c.sequence for c in prefill(run(scheduler))) == ["big"]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", ["plain", "quantized", "mixed", "recurrent"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_and_goes_every_answer_is_what_its_own_tokens_lead_to(kind, ahead, seed):
    rng = random.Random(seed)
    state_bytes = 50 if kind == "recurrent" else 0
    bounds = budget(
        max_rows=7, max_bytes=rng.choice([6, 8, 40]) * 256, row_cost=row_cost(state_bytes=state_bytes)
    )
    run = Machine(bounds, ahead=ahead, has_prefixes=seed % 2 == 1)
    precisions = {
        "plain": [PLAIN],
        "quantized": [KvPrecision("affine", 8, 8)],
        "mixed": [
            PLAIN,
            KvPrecision("affine", 4, 4, start_after=40),
            KvPrecision("affine", 8, 8, start_after=300),
        ],
        "recurrent": [PLAIN],
    }[kind]
    for step in range(600):
        if (rng.random() < 0.3 or not run.has_work) and step % 100 < 50:
            longest, answer = rng.choice([(10, 30), (90, 400), (300, 200)])
            length = rng.randint(1, longest)
            first = rng.choice([0, 0, 1000 * step])  # many begin with the same tokens
            run.add(
                Request(
                    f"s{step}",
                    Prompt(tuple(range(first, first + length))),
                    Sampling(max_tokens=rng.randint(1, answer)),
                    group=rng.choice("abc"),
                    precision=rng.choice(precisions),
                )
            )
        run.step()
        run.cancel([one for one in run.alive if rng.random() < 0.01])
    while run.has_work:
        run.step()
    assert len(run.answers) > 30
    for request, answer in run.answers:
        assert answer == run.alone(request)
    assert run.scheduler.num_preempted > 0 or bounds.max_bytes > 8 * 256
    assert bool(run.num_restored) == (seed % 2 == 1)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("kind", ["plain", "mixed", "recurrent", "picture", "prompt"])
@pytest.mark.parametrize("seed", range(4))
def test_a_pictures_tokens_run_after_a_step_that_encoded_it_and_blocks_are_never_cut(kind, ahead, seed):
    """Chunks, prefixes and preemption as ever; what a step encodes stays within its budget."""
    rng = random.Random(seed)
    bounds = budget(
        max_rows=7,
        max_bytes=rng.choice([6, 8, 40]) * 256,
        row_cost=row_cost(state_bytes=50 if kind == "recurrent" else 0),
        encode_patches=rng.choice([1, 100, 200]),
    )
    run = Machine(bounds, ahead=ahead, has_prefixes=seed % 2 == 1)
    late = [PLAIN, KvPrecision("affine", 4, 4, start_after=40), KvPrecision("affine", 8, 8, start_after=300)]
    for step in range(600):
        if (rng.random() < 0.3 or not run.has_work) and step % 100 < 50:
            longest, answer = rng.choice([(10, 30), (90, 400), (300, 200)])
            first = rng.choice([0, 0, 1000 * step])
            run.add(
                Request(
                    f"s{step}",
                    pictured(first, rng.randint(1, longest), block_kind=kind),
                    Sampling(max_tokens=rng.randint(1, answer)),
                    group=rng.choice("abc"),
                    precision=rng.choice([PLAIN] if kind in ("plain", "recurrent") else late),
                )
            )
        run.step()
        run.cancel([one for one in run.alive if rng.random() < 0.01])
    while run.has_work:
        run.step()
    assert len(run.answers) > 30
    for request, answer in run.answers:
        assert answer == run.alone(request)
    assert run.towers.num_encoded > 10
    assert run.towers.num_again > 0 or seed % 2 == 1, "nothing was ever forgotten"
    assert run.scheduler.num_preempted > 0 or bounds.max_bytes > 8 * 256
    if kind != "prompt":
        assert bool(run.num_restored) == (seed % 2 == 1)


def test_a_large_picture_holds_up_nobody_but_its_own_row():
    scheduler = Scheduler(
        budget(max_bytes=100 * 512, max_rows=9, encode_patches=100), features=Towers(random.Random(0))
    )
    scheduler.add(sequence("streaming", max_tokens=50))
    run(scheduler)
    large = [media(f"large-{number}", 40 * number, 30, 5000) for number in range(4)]
    small = [media(f"small-{number}", 4 * number, 3, 40) for number in range(4)]
    for name, pieces in (("seeing", large), ("small", small)):
        prompt = Prompt(tuple(range(200)), tuple(pieces))
        scheduler.add(SequenceState(Request(name, prompt, Sampling(max_tokens=2))))
    scheduler.add(sequence("words", 20, max_tokens=3))
    encodes, ran = [], []
    while scheduler.prefilling or scheduler.waiting:
        plan = scheduler.schedule()
        scheduler._features.encode(plan, 100)
        encodes.append([encode.media.key for encode in plan.encodes])
        ran.append(names(chunk.sequence for chunk in plan.chunks))
        scheduler.commit(plan, [Drawn(chunk.sequence, (7,)) for chunk in plan.chunks if chunk.draws])
    assert all("streaming" in each for each in ran), "a stream waits for a picture"
    assert ran[0] == ["streaming", "words"], "words wait for others' pictures"
    assert {len(each) for each in encodes if any(key.startswith("large") for key in each)} == {1}
    assert ["small-0", "small-1"] in encodes, "small ones share a step"


def test_a_block_longer_than_a_chunk_is_computed_in_one():
    scheduler = Scheduler(budget(max_bytes=100 * 512), features=Towers(random.Random(0)))
    prompt = Prompt(tuple(range(100)), (media("a", 20, 50, 200),), blocks=((20, 70),))
    scheduler.add(SequenceState(Request("a", prompt, Sampling(max_tokens=2))))
    chunks = []
    while scheduler.waiting or scheduler.prefilling:
        plan = scheduler.schedule()
        scheduler._features.encode(plan, 1024)
        chunks += [(chunk.start, chunk.stop) for chunk in plan.chunks]
        scheduler.commit(plan, [Drawn(chunk.sequence, (7,)) for chunk in plan.chunks if chunk.draws])
    assert chunks == [(0, 20), (20, 70), (70, 100)]


def test_a_prefix_whose_precision_takes_more_room_than_there_is_waits():
    rng = random.Random(8)  # a found prefix puts its row where the others leave no room for it
    run = Machine(budget(max_rows=7, max_bytes=rng.choice([8, 12, 16, 24]) * 256), has_prefixes=True)
    precisions = [
        KvPrecision("affine", 4, 4, start_after=40),
        KvPrecision("affine", 8, 8, start_after=300),
        PLAIN,
    ]
    for step in range(500):
        if rng.random() < 0.4 and len(run.scheduler.waiting) < 6:
            prompt = Prompt(tuple(range(rng.randint(1, rng.choice([50, 330, 500])))))
            sampling = Sampling(max_tokens=rng.randint(1, 200))
            run.add(
                Request(
                    f"s{step}", prompt, sampling, group=rng.choice("abc"), precision=rng.choice(precisions)
                )
            )
        run.step()
    assert len(run.answers) > 30
    for request, answer in run.answers:
        assert answer == run.alone(request)


def test_recurrent_rows_of_one_step_take_equally_many_tokens_and_begin_together():
    rng = random.Random(1)
    cost = row_cost(0, state_bytes=100)
    scheduler = Scheduler(budget(max_bytes=400, row_cost=cost))
    added, began, widths = [], [], []
    for step in range(600):
        if rng.random() < 0.4 and len(scheduler.waiting) < 6:
            scheduler.add(sequence(f"s{step}", rng.choice([1, 2, 9, 10, 40, 100]), 5))
            added.append(f"s{step}")
        plan = run(scheduler)
        chunks = prefill(plan)
        assert len({chunk.num_tokens for chunk in chunks}) <= 1
        assert len({chunk.begins for chunk in chunks}) <= 1
        assert not any(chunk.begins for chunk in plan.chunks[: plan.num_single])
        began += [chunk.sequence.request.id for chunk in chunks if chunk.begins]
        widths.append(len(chunks))
        if chunks:
            wanted = [min(one.sequence.num_prompt_tokens - one.start, 32) for one in chunks]
            assert chunks[0].num_tokens in wanted, "the first in line takes a whole chunk"
        scheduler.remove([s for s in scheduler.decoding if rng.random() < 0.3])
    assert sorted(began, key=added.index) == added[: len(began)], "nobody is left behind"
    assert len(added) - len(began) <= 6 + 4
    assert max(widths) > 1, "rows must share a forward where they can"


def test_states_are_counted_by_rows_in_use():
    cost = row_cost(state_bytes=100)
    assert least_bytes([Bucket(PLAIN, 256)] * 3, cost) == 4 * 256 + 3 * 100
    scheduler = Scheduler(budget(max_bytes=2 * 256 + 200, row_cost=cost))
    for name in "abc":
        scheduler.add(sequence(name))
    assert names(c.sequence for c in prefill(run(scheduler))) == ["a", "b"]
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
        assert all(chunk.stop <= young.num_prompt_tokens + len(generated) for chunk in prefill(plan))
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
