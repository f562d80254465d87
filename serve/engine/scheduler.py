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
from operator import attrgetter
from types import MappingProxyType

from serve.cache.capacity import Bucket, positions_capacity
from serve.engine.budget import Budget
from serve.engine.pace import Pace
from serve.engine.placement import Arrangement, Tenant, arrange, least_bytes
from serve.engine.plan import Capture, Chunk, Drawn, Plan, Restore, SequenceState
from serve.engine.prompt_chunks import Prefill, PromptChunks
from serve.engine.providers import Adapters, Features, NoAdapters, NoFeatures, NoPrefixes, Prefixes
from serve.engine.shares import Shares
from serve.errors import LatheError

ANSWER_HEADROOM_TOKENS = 256
"""Positions beyond its present ones that a row claims: a row that asks for 32,000 tokens keeps nobody out."""

MAX_OVERTAKEN = 32
"""So many are admitted before the one that has waited longest, for their priority is earlier; then it is its turn."""

NO_DRAFTS: Mapping[SequenceState, Sequence[int]] = MappingProxyType({})

_by_arrival = attrgetter("arrival")


def _by_priority(sequence: SequenceState) -> tuple[int, int]:
    """The largest is the first to give its row back."""
    return sequence.request.priority, sequence.arrival


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
        self._prompts = PromptChunks(budget, self._prefixes, self._features)
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
            prefill = self._prefill()
            arrangement = self._arranged(prefill.chunks)
            if arrangement.num_bytes <= self._max_bytes or len(arrangement.places) < 2:
                break
            self._release(prefill.restores)
            self._preempt([max(self.running, key=_by_priority)])
        return self._take_effect(prefill, arrangement, drafts)

    def _take_effect(
        self,
        prefill: Prefill,
        arrangement: Arrangement[SequenceState],
        drafts: Mapping[SequenceState, Sequence[int]],
    ) -> Plan:
        is_changed = arrangement.capacities != self._capacities or bool(arrangement.moves)
        self._capacities = dict(arrangement.capacities)
        for state_row, (sequence, place) in enumerate(arrangement.places.items()):
            sequence.place, sequence.state_row = place, state_row
        of = {chunk.sequence: chunk for chunk in prefill.chunks}
        order = list(arrangement.places)
        chunks = [
            of.get(sequence) or _decode(sequence, drafts.get(sequence, ()))
            for sequence in order[: arrangement.num_single]
        ]
        width = max((chunk.num_tokens for chunk in chunks), default=1)
        self._is_drafted = width > 1
        is_drafted = any(chunk.draft for chunk in chunks)
        chunks += [of[sequence] for sequence in order[arrangement.num_single :] if sequence in of]
        for chunk in prefill.chunks:
            if chunk.sequence.num_restored_tokens is None:
                chunk.sequence.num_restored_tokens = chunk.start
        captures = tuple(capture for chunk in prefill.chunks for capture in self._capture_of(chunk))
        for chunk in prefill.chunks:
            self._num_prefilled[chunk.sequence.group] += chunk.num_tokens
            if chunk.draws:
                self.prefilling.remove(chunk.sequence)
        for encode in prefill.encodes:
            self._num_prefilled[encode.sequence.group] += encode.media.num_patches
        self.decoding = [chunk.sequence for chunk in chunks if chunk.draws]
        self._num_repeats_left = min(map(_repeats_left, chunks), default=0)
        # Who runs two tokens or more stands behind those that run one, and begins to decode with the next plan.
        self._is_moved = any(chunk.draws for chunk in chunks[arrangement.num_single :])
        self._may_admit |= is_changed
        departures, self._departures = tuple(self._departures), []
        return Plan(
            departures=departures,
            encodes=tuple(prefill.encodes),
            capacities=arrangement.capacities,
            moves=arrangement.moves,
            state_moves=arrangement.state_moves,
            restores=tuple(prefill.restores),
            chunks=tuple(chunks),
            num_single=arrangement.num_single,
            width=width,
            is_split=width > 1 and not is_drafted,
            captures=captures,
            composition=self._composition_of(chunks[: arrangement.num_single], len(order)),
            num_state_rows=len(order),
            num_bytes=arrangement.num_bytes,
            num_prefilled=sum(chunk.num_tokens for chunk in prefill.chunks),
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
            is_single = chunk is not None and self._prompts.is_single(chunk, is_guessing=self._is_guessing)
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

    def _prefill(self) -> Prefill:
        """What this step computes of prompts, by whose turn it is."""
        order = self.prefilling
        if self._num_plans % 2:
            order = sorted(order, key=lambda sequence: self._num_prefilled[sequence.group])
        elif self._num_plans % 4:
            order = sorted(order, key=_by_priority)
        most = self.budget.prefill_chunk_tokens
        if self._pace is not None and self.decoding:
            most = min(most, self._pace.max_tokens)
        return self._prompts.make(order, most, is_guessing=self._is_guessing)

    def _composition_of(self, singles: Sequence[Chunk], num_rows: int) -> int:
        now: list[object] = [(one.sequence, one.sequence.place) for one in singles]
        if self.budget.is_recurrent:
            now.append(num_rows)
        if now != self._last_singles:
            self._last_singles = now
            self._composition += 1
        return self._composition


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
