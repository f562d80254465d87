"""Who runs next: requests in, a Plan out, finished sequences taken away. Holds no arrays and imports no mlx.

Rows are shared out by priority (the lower, the earlier), then by shares of tenants and adapters (`Shares`), then
between groups (the rows of one HTTP request are one group): the next to be admitted is the oldest of the group that
holds fewest rows, and where there is no room for it, a group that holds at least two rows more gives its youngest
back. Nobody else overtakes it, and whoever has waited longest is passed for priority's sake MAX_OVERTAKEN times at
most, so nobody starves.
A row claims memory for what it holds and ANSWER_HEADROOM_TOKENS more. When rows outgrow the budget, the youngest of
the latest priority is preempted: it goes back into the queue, keeps its arrival, and goes on from what the prefix
cache has kept of it.
Prompts are computed in chunks beside one decode token for every running row: as much as those may wait for
(`Pace`), or `prefill_chunk_tokens` where nobody decodes. Steps take turns: one begins with the oldest prompt, the
next with the group that has had least computed, so short prompts pass long ones, which have every second step; the
oldest of the earliest priority begins every other of those.
Pictures are encoded in a step before the one that computes their tokens: `encode_patches` a step, or one picture,
beside the same decode tokens. A chunk ends before the first picture that is not encoded, and never inside a block.
Who has a row holds a slot of its adapter. Whose adapter is on its way is passed by others, and keeps its turn.

A step may be planned before the one in flight is read: plans rest on `num_planned_tokens`, which `schedule` moves,
and `commit` follows with what was drawn. A sequence that turns out to have ended has run a token too many. Where rows
have drafts, the step is read before the next is planned, for only then is it known how far they have come.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Protocol

from serve.cache.capacity import Bucket, RowCost, positions_capacity
from serve.cache.features import FeatureKey
from serve.engine.pace import Pace
from serve.engine.placement import Arrangement, Tenant, arrange, least_bytes
from serve.engine.plan import Capture, Chunk, Drawn, Encode, Found, Plan, Restore, SequenceState
from serve.engine.shares import Shares
from serve.errors import LatheError

ANSWER_HEADROOM_TOKENS = 256
"""Positions beyond its present ones that a row claims: a row that asks for 32,000 tokens keeps nobody out."""

MAX_SCORES = 1 << 23
"""Tokens of a forward times the positions that they look back on, of each head: backends without a kernel for it hold
all of them at once. Up to LEAST_CHUNK tokens are computed in any case."""
LEAST_CHUNK = 256
ALONE_TOKENS = 64
"""A chunk that would be computed in a step of its own costs about so many tokens more: what padding may take."""
MAX_OVERTAKEN = 32
"""So many are admitted before the one that has waited longest, for their priority is earlier; then it is its turn."""
MAX_SKIPPED = 4
"""Prompts that do not fit beside a step's others and are passed in it by those behind them."""

NO_DRAFTS: Mapping[SequenceState, Sequence[int]] = MappingProxyType({})

_by_arrival = attrgetter("arrival")


def _by_priority(sequence: SequenceState) -> tuple[int, int]:
    """The largest is the first to give its row back."""
    return sequence.request.priority, sequence.arrival


@dataclass(frozen=True)
class Budget:
    """The scheduler's bounds."""

    max_rows: int
    prefill_chunk_tokens: int
    """Tokens of prompts in one step, padding included."""
    max_bytes: int
    """Memory of all rows together, their buffers' rounding included."""
    row_cost: RowCost
    row_chunk_tokens: int | None = None
    """Of one prompt among them; None: all."""
    encode_patches: int = 1024

    @property
    def is_recurrent(self) -> bool:
        """Rows keep a state that takes in every token of a forward, padding too."""
        return self.row_cost.state_bytes > 0


class Prefixes(Protocol):
    """What the scheduler asks of a prefix cache."""

    def find(self, sequence: SequenceState) -> Found | None:
        """The longest prefix of its tokens, but for the last, that a row can be given; kept until released."""

    def release(self, prefix: Found) -> None:
        """A prefix will not be asked for again."""

    def num_known(self, sequence: SequenceState, stop: int) -> int:
        """How many of its first `stop` tokens need no capture."""


