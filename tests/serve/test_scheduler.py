"""The scheduler alone: no arrays, no model."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from serve.cache.capacity import Bucket, LayerShape, Place, RowCost
from serve.cache.features import FeatureKey
from serve.cache.precision import PLAIN, KvPrecision
from serve.engine.placement import least_bytes
from serve.engine.plan import Capture, Chunk, Drawn, Plan, SequenceState
from serve.engine.request import Request, Sampling
from serve.engine.scheduler import Budget, NoPrefixes, Scheduler
from serve.model.prompt import Media, Prompt


def row_cost(position_bytes: int = 1, state_bytes: int = 0) -> RowCost:
    layers = (
        [LayerShape(num_heads=1, key_dim=position_bytes, value_dim=0, itemsize=1)] if position_bytes else []
    )
    return RowCost(layers, state_bytes)


BUDGET = Budget(
    max_rows=4,
    prefill_chunk_tokens=32,
    max_bytes=4 * 512,
    row_cost=row_cost(),
)


def budget(**changes) -> Budget:
    return replace(BUDGET, **changes)


def sequence(name: str, num_prompt_tokens: int = 8, max_tokens: int = 8, *, group: str = "") -> SequenceState:
    prompt = Prompt(tuple(range(num_prompt_tokens)))
    return SequenceState(Request(name, prompt, Sampling(max_tokens=max_tokens), group=group))


def media(key: str, start: int, length: int, num_patches: int) -> Media:
    return Media("image", key, np.arange(start, start + length), {"pixels": np.zeros(1)}, num_patches)


def pictured(first: int, length: int, *, block_kind: str | None = None) -> Prompt:
    """Tokens from `first` on, with pictures that follow from `first`, as far as they have room."""
    rng, pieces, start = random.Random(first), [], 0
    while True:
        start += rng.choice([0, 3, 20])
        size = rng.choice([1, 4, 25, 40])
        if start + size > length:
            break
        pieces.append(media(f"{first}-{rng.randrange(6)}", start, size, size * 4))
        start += size
    blocks = {"picture": [(one.start, one.stop) for one in pieces], "prompt": [(0, length)]}
    return Prompt(
        tuple(range(first, first + length)), tuple(pieces), blocks=tuple(blocks.get(block_kind, ()))
    )


def run(scheduler: Scheduler) -> Plan:
    """One step as the engine makes it: every row that draws gets a token, and one that has all of them leaves."""
    plan = scheduler.schedule()
    drawing = [chunk.sequence for chunk in plan.chunks if chunk.draws]
    scheduler.commit(plan, [Drawn(one, (7,)) for one in drawing])
    scheduler.check_integrity()
    scheduler.remove([one for one in drawing if one.num_tokens >= one.max_total_tokens])
    scheduler.check_integrity()
    return plan


def names(sequences) -> list[str]:
    return [s.request.id for s in sequences]


def decode(plan: Plan) -> list[SequenceState]:
    """Rows that run one token beside each other."""
    return [chunk.sequence for chunk in plan.chunks[: plan.num_single]]


def prefill(plan: Plan) -> list[Chunk]:
    """Chunks of the second forward."""
    return list(plan.chunks[plan.num_single :])


@dataclass
class Prefix:
    """What a tree would give."""

    segments: list[tuple[int, ...]]
    num_tokens: int


@dataclass
class Tree:
    """A prefix cache that holds whole token lists."""

    held: set[tuple[int, ...]] = field(default_factory=set)
    num_pinned: int = 0

    def find(self, sequence: SequenceState) -> Prefix | None:
        keys = tuple(sequence.keys(sequence.num_tokens))
        longest = max((_common(keys[:-1], one) for one in self.held), default=0)
        longest = sequence.request.prompt.whole(longest)
        if longest == 0:
            return None
        self.num_pinned += 1
        return Prefix([tuple(sequence.tokens(0, longest))], longest)

    def release(self, prefix: Prefix) -> None:
        self.num_pinned -= 1

    def num_known(self, sequence: SequenceState, stop: int) -> int:
        keys = tuple(sequence.keys(stop))
        assert len(keys) == stop, "a token that is not known yet"
        return max((_common(keys, one) for one in self.held), default=0)


class Towers:
    """What was encoded: at hand until it is forgotten, which happens to whatever nobody holds."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.at_hand: set[FeatureKey] = set()
        self.holders: dict[FeatureKey, set[SequenceState]] = {}
        self.num_encoded = self.num_again = 0
        self._ever: set[FeatureKey] = set()

    def hold(self, sequence: SequenceState, number: int) -> bool:
        key = sequence.feature_key(number)
        if key not in self.at_hand:
            return False
        self.holders.setdefault(key, set()).add(sequence)
        sequence.held.add(number)
        return True

    def relax(self, sequence: SequenceState) -> None:
        for number in sequence.held:
            self.holders[sequence.feature_key(number)].discard(sequence)
        sequence.held.clear()

    def encode(self, plan: Plan, max_patches: int) -> None:
        costs = [encode.media.num_patches for encode in plan.encodes]
        assert len(costs) <= 1 or sum(costs) <= max_patches, "more than a step's patches"
        keys = [encode.sequence.feature_key(encode.number) for encode in plan.encodes]
        assert len(set(keys)) == len(keys), "encoded twice"
        assert not self.at_hand.intersection(keys), "encoded though it is at hand"
        self.num_encoded += len(keys)
        self.num_again += len(self._ever.intersection(keys))
        self._ever.update(keys)
        self.at_hand.update(keys)
        for encode in plan.encodes:
            assert self.hold(encode.sequence, encode.number)

    def see(self, chunk: Chunk, encoded_now: set[FeatureKey]) -> None:
        """The chunk's placeholders are filled."""
        for number, media in enumerate(chunk.sequence.request.prompt.media):
            if media.first_in(chunk.start, chunk.stop) is not None:
                key = chunk.sequence.feature_key(number)
                assert number in chunk.sequence.held, "a picture's tokens run without its features"
                assert key in self.at_hand
                assert key not in encoded_now, "features are used in the step that encodes them"

    def forget(self) -> None:
        free = [key for key in self.at_hand if not self.holders.get(key)]
        self.at_hand.difference_update(key for key in free if self.rng.random() < 0.2)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _next_token(tokens: Sequence[int]) -> int:
    """The model: a token that all those before it lead to."""
    return hash(tuple(tokens)) % 1000


