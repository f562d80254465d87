"""Who runs next: requests in, a Plan out, finished sequences taken away. Holds no arrays and imports no mlx.

Requests wait in order of arrival. A waiting one is admitted when a row is free and the KV memory it may come to
need fits beside the others'; nobody overtakes the first in the queue, so nobody starves. Prompts are computed in
chunks of at most `prefill_chunk_tokens` a step, beside one decode token for every running row, so a long prompt
holds a running stream up for one chunk at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from serve.cache.capacity import RowCost
from serve.engine.plan import Plan, PrefillChunk, Sequence
from serve.errors import ContextLengthError, OverloadedError, RequestError


@dataclass(frozen=True)
class Budget:
    """The scheduler's bounds."""

    max_rows: int
    max_waiting: int
    prefill_chunk_tokens: int
    max_context: int
    max_bytes: int
    """Memory of all rows together, their buffers' rounding included."""
    row_cost: RowCost

    @property
    def is_recurrent(self) -> bool:
        """Rows keep a state that takes in every token of a forward, padding too."""
        return self.row_cost.state_bytes > 0


class Scheduler:
    """Owns every Sequence from `add` to `remove`."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []  # in order of arrival; rows [num_decoding, num_rows)
        self.decoding: list[Sequence] = []  # in row order; rows [0, num_decoding)
        self._rows_at_last_plan: dict[Sequence, int] = {}
        self._composition = 0
        self._is_moved = False  # some sequence joined, left or began to decode since rows were last placed

    @property
    def has_work(self) -> bool:
        """True while any sequence waits or runs."""
        return bool(self.waiting or self.prefilling or self.decoding)

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence there is, running ones first."""
        return [*self.decoding, *self.prefilling, *self.waiting]

    def check(self, sequence: Sequence) -> None:
        """Raise RequestError if the sequence could never run here, however long it waited."""
        budget = self.budget
        if sequence.num_prompt_tokens == 0:
            raise RequestError("the prompt is empty: there is nothing to continue", "prompt")
        if sequence.request.sampling.max_tokens < 1:
            raise RequestError(
                f"max_tokens is {sequence.request.sampling.max_tokens}, at least 1 was expected", "max_tokens"
            )
        if sequence.max_total_tokens > budget.max_context:
            raise ContextLengthError(
                f"this model's context is {budget.max_context} tokens; the prompt has "
                f"{sequence.num_prompt_tokens} and max_tokens asks for {sequence.request.sampling.max_tokens}",
                "max_tokens",
            )
        needed = budget.row_cost.batch_bytes(1, sequence.max_total_tokens)
        if needed > budget.max_bytes:
            raise ContextLengthError(
                f"this server has {budget.max_bytes} bytes for the keys, values and states of its rows; the "
                f"prompt has {sequence.num_prompt_tokens} tokens and max_tokens asks for "
                f"{sequence.request.sampling.max_tokens}, which take {needed}",
                "max_tokens",
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. RequestError if it can never run, OverloadedError if the queue is full."""
        self.check(sequence)
        num_sequences = len(self.decoding) + len(self.prefilling) + len(self.waiting)
        if num_sequences >= self.budget.max_rows + self.budget.max_waiting:
            raise OverloadedError(
                f"{num_sequences} requests are running or waiting, which is all there is room for"
            )
        self.waiting.append(sequence)

    def schedule(self) -> Plan:
        """The next step. Admits what fits, gives every running sequence its row, and says which rows move."""
        chunks = self._prefill_chunks()
        moves = self._place_rows()
        return Plan(
            moves=moves,
            prefill=tuple(chunks),
            decode=tuple(self.decoding),
            composition=self._composition,
            num_rows=len(self.decoding) + len(self.prefilling),
        )

    def commit(self, plan: Plan) -> None:
        """The plan has run: its tokens are in the cache; sequences whose prompt is complete decode from now on."""
        for sequence in plan.decode:
            sequence.num_cached_tokens += 1
        for chunk in plan.prefill:
            chunk.sequence.num_cached_tokens = chunk.stop
            if chunk.is_last:
                self.prefilling.remove(chunk.sequence)
                self.decoding.append(chunk.sequence)
                self._composition += 1
                self._is_moved = True

    def remove(self, sequences: Collection[Sequence]) -> None:
        """Take sequences out, wherever they are; their rows are free."""
        gone = set(sequences)
        if not gone:
            return
        self.waiting = deque(sequence for sequence in self.waiting if sequence not in gone)
        self.prefilling = [sequence for sequence in self.prefilling if sequence not in gone]
        self.decoding = [sequence for sequence in self.decoding if sequence not in gone]
        for sequence in gone:
            self._rows_at_last_plan.pop(sequence, None)
        self._composition += 1
        self._is_moved = True

    def check_integrity(self) -> None:
        """Running rows are exactly 0 … n-1, decoding ones first."""
        running = [*self.decoding, *self.prefilling]
        assert len(running) <= self.budget.max_rows, "more rows than allowed"
        assert len(set(running)) == len(running), "a sequence runs twice"
        rows = sorted(self._rows_at_last_plan.values())
        assert rows == sorted(set(rows)), "two sequences share a row"

    def _prefill_chunks(self) -> list[PrefillChunk]:
        """Chunks of this step, in order of arrival. Rows are padded to the longest, and padding counts.

        Recurrent rows are not padded: those that come along with the first take as many tokens as it does, and
        only where they too begin, or too go on, since a beginning row has no state yet.
        """
        chunks: list[PrefillChunk] = []
        for sequence in self.prefilling:
            if not self._add_chunk(chunks, sequence):
                return chunks
        while self.waiting and self._fits(self.waiting[0]) and self._add_chunk(chunks, self.waiting[0]):
            self.prefilling.append(self.waiting.popleft())
            self._is_moved = True
        return chunks

    def _add_chunk(self, chunks: list[PrefillChunk], sequence: Sequence) -> bool:
        start = sequence.num_cached_tokens
        wanted = min(sequence.num_prompt_tokens - start, self.budget.prefill_chunk_tokens)
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

    def _fits(self, sequence: Sequence) -> bool:
        running = [*self.decoding, *self.prefilling, sequence]
        if len(running) > self.budget.max_rows:
            return False
        longest = max(other.max_total_tokens for other in running)
        return self.budget.row_cost.batch_bytes(len(running), longest) <= self.budget.max_bytes

    def _place_rows(self) -> tuple[tuple[int, int], ...]:
        """Compact rows with as few copies as can be: who already stands in the right part stays."""
        if not self._is_moved:
            return ()
        self._is_moved = False
        num_decoding = len(self.decoding)
        num_rows = num_decoding + len(self.prefilling)
        old = self._rows_at_last_plan
        new: dict[Sequence, int] = {}
        for part, low, high in ((self.decoding, 0, num_decoding), (self.prefilling, num_decoding, num_rows)):
            stays = {sequence: old[sequence] for sequence in part if low <= old.get(sequence, -1) < high}
            free = iter(sorted(set(range(low, high)) - set(stays.values())))
            new.update({sequence: stays[sequence] if sequence in stays else next(free) for sequence in part})
        moves = tuple((old[s], row) for s, row in new.items() if s in old and old[s] != row)
        for sequence, row in new.items():
            sequence.row = row
        self.decoding.sort(key=lambda sequence: sequence.row)
        self._rows_at_last_plan = new
        return moves