class Features(Protocol):
    """What the scheduler asks of what towers have made of pictures."""

    def hold(self, sequence: SequenceState, number: int) -> bool:
        """Whether the features of one of its prompt's media are at hand, or will be when the step in flight has run.

        If so, they are kept for it, and its number is in `sequence.held`.
        """

    def relax(self, sequence: SequenceState) -> None:
        """It has no row now: what can be encoded again need not be kept for it."""


class Adapters(Protocol):
    """What the scheduler asks of the adapters' places on the device."""

    def hold(self, sequence: SequenceState) -> bool:
        """Whether its adapter has a slot, or it needs none. If so, that is kept for it until `let_go`, and
        `sequence.slot` is it. Otherwise it is on its way; it is asked for again after `Scheduler.wake`, or when a
        row has been given up.

        Raises LatheError where it cannot come; the sequence ends with that.
        """

    def let_go(self, sequence: SequenceState) -> None:
        """It has no row now. Called once for each `hold` that was true."""


class NoAdapters:
    """Where all requests are the base's."""

    def hold(self, sequence: SequenceState) -> bool:
        """It needs no slot."""
        assert sequence.request.adapter is None, "nobody is there to give adapters slots"
        sequence.slot = 0
        return True

    def let_go(self, sequence: SequenceState) -> None:
        """Nothing was held."""


class NoFeatures:
    """Where no prompt has media."""

    def hold(self, sequence: SequenceState, number: int) -> bool:
        """Nothing is ever at hand."""
        return False

    def relax(self, sequence: SequenceState) -> None:
        """Nothing is kept."""


class NoPrefixes:
    """A cache that never hits."""

    def find(self, sequence: SequenceState) -> Found | None:
        """Nothing."""
        return None

    def release(self, prefix: Found) -> None:
        """Nothing was found."""

    def num_known(self, sequence: SequenceState, stop: int) -> int:
        """No token is worth keeping."""
        return stop


