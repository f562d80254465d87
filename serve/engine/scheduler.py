"""Who runs next: requests in, a Plan out, finished sequences taken away. Holds no arrays and imports no mlx.

Rows are shared out between groups (the rows of one HTTP request are one group): the next to be admitted is the
oldest of the group that holds fewest rows, and where there is no room for it, a group that holds at least two rows
more gives its youngest back. Nobody else overtakes it, so nobody starves.
A row claims memory for what it holds and ANSWER_HEADROOM_TOKENS more. When rows outgrow the budget, the youngest is
preempted: it goes back into the queue, keeps its arrival, and computes prompt and answer so far anew.
Prompts are computed in chunks of at most `prefill_chunk_tokens` a step, beside one decode token for every running
row. Steps take turns: one begins with the oldest prompt, the next with the group that has had least computed, so
short prompts pass long ones, and long ones have every second step.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter

from serve.cache.capacity import RowCost
from serve.engine.plan import Drawn, Plan, PrefillChunk, SequenceState

ANSWER_HEADROOM_TOKENS = 256
"""Positions beyond its present ones that a row claims: a row that asks for 32,000 tokens keeps nobody out."""

_by_arrival = attrgetter("arrival")


@dataclass(frozen=True)
class Budget:
    """The scheduler's bounds."""

    max_rows: int
    prefill_chunk_tokens: int
    max_bytes: int
    """Memory of all rows together, their buffers' rounding included."""
    row_cost: RowCost

    @property
    def is_recurrent(self) -> bool:
        """Rows keep a state that takes in every token of a forward, padding too."""
        return self.row_cost.state_bytes > 0

    @property
    def max_positions(self) -> int:
        """The longest that one row alone may become, 0 if none may be."""
        return self.row_cost.max_positions(self.max_bytes)