class Machine:
    """An engine without arrays: rows hold the tokens themselves, and states all tokens that went into them."""

    def __init__(self, bounds: Budget, *, ahead: bool = False, has_prefixes: bool = False) -> None:
        self.tree = Tree() if has_prefixes else None
        self.towers = Towers(random.Random(0))
        self.scheduler = Scheduler(bounds, self.tree or NoPrefixes(), self.towers)
        self.ahead = ahead
        self.rows: dict[Place, list[int]] = {}
        self.states: dict[int, list[int]] = {}
        self.capacities: dict[Bucket, int] = {}
        self.flights: deque[tuple[Plan, dict[SequenceState, int]]] = deque()
        self.alive: list[SequenceState] = []
        self.answers: list[tuple[Request, list[int]]] = []
        self.num_restored = 0
        self.last: Plan | None = None

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self.flights)

    def alone(self, request: Request) -> list[int]:
        tokens = list(request.prompt.token_ids)
        for _ in range(request.sampling.max_tokens):
            tokens.append(_next_token(tokens))
            if tokens[-1] % 50 == 0:
                break
        return tokens[len(request.prompt.token_ids) :]

    def add(self, request: Request) -> None:
        self.alive.append(SequenceState(request))
        self.scheduler.add(self.alive[-1])

    def cancel(self, sequences: list[SequenceState]) -> None:
        self.alive = [one for one in self.alive if one not in sequences]
        self.scheduler.remove(sequences)
        for sequence in sequences:
            self.towers.relax(sequence)
        self.scheduler.check_integrity()

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if not plan.is_empty:
            self.flights.append((plan, self.start(plan)))
        if len(self.flights) > self.ahead or (self.flights and plan.is_empty):
            self.read()
        self.scheduler.check_integrity()

    def read(self) -> None:
        plan, drawn = self.flights.popleft()
        self.scheduler.commit(plan, [Drawn(sequence, (token,)) for sequence, token in drawn.items()])
        gone = []
        for sequence in drawn:
            is_over = sequence.num_tokens >= sequence.max_total_tokens or drawn[sequence] % 50 == 0
            if sequence in self.alive and is_over:
                self.answers.append((sequence.request, list(sequence.generated)))
                gone.append(sequence)
        self.cancel(gone)

    def start(self, plan: Plan) -> dict[SequenceState, int]:
        for capture in plan.departures:
            self.capture(capture)
        self.move(plan)
        for sequence, prefix in plan.restores:
            self.num_restored += 1
            self.rows[sequence.place] = list(prefix.segments[0])
            self.states[sequence.state_row] = list(prefix.segments[0])
            self.tree.release(prefix)
        self.towers.encode(plan, self.scheduler.budget.encode_patches)
        encoded_now = {encode.sequence.feature_key(encode.number) for encode in plan.encodes}
        for chunk in plan.chunks:
            prompt = chunk.sequence.request.prompt
            assert prompt.whole(chunk.start) == chunk.start, "a chunk begins inside a block"
            assert prompt.whole(chunk.stop) == chunk.stop, "a chunk ends inside a block"
            self.towers.see(chunk, encoded_now)
        self.towers.forget()
        drawn = {chunk.sequence: self.run(chunk) for chunk in plan.chunks}
        for capture in plan.captures:
            self.capture(capture)
        self.check(plan)
        return {chunk.sequence: drawn[chunk.sequence] for chunk in plan.chunks if chunk.draws}

    def move(self, plan: Plan) -> None:
        copies = {move.target: self.rows[move.source] for move in plan.moves}
        assert all(len(self.rows[move.source]) == move.num_positions for move in plan.moves)
        self.rows |= {place: list(tokens) for place, tokens in copies.items()}
        self.states |= {target: self.states[source] for source, target in plan.state_moves}
        self.capacities = dict(plan.capacities)
        self.rows = {p: tokens for p, tokens in self.rows.items() if p.row < self.capacities.get(p.bucket, 0)}

    def run(self, chunk: Chunk) -> int:
        sequence, place = chunk.sequence, chunk.sequence.place
        assert chunk.begins == (chunk.start == 0)
        if chunk.begins:
            self.rows[place] = []
            self.states[sequence.state_row] = []
        tokens = sequence.tokens(chunk.start, chunk.stop)
        if not tokens:  # drawn by the step in flight
            tokens = [self.flights[-1][1][sequence]]
        assert len(tokens) == chunk.num_tokens
        row = self.rows[place]
        assert len(row) == chunk.start, "a row does not hold what comes before its chunk"
        row += tokens
        assert len(row) <= place.bucket.num_positions, "a row is longer than its bucket"
        assert len(row) < sequence.max_total_tokens, "the last token is never written"
        after = sequence.request.prompt.whole(sequence.precision.start_after)
        stored = PLAIN if len(row) <= after else sequence.final_precision
        assert place.bucket.precision == stored, "a row is in another precision"
        if self.scheduler.budget.is_recurrent:
            self.states[sequence.state_row] = [*self.states[sequence.state_row], *tokens]
            assert self.states[sequence.state_row] == row, "a state is another row's"
        return _next_token(row)

    def capture(self, capture: Capture) -> None:
        held = self.rows[capture.place]
        assert len(held) == capture.stop
        assert held == capture.sequence.tokens(0, capture.stop)
        self.tree.held.add(tuple(capture.sequence.keys(capture.stop)))

    def check(self, plan: Plan) -> None:
        cost = self.scheduler.budget.row_cost
        singles = [chunk.sequence for chunk in plan.chunks[: plan.num_single]]
        for bucket in {sequence.place.bucket for sequence in singles}:
            rows = [sequence.place.row for sequence in singles if sequence.place.bucket == bucket]
            assert rows == list(range(len(rows))), "the one-token rows of a bucket are its first"
        assert [sequence.state_row for sequence in singles] == list(range(len(singles)))
        assert all(chunk.num_tokens == 1 for chunk in plan.chunks[: plan.num_single])
        num_rows = len(self.scheduler.running)
        held = sum(count * cost.row_bytes(bucket) for bucket, count in self.capacities.items())
        assert plan.num_bytes == held + plan.num_state_rows * cost.state_bytes
        assert plan.num_bytes <= self.scheduler.max_bytes or num_rows <= 1
        if self.last is not None and self.last.composition == plan.composition:
            before = [(c.sequence, c.stop) for c in self.last.chunks[: self.last.num_single]]
            assert before == [(c.sequence, c.start) for c in plan.chunks[: plan.num_single]]
            assert not cost.state_bytes or self.last.num_state_rows == plan.num_state_rows
        self.last = plan


