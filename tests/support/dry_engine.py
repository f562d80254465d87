"""An engine without arrays, for tests of the scheduler: rows hold the tokens themselves."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from serve.adapters.versions.version import AdapterVersion
from serve.cache.capacity import Bucket, LayerShape, Place, RowCost
from serve.cache.features import FeatureKey
from serve.cache.precision import PLAIN
from serve.engine.budget import Budget
from serve.engine.plan import Capture, Chunk, Drawn, Plan, SequenceState
from serve.engine.providers import NoPrefixes
from serve.engine.request import Request, Sampling
from serve.engine.scheduler import Scheduler
from serve.engine.shares import Shares
from serve.errors import AdapterError, LatheError
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


MAX_STEPS = 50_000
"""Of one scheduler: whoever waits for something that never happens is told."""


def budget(**changes) -> Budget:
    return replace(BUDGET, **changes)


def sequence(name: str, num_prompt_tokens: int = 8, max_tokens: int = 8, **fields) -> SequenceState:
    """`fields`: of the Request."""
    prompt = Prompt(tuple(range(num_prompt_tokens)))
    return SequenceState(Request(name, prompt, Sampling(max_tokens=max_tokens), **fields))


def adapter(name: str) -> AdapterVersion:
    """A version of which nobody knows a slot."""
    return AdapterVersion(name, 1, content_hash=name, path="")


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
    plan = _scheduled(scheduler)
    drawing = [chunk.sequence for chunk in plan.chunks if chunk.draws]
    scheduler.commit(plan, [Drawn(one, (7,)) for one in drawing])
    scheduler.check_integrity()
    scheduler.remove([one for one in drawing if one.num_tokens >= one.max_total_tokens])
    scheduler.check_integrity()
    return plan


def _scheduled(scheduler: Scheduler) -> Plan:
    assert scheduler._num_plans < MAX_STEPS, "what is waited for does not happen"
    return scheduler.schedule()


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


class Slots:
    """Fewer places than adapters: who is held by nobody makes room, the one let go first; a load takes `load_steps`.

    `tick` ends loads. Rows that are held on and on keep others out: `Residency` sees to it that they do not.
    """

    def __init__(self, num_slots: int, load_steps: int = 3, broken: Sequence[str] = ()) -> None:
        self.num_slots = num_slots
        self.load_steps = load_steps
        self.broken = set(broken)
        self.slots: dict[str, int] = {}  # resident, the one let go first at the beginning
        self.loading: dict[str, int] = {}  # steps left
        self.failed: set[str] = set()
        self.holders: Counter[str] = Counter()
        self.num_loads = self.num_asked = 0

    def hold(self, sequence: SequenceState) -> bool:
        self.num_asked += 1
        adapter = sequence.request.adapter
        if adapter is None:
            sequence.slot = 0
            return True
        name = adapter.name
        if name in self.failed:
            self.failed.discard(name)
            raise AdapterError(f"{name} is broken")
        if name in self.slots:
            self.holders[name] += 1
            sequence.slot = self.slots[name]
            return True
        if name not in self.loading and self._has_room():
            self.loading[name] = self.load_steps
        return False

    def let_go(self, sequence: SequenceState) -> None:
        if sequence.request.adapter is not None:
            name = sequence.request.adapter.name
            self.holders[name] -= 1
            assert self.holders[name] >= 0, "let go more often than held"
            self.slots[name] = self.slots.pop(name)

    def tick(self) -> bool:
        """Whether some load has ended."""
        ended = [name for name, left in self.loading.items() if left <= 1]
        self.loading = {name: left - 1 for name, left in self.loading.items() if left > 1}
        for name in ended:
            if name in self.broken:
                self.failed.add(name)
            else:
                self.num_loads += 1
                self.slots[name] = self.num_loads
        return bool(ended)

    def finish(self) -> None:
        """Until a load has ended; one is under way."""
        assert any(self.tick() for _ in range(self.load_steps)), "nothing is loaded"

    def _has_room(self) -> bool:
        if len(self.slots) + len(self.loading) < self.num_slots:
            return True
        idle = next((name for name in self.slots if not self.holders[name]), None)
        if idle is not None:
            del self.slots[idle]
        return idle is not None


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )


def _next_token(tokens: Sequence[int]) -> int:
    """The model: a token that all those before it lead to."""
    return hash(tuple(tokens)) % 1000


class Machine:
    """An engine without arrays: rows hold the tokens themselves, and states all tokens that went into them."""

    def __init__(
        self,
        bounds: Budget,
        *,
        ahead: bool = False,
        has_prefixes: bool = False,
        slots: Slots | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.tree = Tree() if has_prefixes else None
        self.towers = Towers(random.Random(0))
        self.slots = slots
        self.scheduler = Scheduler(bounds, self.tree or NoPrefixes(), self.towers, slots, shares=shares)
        self.ahead = ahead
        self.rows: dict[Place, list[int]] = {}
        self.states: dict[int, list[int]] = {}
        self.capacities: dict[Bucket, int] = {}
        self.flights: deque[tuple[Plan, dict[SequenceState, int]]] = deque()
        self.alive: list[SequenceState] = []
        self.answers: list[tuple[Request, list[int]]] = []
        self.refused: list[tuple[Request, LatheError]] = []
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
        if self.slots is not None and self.slots.tick():
            self.scheduler.wake()
        plan = _scheduled(self.scheduler)
        for sequence, error in self.scheduler.take_failed():
            self.refused.append((sequence.request, error))
            self.cancel([sequence])
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
        if self.slots is not None and sequence.request.adapter is not None:
            assert self.slots.slots[sequence.request.adapter.name] == sequence.slot, "an adapter left its row"
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