class Scheduler:
    """Owns every SequenceState from `add` to `remove`."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.waiting: list[SequenceState] = []  # in order of arrival
        self.prefilling: list[SequenceState] = []  # in order of arrival; rows [num_decoding, num_rows)
        self.decoding: list[SequenceState] = []  # in row order; rows [0, num_decoding)
        self.num_preempted = 0
        self._rows_at_last_plan: dict[SequenceState, int] = {}
        self._num_prefilled: Counter[str] = Counter()  # tokens by group, while it has any sequence
        self._num_arrived = 0
        self._num_plans = 0
        self._composition = 0
        self._last_plan: Plan | None = None
        self._may_admit = False  # somebody came or went since the queue was last looked at
        self._is_moved = False  # some sequence joined, left or began to decode since rows were last placed

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.waiting or self.prefilling or self.decoding)

    @property
    def running(self) -> list[SequenceState]:
        """Every sequence that has a row."""
        return [*self.decoding, *self.prefilling]

    def add(self, sequence: SequenceState) -> None:
        """Queue a sequence that one row can hold: at most `budget.max_positions` in all."""
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self.waiting.append(sequence)
        self._may_admit = True

    def schedule(self) -> Plan:
        """The next step. Admits what fits, gives every running sequence its row, and says which rows move."""
        self._num_plans += 1
        self._last_plan = self._same_again() or self._new_plan()
        return self._last_plan

    def _same_again(self) -> Plan | None:
        """The last plan a token later, where nothing else has changed: most steps. None where it would not do."""
        last = self._last_plan
        if last is None or last.prefill or last.moves or self.prefilling or self._is_moved or self._may_admit:
            return None
        num_positions = last.num_positions + 1
        if self.budget.row_cost.batch_bytes(last.num_rows, num_positions) > self.budget.max_bytes:
            return None
        return replace(last, num_positions=num_positions)

    def _new_plan(self) -> Plan:
        self._preempt_for_memory()
        self._admit()
        chunks = self._prefill_chunks()
        moves = self._place_rows()
        in_use = {*self.decoding, *(chunk.sequence for chunk in chunks)}
        in_use |= {sequence for sequence in self.prefilling if sequence.num_cached_tokens}
        lengths = [sequence.num_cached_tokens + 1 for sequence in in_use]
        lengths += [chunk.stop for chunk in chunks]
        return Plan(
            moves=moves,
            prefill=tuple(chunks),
            decode=tuple(self.decoding),
            composition=self._composition,
            num_rows=max((sequence.row + 1 for sequence in in_use), default=0),
            num_positions=max(lengths, default=0),
        )

    def commit(self, plan: Plan, drawn: Iterable[Drawn]) -> None:
        """The plan has run: its tokens are in the cache, and sequences that are all computed decode from now on."""
        for sequence in plan.decode:
            sequence.num_cached_tokens += 1
        for chunk in plan.prefill:
            sequence = chunk.sequence
            sequence.num_cached_tokens = chunk.stop
            self._num_prefilled[sequence.group] += chunk.stop - chunk.start
            if chunk.is_last:
                self.prefilling.remove(sequence)
                self.decoding.append(sequence)
                self._composition += 1
                self._is_moved = True
        for one in drawn:
            one.sequence.generated += one.token_ids

    def remove(self, sequences: Collection[SequenceState]) -> None:
        """Take sequences out, wherever they are; their rows are free."""
        gone = set(sequences)
        if not gone:
            return
        self.waiting = [sequence for sequence in self.waiting if sequence not in gone]
        self._take_rows(gone)
        self._may_admit = True
        groups = {sequence.group for sequence in (*self.waiting, *self.running)}
        for sequence in gone:
            if sequence.group not in groups:
                self._num_prefilled.pop(sequence.group, None)

    def check_integrity(self) -> None:
        """What holds between two steps: every sequence is in one list, rows are compact, lengths and memory agree."""
        running = self.running
        everyone = [*running, *self.waiting]
        assert len(set(everyone)) == len(everyone), "a sequence is in two lists"
        assert len(running) <= self.budget.max_rows, "more rows than allowed"
        assert self.waiting == sorted(self.waiting, key=_by_arrival), "the queue is out of order"
        assert self.prefilling == sorted(self.prefilling, key=_by_arrival), "prompts are out of order"
        rows = self._rows_at_last_plan
        assert set(rows) <= set(running), "a sequence that does not run keeps a row"
        assert len(set(rows.values())) == len(rows), "two sequences share a row"
        assert all(sequence.row == row for sequence, row in rows.items()), "a sequence does not know its row"
        for sequence in self.waiting:
            assert sequence.num_cached_tokens == 0, "a waiting sequence holds positions"
        for sequence in self.prefilling:
            assert sequence.num_cached_tokens < sequence.num_tokens, "nothing is left to prefill"
        for sequence in self.decoding:
            assert sequence.num_cached_tokens == sequence.num_tokens - 1, "a decoding row misses a token"
        if len(running) > 1:
            longest = max(sequence.num_cached_tokens for sequence in running)
            held = self.budget.row_cost.batch_bytes(len(running), longest)
            assert held <= self.budget.max_bytes, "the rows are larger than their budget"
        assert set(self._num_prefilled) <= {sequence.group for sequence in everyone}, (
            "a group outlived its end"
        )

    # Admission

    def _admit(self) -> None:
        self._may_admit = (
            False  # claims only grow, so what does not fit now waits until somebody comes or goes
        )
        while self.waiting:
            held = Counter(sequence.group for sequence in self.running)
            first = min(self.waiting, key=lambda sequence: (held[sequence.group], sequence.arrival))
            victims = self._victims_for(first, held)
            if victims is None:
                return
            self._preempt(victims)
            self.waiting.remove(first)
            insort(self.prefilling, first, key=_by_arrival)
            self._is_moved = True

    def _victims_for(self, first: SequenceState, held: Counter[str]) -> list[SequenceState] | None:
        """Rows to take back so that `first` fits, most often none; None where it does not fit even so."""
        running, held = self.running, held.copy()
        victims: list[SequenceState] = []
        while not self._fits([*running, first]):
            group, most = max(held.items(), key=lambda item: item[1], default=("", 0))
            if most < held[first.group] + 2:
                return None
            victim = max((sequence for sequence in running if sequence.group == group), key=_by_arrival)
            victims.append(victim)
            running.remove(victim)
            held[group] -= 1
        return victims

    def _fits(self, sequences: Sequence[SequenceState]) -> bool:
        if len(sequences) > self.budget.max_rows:
            return False
        if len(sequences) == 1:
            return True
        claims = [
            min(sequence.num_tokens + ANSWER_HEADROOM_TOKENS, sequence.max_total_tokens)
            for sequence in sequences
        ]
        return self.budget.row_cost.batch_bytes(len(sequences), max(claims)) <= self.budget.max_bytes

    def _preempt_for_memory(self) -> None:
        """Take the youngest back until the others' next tokens fit."""
        while len(running := self.running) > 1:
            longest = max(self._next_length(sequence) for sequence in running)
            if self.budget.row_cost.batch_bytes(len(running), longest) <= self.budget.max_bytes:
                return
            self._preempt([max(running, key=_by_arrival)])

    def _next_length(self, sequence: SequenceState) -> int:
        chunk = self.budget.prefill_chunk_tokens
        return min(
            sequence.num_cached_tokens + chunk, max(sequence.num_tokens, sequence.num_cached_tokens + 1)
        )

    def _preempt(self, sequences: Collection[SequenceState]) -> None:
        self._take_rows(set(sequences))
        for sequence in sequences:
            self.num_preempted += 1
            self._may_admit = True
            sequence.num_cached_tokens = 0
            insort(self.waiting, sequence, key=_by_arrival)

    def _take_rows(self, gone: Collection[SequenceState]) -> None:
        if not gone:
            return
        self.prefilling = [sequence for sequence in self.prefilling if sequence not in gone]
        self.decoding = [sequence for sequence in self.decoding if sequence not in gone]
        for sequence in gone:
            self._rows_at_last_plan.pop(sequence, None)
            sequence.row = -1
        self._composition += 1
        self._is_moved = True

    # Prefill

    def _prefill_chunks(self) -> list[PrefillChunk]:
        """Chunks of this step. Rows are padded to the longest, and padding counts.

        In one step all chunks of recurrent rows have one length, and either all of them begin a sequence or none
        does: nothing may be padded there, and a row that begins has no state yet.
        """
        order = self.prefilling
        if self._num_plans % 2:
            order = sorted(order, key=lambda sequence: self._num_prefilled[sequence.group])
        chunks: list[PrefillChunk] = []
        for sequence in order:
            if not self._add_chunk(chunks, sequence):
                break
        return chunks

    def _add_chunk(self, chunks: list[PrefillChunk], sequence: SequenceState) -> bool:
        start = sequence.num_cached_tokens
        wanted = min(sequence.num_tokens - start, self.budget.prefill_chunk_tokens)
        if chunks and self.budget.is_recurrent:
            first = chunks[0]
            if wanted < first.stop - first.start or (start == 0) != (first.start == 0):
                return False
            wanted = first.stop - first.start
        width = max(wanted, *(chunk.stop - chunk.start for chunk in chunks), 0)
        if chunks and width * (len(chunks) + 1) > self.budget.prefill_chunk_tokens:
            return False
        chunks.append(PrefillChunk(sequence, start, start + wanted))
        return True

    # Rows

    def _place_rows(self) -> tuple[tuple[int, int], ...]:
        """Compact rows with as few copies as can be: who already stands in the right part stays."""
        if not self._is_moved:
            return ()
        self._is_moved = False
        num_decoding = len(self.decoding)
        num_rows = num_decoding + len(self.prefilling)
        old = self._rows_at_last_plan
        new: dict[SequenceState, int] = {}
        for part, low, high in ((self.decoding, 0, num_decoding), (self.prefilling, num_decoding, num_rows)):
            stays = {sequence: old[sequence] for sequence in part if low <= old.get(sequence, -1) < high}
            free = iter(sorted(set(range(low, high)) - set(stays.values())))
            # What holds positions goes first, so that it never moves beyond the rows that there is memory for.
            for sequence in sorted(part, key=lambda sequence: sequence.num_cached_tokens == 0):
                new[sequence] = stays[sequence] if sequence in stays else next(free)
        # A sequence that holds nothing yet has nothing to copy.
        moves = tuple(
            (old[s], row) for s, row in new.items() if s in old and old[s] != row and s.num_cached_tokens
        )
        for sequence, row in new.items():
            sequence.row = row
        self.decoding.sort(key=lambda sequence: sequence.row)
        self._rows_at_last_plan = new
        return moves