@pytest.fixture
def machine() -> Callable[..., Machine]:
    """machine(bounds, ahead=False, has_prefixes=False) → a scheduler and something that does what it says."""
    return Machine


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
    assert names(c.sequence for c in prefill(run(scheduler))) == ["a", "b"]  # 3 x 16 would be 48 > 32
    assert names(c.sequence for c in prefill(run(scheduler))) == ["c", "d"]


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
def test_whatever_comes_and_goes_every_answer_is_what_its_own_tokens_lead_to(machine, kind, ahead, seed):
    rng = random.Random(seed)
    state_bytes = 50 if kind == "recurrent" else 0
    bounds = budget(
        max_rows=7, max_bytes=rng.choice([6, 8, 40]) * 256, row_cost=row_cost(state_bytes=state_bytes)
    )
    run = machine(bounds, ahead=ahead, has_prefixes=seed % 2 == 1)
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
def test_a_pictures_tokens_run_after_a_step_that_encoded_it_and_blocks_are_never_cut(
    machine, kind, ahead, seed
):
    """Chunks, prefixes and preemption as ever; what a step encodes stays within its budget."""
    rng = random.Random(seed)
    bounds = budget(
        max_rows=7,
        max_bytes=rng.choice([6, 8, 40]) * 256,
        row_cost=row_cost(state_bytes=50 if kind == "recurrent" else 0),
        encode_patches=rng.choice([1, 100, 200]),
    )
    run = machine(bounds, ahead=ahead, has_prefixes=seed % 2 == 1)
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


def test_a_prefix_whose_precision_takes_more_room_than_there_is_waits(machine):
    rng = random.Random(8)  # a found prefix puts its row where the others leave no room for it
    run = machine(budget(max_rows=7, max_bytes=rng.choice([8, 12, 16, 24]) * 256), has_prefixes=True)
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