class Scheduler:
    """Owns every SequenceState from `add` to `remove`."""

    def __init__(
        self,
        budget: Budget,
        prefixes: Prefixes | None = None,
        features: Features | None = None,
        adapters: Adapters | None = None,
        pace: Pace | None = None,
        shares: Shares | None = None,
    ) -> None:
        """`pace`: what a step's prompts may cost decoding rows; None: nobody minds. `shares`: None: all are one."""
        self.budget = budget
        self.waiting: list[SequenceState] = []  # in order of arrival
        self.prefilling: list[SequenceState] = []  # in order of arrival
        self.decoding: list[SequenceState] = []  # the order of the last plan's chunks, then who came since
        self.ending: list[SequenceState] = []  # without a row; the step in flight draws their last token
        self.num_preempted = 0
        self._prefixes = prefixes or NoPrefixes()
        self._features = features or NoFeatures()
        self._adapters = adapters or NoAdapters()
        self._pace = pace
        self._shares = shares if shares is not None and shares.is_used else None
        self._num_overtaken = 0  # times in a row that the oldest was passed for an earlier priority
        self._absent: set[SequenceState] = set()  # waiting; their adapters were not there when last asked for
        self._failed: list[tuple[SequenceState, LatheError]] = []  # in no other list; nobody has been told
        self._max_bytes = budget.max_bytes
        self._capacities: dict[Bucket, int] = {}
        self._departures: list[Capture] = []  # copies of rows that are free since the last plan
        self._num_prefilled: Counter[str] = Counter()  # tokens by group, while it has any sequence
        self._num_arrived = 0
        self._num_plans = 0
        self._composition = 0
        self._last_plan: Plan | None = None
        self._last_singles: list[object] = []
        self._num_repeats_left = 0  # steps for which nobody reaches the end of its row or answer
        self._may_admit = False  # somebody came or went since the queue was last looked at
        self._is_moved = False  # some sequence joined, left or began to decode since rows were last placed
        self._is_drafted = False  # the last plan guesses tokens: where its rows are now, it does not say
        self._is_guessing = False  # so does the one that is being made

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.waiting or self.prefilling or self.decoding)

    @property
    def is_asleep(self) -> bool:
        """Nobody runs, and whoever waits, waits for an adapter: nothing changes until `wake`."""
        return not (self.prefilling or self.decoding or self._departures or self._may_admit)

    @property
    def running(self) -> list[SequenceState]:
        """Every sequence that has a row."""
        return [*self.decoding, *self.prefilling]

    @property
    def max_bytes(self) -> int:
        """What rows may take now: at most the budget's, less while others need it. A row alone is never too large."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        self._may_admit |= value > self._max_bytes
        self._max_bytes = value

    def add(self, sequence: SequenceState) -> None:
        """Queue a sequence that one row can hold."""
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self.waiting.append(sequence)
        self._may_admit = True
        if self._shares is not None:
            self._shares.enter(sequence)

    def wake(self) -> None:
        """An adapter has come, or cannot, or a slot is free: whoever waits for one asks again."""
        if self._absent:
            self._absent.clear()
            self._may_admit = True

    def take_failed(self) -> list[tuple[SequenceState, LatheError]]:
        """Who is out because its adapter cannot come, and why. Told once."""
        failed, self._failed = self._failed, []
        return failed

    def schedule(self, drafts: Mapping[SequenceState, Sequence[int]] = NO_DRAFTS) -> Plan:
        """The next step. Admits what fits, gives every running sequence its row, and says which rows move.

        drafts  guesses of what follows, of decoding sequences whose tokens are all known; cut where a row ends
        """
        self._num_plans += 1
        if drafts and self.budget.is_recurrent and not self._may_guess(drafts):
            drafts = NO_DRAFTS
        self._is_guessing = bool(drafts)
        plan = (None if drafts else self._same_again()) or self._new_plan(drafts)
        for chunk in plan.chunks:
            chunk.sequence.num_planned_tokens = chunk.stop
            chunk.sequence.num_in_flight += 1
        self._last_plan = plan
        if self._shares is not None:
            self._shares.charge((chunk.sequence, chunk.num_tokens) for chunk in plan.chunks)
        return plan

    def _same_again(self) -> Plan | None:
        """The last plan a token later, where nothing else has changed: most steps. None where it would not do."""
        last = self._last_plan
        if last is None or self.prefilling or self._is_moved or self._may_admit or self._num_repeats_left < 1:
            return None
        if self._is_drafted:
            return None
        if last.num_bytes > self._max_bytes and len(self.decoding) > 1:
            return None
        self._num_repeats_left -= 1
        return Plan(
            capacities=last.capacities,
            chunks=tuple([Chunk(one, stop, stop + 1, False, True) for one, _, stop, *_ in last.chunks]),
            num_single=last.num_single,
            composition=last.composition,
            num_state_rows=last.num_state_rows,
            num_bytes=last.num_bytes,
        )

    def _may_guess(self, drafts: Mapping[SequenceState, Sequence[int]]) -> bool:
        """Whether rows of state may be padded: what a row then runs again must stay in one precision."""
        width = max((1 + one.num_behind + len(drafts.get(one, ())) for one in self.decoding), default=1)
        return all(
            not one.num_planned_tokens < one.quantize_after < one.num_planned_tokens + width
            for one in self.decoding
        )

    def _new_plan(self, drafts: Mapping[SequenceState, Sequence[int]]) -> Plan:
        self._retire_spent()
        self._preempt_for_memory()
        self._admit()
        while True:
            restores, prefill, encodes = self._prefill_chunks()
            arrangement = self._arranged(prefill)
            if arrangement.num_bytes <= self._max_bytes or len(arrangement.places) < 2:
                break
            self._release(restores)
            self._preempt([max(self.running, key=_by_priority)])
        return self._take_effect(restores, prefill, encodes, arrangement, drafts)

    def _take_effect(
        self,
        restores: list[Restore],
        prefill: list[Chunk],
        encodes: Encodes,
        arrangement: Arrangement[SequenceState],
        drafts: Mapping[SequenceState, Sequence[int]],
    ) -> Plan:
        is_changed = arrangement.capacities != self._capacities or bool(arrangement.moves)
        self._capacities = dict(arrangement.capacities)
        for state_row, (sequence, place) in enumerate(arrangement.places.items()):
            sequence.place, sequence.state_row = place, state_row
        of = {chunk.sequence: chunk for chunk in prefill}
        order = list(arrangement.places)
        chunks = [
            of.get(sequence) or _decode(sequence, drafts.get(sequence, ()))
            for sequence in order[: arrangement.num_single]
        ]
        width = max((chunk.num_tokens for chunk in chunks), default=1)
        self._is_drafted = width > 1
        is_drafted = any(chunk.draft for chunk in chunks)
        chunks += [of[sequence] for sequence in order[arrangement.num_single :] if sequence in of]
        for chunk in prefill:
            if chunk.sequence.num_restored_tokens is None:
                chunk.sequence.num_restored_tokens = chunk.start
        captures = tuple(capture for chunk in prefill for capture in self._capture_of(chunk))
        for chunk in prefill:
            self._num_prefilled[chunk.sequence.group] += chunk.num_tokens
            if chunk.draws:
                self.prefilling.remove(chunk.sequence)
        for encode in encodes.planned:
            self._num_prefilled[encode.sequence.group] += encode.media.num_patches
        self.decoding = [chunk.sequence for chunk in chunks if chunk.draws]
        self._num_repeats_left = min(map(_repeats_left, chunks), default=0)
        # Who runs two tokens or more stands behind those that run one, and begins to decode with the next plan.
        self._is_moved = any(chunk.draws for chunk in chunks[arrangement.num_single :])
        self._may_admit |= is_changed
        departures, self._departures = tuple(self._departures), []
        return Plan(
            departures=departures,
            encodes=tuple(encodes.planned),
            capacities=arrangement.capacities,
            moves=arrangement.moves,
            state_moves=arrangement.state_moves,
            restores=tuple(restores),
            chunks=tuple(chunks),
            num_single=arrangement.num_single,
            width=width,
            is_split=width > 1 and not is_drafted,
            captures=captures,
            composition=self._composition_of(chunks[: arrangement.num_single], len(order)),
            num_state_rows=len(order),
            num_bytes=arrangement.num_bytes,
            num_prefilled=sum(chunk.num_tokens for chunk in prefill),
        )

    def commit(self, plan: Plan, drawn: Iterable[Drawn]) -> None:
        """The plan has run: its tokens are in the rows, and those drawn are the sequences'."""
        for sequence, _, stop, *_ in plan.chunks:
            sequence.num_in_flight -= 1
            if sequence.place is not None:
                sequence.num_cached_tokens = stop
        starts = {chunk.sequence: chunk.start for chunk in plan.chunks} if plan.is_guessing else {}
        for capture in plan.captures:
            if capture.sequence.num_captured_tokens == capture.stop:
                capture.sequence.num_captured_tokens = 0
        for one in drawn:
            sequence = one.sequence
            sequence.generated += one.token_ids
            if sequence.place is None:
                continue
            if one.is_back:
                sequence.num_planned_tokens = sequence.num_cached_tokens = starts[sequence]
            elif one.num_drafted:  # the guesses from the first wrong one on are no more
                sequence.num_planned_tokens = sequence.num_cached_tokens = sequence.num_tokens - 1

    def remove(self, sequences: Collection[SequenceState], *, is_sound: bool = True) -> None:
        """Take sequences out, wherever they are; their rows are free, and captured first if they are sound."""
        gone = set(sequences)
        if not gone:
            return
        self.waiting = [sequence for sequence in self.waiting if sequence not in gone]
        self._absent -= gone
        self.ending = [sequence for sequence in self.ending if sequence not in gone]
        self._free(gone, is_sound)
        if self._shares is not None:
            for sequence in gone:
                if not sequence.is_gone:
                    self._shares.leave(sequence)
        for sequence in gone:
            sequence.is_gone = True
        groups = {sequence.group for sequence in (*self.waiting, *self.running)}
        for sequence in gone:
            if sequence.group not in groups:
                self._num_prefilled.pop(sequence.group, None)

    def take_departures(self) -> tuple[Capture, ...]:
        """Captures that wait for the next plan, where there may be none."""
        departures, self._departures = tuple(self._departures), []
        return departures

    def abandon(self) -> list[SequenceState]:
        """A step has failed: whoever had a row, or was to have a token of it, is out. The queue is as before."""
        lost = [*self.running, *self.ending]
        self.remove(lost, is_sound=False)
        self._departures.clear()
        for sequence in self.waiting:
            sequence.num_in_flight = sequence.num_captured_tokens = 0
        return lost

    def check_integrity(self) -> None:
        """What holds between two steps: every sequence is in one list, rows are compact, lengths and memory agree."""
        running = self.running
        everyone = [*running, *self.waiting, *self.ending]
        assert len(set(everyone)) == len(everyone), "a sequence is in two lists"
        assert len(running) <= self.budget.max_rows, "more rows than allowed"
        assert self.waiting == sorted(self.waiting, key=_by_arrival), "the queue is out of order"
        assert self.prefilling == sorted(self.prefilling, key=_by_arrival), "prompts are out of order"
        places = [sequence.place for sequence in running if sequence.place is not None]
        assert len(set(places)) == len(places), "two sequences share a row"
        assert all(place.row < self._capacities[place.bucket] for place in places), (
            "a row is outside its buffer"
        )
        assert self._absent <= set(self.waiting), "who does not wait, waits for an adapter"
        assert all(sequence.has_slot for sequence in running), "a row without a slot"
        for sequence in (*self.waiting, *self.ending):
            assert sequence.place is None, "a sequence that does not run keeps a row"
            assert not sequence.has_slot, "a sequence that does not run keeps a slot"
        for sequence in self.waiting:
            assert sequence.num_planned_tokens == 0, "a waiting sequence holds positions"
        for sequence in self.prefilling:
            assert sequence.num_planned_tokens < sequence.num_tokens, "nothing is left to prefill"
        for sequence in self.decoding:
            wanted = sequence.num_tokens - 1 + sequence.num_in_flight
            is_back = self.budget.is_recurrent and not sequence.num_in_flight
            assert sequence.num_planned_tokens == wanted - is_back * sequence.num_behind, (
                "a decoding row misses a token"
            )
        for sequence in running:
            assert sequence.num_cached_tokens <= sequence.num_planned_tokens, (
                "more is written than was planned"
            )
            if sequence.place is not None:
                held = sequence.place.bucket.num_positions
                assert sequence.num_planned_tokens <= held, "a sequence has outgrown its row"
        if self._last_plan is not None and len(running) > 1:
            assert self._last_plan.num_bytes <= self._max_bytes, "the rows are larger than their budget"
        assert set(self._num_prefilled) <= {sequence.group for sequence in everyone}, (
            "a group outlived its end"
        )

    # Memory

    def _bucket(self, sequence: SequenceState, num_held: int, length: int) -> Bucket:
        """Where a row of `num_held` positions stands that runs another token, and that is to become `length` long."""
        precision = sequence.precision_at(num_held + 1)
        if precision is not sequence.final_precision:
            length = min(length, sequence.quantize_after)
        return Bucket(precision, positions_capacity(length))

    def _present(self, sequence: SequenceState) -> Bucket:
        held = sequence.num_planned_tokens
        return self._bucket(sequence, held, max(sequence.num_tokens, held + 1))

    def _claim(self, sequence: SequenceState) -> Bucket:
        length = min(sequence.num_tokens + ANSWER_HEADROOM_TOKENS, sequence.max_total_tokens)
        return self._bucket(sequence, length - 1, length)

    def _fits(self, sequences: Sequence[SequenceState]) -> bool:
        if len(sequences) > self.budget.max_rows:
            return False
        if len(sequences) == 1:
            return True
        # Claims may lie in more buckets than rows do, and so be rounded less.
        return all(
            least_bytes(map(bucket, sequences), self.budget.row_cost) <= self._max_bytes
            for bucket in (self._claim, self._present)
        )

    def _arranged(self, prefill: Sequence[Chunk]) -> Arrangement[SequenceState]:
        """Rows for everybody who runs."""
        of = {chunk.sequence: chunk for chunk in prefill}
        tenants = [
            Tenant(s, self._present(s), True, s.num_planned_tokens, s.place, s.state_row)
            for s in self.decoding
        ]
        for s in self.prefilling:
            chunk = of.get(s)
            bucket = self._bucket(s, chunk.start, s.num_tokens) if chunk else self._present(s)
            is_single = chunk is not None and self._is_single(chunk)
            tenants.append(Tenant(s, bucket, is_single, s.num_planned_tokens, s.place, s.state_row))
        return arrange(tenants, self._capacities, self._max_bytes, self.budget.row_cost)

    # Admission

    def _admit(self) -> None:
        # Claims only grow while nobody comes, goes or changes buckets: what does not fit now waits until then.
        self._may_admit = False
        while self._admit_one():
            pass

    def _admit_one(self) -> bool:
        """A row for whose turn it is, of those whose adapters are there; False where there is none."""
        fitting: dict[tuple[Bucket, Bucket], bool] = {}  # beside those that run now
        for first in self._in_turn([one for one in self.waiting if one not in self._absent]):
            if first.num_in_flight:  # preempted a moment ago: its next token is not known yet
                self._may_admit = True
                return False
            shape = self._claim(first), self._present(first)
            if shape not in fitting:
                fitting[shape] = self._fits([*self.running, first])
            victims = [] if fitting[shape] else self._victims_for(first)
            if victims is None:
                return False
            if self._holds(first):
                oldest = next(one for one in self.waiting if one not in self._absent)
                self._preempt(victims)
                is_overtaking = first.request.priority < oldest.request.priority
                self._num_overtaken = self._num_overtaken + 1 if is_overtaking else 0
                self.waiting.remove(first)
                insort(self.prefilling, first, key=_by_arrival)
                self._is_moved = True
                return True
        return False

    def _in_turn(self, candidates: Sequence[SequenceState]) -> Sequence[SequenceState]:
        """Whose turn it is, and whose it is after that. `candidates` are in order of arrival."""
        if self._num_overtaken >= MAX_OVERTAKEN:
            return candidates
        held = Counter(sequence.group for sequence in self.running)
        shares = self._shares

        def turn(one: SequenceState) -> tuple[object, ...]:
            charged = shares.turn(one) if shares is not None else ()
            return one.request.priority, charged, held[one.group], one.arrival

        return sorted(candidates, key=turn)

    def _holds(self, first: SequenceState) -> bool:
        """Whether its adapter has a slot, which it then has too. Otherwise it is out of the way of others."""
        try:
            first.has_slot = self._adapters.hold(first)
        except LatheError as error:
            self._failed.append((first, error))
            self.remove([first])
            return False
        if not first.has_slot:
            self._absent.add(first)
        return first.has_slot

    def _victims_for(self, first: SequenceState) -> list[SequenceState] | None:
        """Rows to take back so that `first` fits, most often none; None where it does not fit even so."""
        running = self.running
        # Nobody gives a row back to a later priority.
        held = Counter(one.group for one in running if one.request.priority >= first.request.priority)
        wanted = sum(one.group == first.group for one in running)
        victims: list[SequenceState] = []
        while not self._fits([*running, first]):
            group, most = max(held.items(), key=lambda item: item[1], default=("", 0))
            if most < wanted + 2:
                return None
            victim = max((sequence for sequence in running if sequence.group == group), key=_by_arrival)
            victims.append(victim)
            running.remove(victim)
            held[group] -= 1
        return victims

    def _preempt_for_memory(self) -> None:
        """Take the youngest of the latest priority back until the others' next tokens fit."""
        while len(running := self.running) > 1:
            if least_bytes(map(self._present, running), self.budget.row_cost) <= self._max_bytes:
                return
            self._preempt([max(running, key=_by_priority)])

    def _preempt(self, sequences: Collection[SequenceState]) -> None:
        self._free(set(sequences), is_sound=True)
        for sequence in sequences:
            self._features.relax(sequence)
            self.num_preempted += 1
            sequence.num_cached_tokens = sequence.num_planned_tokens = 0
            insort(self.waiting, sequence, key=_by_arrival)

    def _retire_spent(self) -> None:
        """Rows whose last token is in flight are free: it is never written."""
        spent = [sequence for sequence in self.decoding if sequence.is_spent]
        if spent:
            self._free(set(spent), is_sound=True)
            self.ending += spent

    def _free(self, gone: Collection[SequenceState], is_sound: bool) -> None:
        if not gone:
            return
        for sequence in gone:
            if is_sound and sequence.place is not None:
                self._departures += self._departure(sequence)
            sequence.place, sequence.state_row = None, -1
            if sequence.has_slot:
                sequence.has_slot = False
                self._adapters.let_go(sequence)
                self._absent.clear()
        self.prefilling = [sequence for sequence in self.prefilling if sequence not in gone]
        self.decoding = [sequence for sequence in self.decoding if sequence not in gone]
        if not self.running:
            self._capacities = {}
        self._may_admit = self._is_moved = True

    # Prefixes

    def _capture_of(self, chunk: Chunk) -> list[Capture]:
        """What a chunk of a prompt adds to the prefix cache, if that has all that comes before."""
        sequence = chunk.sequence
        known = self._prefixes.num_known(sequence, chunk.stop)
        if (
            sequence.num_captured_tokens == chunk.start
        ):  # the chunk before is in flight, and so is its capture
            known = max(known, chunk.start)
        if not chunk.start <= known < chunk.stop:
            return []
        assert sequence.place is not None
        sequence.num_captured_tokens = chunk.stop
        return [Capture(sequence, sequence.place, sequence.state_row, known, chunk.stop)]

    def _departure(self, sequence: SequenceState) -> list[Capture]:
        """What a row that is given up holds and the prefix cache does not."""
        stop = sequence.num_planned_tokens
        known = self._prefixes.num_known(sequence, stop) if stop else 0
        if known >= stop:
            return []
        assert sequence.place is not None
        return [Capture(sequence, sequence.place, sequence.state_row, known, stop)]

    def _release(self, restores: Iterable[Restore]) -> None:
        for restore in restores:
            self._prefixes.release(restore.prefix)

    # Prefill

    def _prefill_chunks(self) -> tuple[list[Restore], list[Chunk], Encodes]:
        """Chunks of this step, the prefixes before them, and what is encoded for those to come.

        Rows are padded to the longest, and padding counts. A prefix is looked for when its row's turn has come, so
        that it may be what a neighbour has just computed. A row whose next token is a picture's that is not encoded
        waits, and lets others pass.
        In one step all chunks of recurrent rows have one length, and either all of them begin a sequence or none
        does: nothing may be padded there, and a row that begins has no state yet.
        """
        order = self.prefilling
        if self._num_plans % 2:
            order = sorted(order, key=lambda sequence: self._num_prefilled[sequence.group])
        elif self._num_plans % 4:
            order = sorted(order, key=_by_priority)
        restores: list[Restore] = []
        chunks: list[Chunk] = []
        padded = Padded(self._max_prefill())  # those of the second forward
        encodes = Encodes(self.budget.encode_patches)
        num_skipped = 0
        for sequence in order:
            if padded.is_full or num_skipped > MAX_SKIPPED:
                break
            is_first = sequence.num_planned_tokens == 0 and not sequence.is_scoring
            prefix = self._prefixes.find(sequence) if is_first else None
            start = prefix.num_tokens if prefix else sequence.num_planned_tokens
            reach = self._reach(sequence, start, padded.max_tokens)
            stop = self._sighted(sequence, start, reach, encodes)
            chunk = self._next_chunk(sequence, start, stop, padded) if stop > start else None
            if chunk is None:
                if prefix is not None:
                    self._prefixes.release(prefix)
                num_skipped += stop > start
                continue
            if prefix is not None:
                restores.append(Restore(sequence, prefix))
            chunks.append(chunk)
            if not self._is_single(chunk):
                padded.chunks.append(chunk)
        return restores, chunks, encodes

    def _max_prefill(self) -> int:
        """Tokens of prompts that this step may hold, padding included."""
        hard = self.budget.prefill_chunk_tokens
        return min(hard, self._pace.max_tokens) if self._pace is not None and self.decoding else hard

    def _reach(self, sequence: SequenceState, start: int, max_tokens: int) -> int:
        """Where the chunk that begins at `start` ends, if it is alone in its step and all pictures are encoded."""
        most = min(max_tokens, self.budget.row_chunk_tokens or max_tokens)
        most = min(most, max(MAX_SCORES // sequence.num_tokens, LEAST_CHUNK))
        stop = min(sequence.num_tokens, start + most)
        for end in (sequence.quantize_after, sequence.num_shared_tokens):
            if start < end:
                stop = min(stop, end)
        prompt = sequence.request.prompt
        stop = prompt.whole(stop)
        return stop if stop > start else prompt.block_stop(start)

    def _sighted(self, sequence: SequenceState, start: int, stop: int, encodes: Encodes) -> int:
        """Before which of tokens [start, stop) features are missing. They are asked for; `stop` if none are."""
        if start >= sequence.num_sighted_tokens:
            return stop
        prompt, end = sequence.request.prompt, stop
        for number, media in enumerate(prompt.media):
            first = media.first_in(start, stop)
            if first is None or number in sequence.held or self._features.hold(sequence, number):
                continue
            encodes.ask(sequence, number)
            end = min(end, first)
        return prompt.whole(end)

    def _next_chunk(self, sequence: SequenceState, start: int, stop: int, padded: Padded) -> Chunk | None:
        """The chunk, or as much of it as can be beside the others; None where nothing can."""
        chunk = _chunk(sequence, start, stop - start)
        if not padded.chunks or self._is_single(chunk):
            return chunk
        if self.budget.is_recurrent:
            first = padded.chunks[0]
            width = first.num_tokens
            is_cut = sequence.request.prompt.whole(start + width) < start + width
            if chunk.num_tokens < width or chunk.begins != first.begins or is_cut:
                return None
            chunk = _chunk(sequence, start, width)
        return chunk if padded.takes(chunk) else None

    def _is_single(self, chunk: Chunk) -> bool:
        """Whether it runs beside decoding rows. A recurrent row that begins may not, for it has no state yet; nor may
        one go on where those guess, for it would be padded, and never come on."""
        return chunk.num_tokens == 1 and not (
            (chunk.begins or self._is_guessing) and self.budget.is_recurrent
        )

    def _composition_of(self, singles: Sequence[Chunk], num_rows: int) -> int:
        now: list[object] = [(one.sequence, one.sequence.place) for one in singles]
        if self.budget.is_recurrent:
            now.append(num_rows)
        if now != self._last_singles:
            self._last_singles = now
            self._composition += 1
        return self._composition


class Padded:
    """The chunks of one forward, padded to the longest of them."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.chunks: list[Chunk] = []

    @property
    def width(self) -> int:
        """Of the forward as it is."""
        return max((chunk.num_tokens for chunk in self.chunks), default=0)

    @property
    def is_full(self) -> bool:
        """No further chunk has room, however short."""
        return self.width * (len(self.chunks) + 1) > self.max_tokens

    def takes(self, chunk: Chunk) -> bool:
        """Whether one more has room, and would not cost more here than in a step of its own."""
        before, width = self.width, max(self.width, chunk.num_tokens)
        num_tokens = width * (len(self.chunks) + 1)
        longest = max(chunk.stop, *(one.stop for one in self.chunks))
        is_dear = num_tokens - before * len(self.chunks) > 2 * chunk.num_tokens + ALONE_TOKENS
        return num_tokens <= min(self.max_tokens, max(MAX_SCORES // longest, LEAST_CHUNK)) and not is_dear


class Encodes:
    """What one step encodes: as much as the budget of patches has room for, or one picture of any size."""

    def __init__(self, max_patches: int) -> None:
        self.planned: list[Encode] = []
        self._num_patches_left = max_patches
        self._keys: set[FeatureKey] = set()

    def ask(self, sequence: SequenceState, number: int) -> None:
        """Plan it, if there is room for it, and nobody else has asked for the same."""
        key, num_patches = sequence.feature_key(number), sequence.request.prompt.media[number].num_patches
        if key in self._keys or (self.planned and num_patches > self._num_patches_left):
            return
        self._keys.add(key)
        self._num_patches_left -= num_patches
        self.planned.append(Encode(sequence, number))


def _decode(sequence: SequenceState, draft: Sequence[int]) -> Chunk:
    start = sequence.num_planned_tokens
    known = start + 1 + sequence.num_behind
    if not draft:
        return Chunk(sequence, start, known, begins=False, draws=True)
    assert known == sequence.num_tokens, "a guess of what follows nobody knows what"
    assert sequence.place is not None
    stop = min(known + len(draft), sequence.place.bucket.num_positions, sequence.max_total_tokens - 1)
    if start < sequence.quantize_after:
        stop = min(stop, sequence.quantize_after)
    return Chunk(sequence, start, stop, begins=False, draws=True, draft=tuple(draft[: stop - known]))


def _repeats_left(chunk: Chunk) -> int:
    """Steps of one token after this chunk's in which its row is not outgrown, and the answer not at its length."""
    sequence, stop = chunk.sequence, chunk.stop
    assert sequence.place is not None
    end = sequence.place.bucket.num_positions
    if stop <= sequence.quantize_after:
        end = min(end, sequence.quantize_after)
    return min(end, sequence.max_total_tokens - 1) - stop


def _chunk(sequence: SequenceState, start: int, num_tokens: int) -> Chunk:
    stop = start + num_tokens
    return Chunk(sequence, start, stop, begins=start == 0, draws=stop == sequence.num_tokens)
