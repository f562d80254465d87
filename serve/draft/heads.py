"""Heads that guess from the target's states: EAGLE-3, a checkpoint's own (MTP). One forward a guess, all rows in it.

A row has tokens t_0 … t_m, the last of which has not run, and the target's states h_0 … h_{m−1}. What a head keeps of
the past is an entry for each pair (h_p, t_{p+1}), at position p of the row, beside the target's own layers: it moves,
grows, is kept as a prefix and given up with the row. So nobody keeps rows a second time.

    observe   with each forward of the target: its chunk's pairs, of which the first needs the state before the chunk
    propose   pair (h_{m−1}, t_m) → state s → guess g; then (s, g) → … The entries made of guesses are scratch: the
              chunk that checks the guesses writes true ones over them

Approximate are the entry across the end of a restored prefix, whose state nobody kept (zeros stand for it), and what
a prefix says of the pair at its end. Guesses may be worse by that; answers do not depend on guesses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from serve.adapters.bank.bank import Bank
from serve.cache.layers import LayerRows
from serve.cache.rows import BatchRows
from serve.cache.spans import Span
from serve.draft.places import Samplers, in_rows, place_of, span_of
from serve.engine.drafts import MAX_DRAFT, Wanted
from serve.engine.plan import Chunk, SequenceState
from serve.engine.sampler import Sampler
from serve.model.network import Network

MAX_CARRIED = 64
"""Of a longer chunk, only the last state is kept: a prompt's, in which nothing is guessed."""


class Head(Protocol):
    """One kind's own arithmetic."""

    fingerprint: str
    """Of kind and weights."""
    taps: Sequence[int]
    """Layers of the target whose outputs it reads, beside the last one's; known once bound."""

    def bind(self, network: Network, rows: BatchRows) -> Sequence[LayerRows]:
        """Its layers' rows; none where it reads the base's alone. ModelError where it is not of this target."""

    def read(self, hidden: mx.array, taken: Mapping[int, mx.array]) -> mx.array:
        """[B, T, D'] what it takes of the target's states: hidden [B, T, D], and [B, T, D] of each tap."""

    def run(self, tokens: mx.array, states: mx.array, span: Span) -> mx.array:
        """tokens [B, T] and states [B, T, D'] of pairs, which stand where the span says → [B, T, D']."""

    def guess(self, states: mx.array, sampler: Sampler, counters: Sequence[int]) -> mx.array:
        """[B] of states [B, D']."""


class _States(NamedTuple):
    """States of one sequence's tokens [start, stop): row `row` of an array [B, T, D']."""

    array: mx.array
    row: int
    start: int
    stop: int


class Heads:
    """A drafter (`serve.engine.drafts.Reader`) over one head."""

    def __init__(self, head: Head, max_tokens: int = MAX_DRAFT) -> None:
        """`max_tokens`: guesses of one step at most, of a row."""
        self._head = head
        self._max_tokens = max_tokens
        self._layers: Sequence[LayerRows] = ()
        self._known: WeakKeyDictionary[SequenceState, _States] = WeakKeyDictionary()
        self._samplers = Samplers()
        self._goes_back = False  # a row may run again what a step has run

    @property
    def max_bytes(self) -> int:
        """Its layers stand in the target's rows, and are counted there."""
        return 0

    num_bytes = max_bytes

    @property
    def taps(self) -> Sequence[int]:
        """Layers of the target whose outputs `observe` wants."""
        return self._head.taps

    def bind(self, network: Network, bank: Bank, rows: BatchRows) -> None:
        """To a target and its rows, once. ModelError where the head is not of this target."""
        self._layers = self._head.bind(network, rows)
        self._bank, self._placeholders = bank, network.placeholder_ids
        self._goes_back = rows.has_states
        if self._layers:
            rows.attach(self._layers, self._head.fingerprint)

    def observe(
        self, tokens: mx.array, hidden: mx.array, taken: Mapping[int, mx.array], chunks: Sequence[Chunk]
    ) -> list[mx.array]:
        """A forward of the target: tokens [B, T], its final states [B, T, D], those of the taps. What it builds is
        computed with the rows; returned is what else is to be."""
        states = self._head.read(hidden, taken)
        before = self._before(chunks, states) if self._layers else None  # [B, 1, D']
        if before is not None:
            self._write(tokens, before, states, chunks)
        return [self._kept(chunks, before, states)]

    def _write(self, tokens: mx.array, before: mx.array, states: mx.array, chunks: Sequence[Chunk]) -> None:
        """Entries of the pairs of chunks."""
        num_tokens, pairs = tokens.shape[1], before
        for placeholder in self._placeholders:
            tokens = mx.where(tokens == placeholder, 0, tokens)
        if num_tokens > 1:
            pairs = mx.concatenate([pairs, states[:, :-1]], axis=1)
        starts = [max(chunk.start - 1, 0) for chunk in chunks]
        first = [chunk.start == 0 for chunk in chunks]
        if any(first) and num_tokens > 1:  # its first token has no state before it, and no pair
            is_first = mx.array(first)[:, None]
            pairs = mx.where(is_first[..., None], states, pairs)
            tokens = mx.where(is_first, mx.concatenate([tokens[:, 1:], tokens[:, -1:]], axis=1), tokens)
        self._run([c.sequence for c in chunks], starts, [c.begins for c in chunks], tokens, pairs)

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """A chain of guesses for each, as long as is wanted and its row has room for scratch."""
        guesses: list[list[int]] = [[] for _ in wanted]
        order = [number for number in in_rows(wanted) if self._room(wanted[number])]
        counts = {n: min(wanted[n].most, self._max_tokens, self._room(wanted[n])) for n in order}
        if not order:
            return guesses
        sequences = [wanted[number].sequence for number in order]
        tokens = mx.array([[one.token(one.num_tokens - 1)] for one in sequences], dtype=mx.int32)
        states = self._gathered([self._at(one, one.num_tokens - 2) for one in sequences])
        drawn: list[tuple[list[int], mx.array]] = []
        for step in range(max(counts.values())):
            going = [index for index, number in enumerate(order) if counts[number] > step]
            if len(going) < len(order):
                at = mx.array(going)
                order = [order[index] for index in going]
                tokens, states = tokens[at], states[at]
            sequences = [wanted[number].sequence for number in order]
            self._bank.rows.set([one.slot for one in sequences])
            starts = [one.num_tokens - 2 + (step if self._layers else 0) for one in sequences]
            states = self._run(sequences, starts, [False] * len(order), tokens, states)
            counters = [len(one.generated) + step for one in sequences]
            found = self._head.guess(states[:, -1], self._samplers.of(sequences), counters)
            tokens = found[:, None].astype(mx.int32)
            drawn.append((order, tokens))
            # The next guess writes where this one reads.
            mx.async_eval(tokens, states, [layer.state for layer in self._layers])
        for numbers, column in drawn:
            for number, token in zip(numbers, np.asarray(column)[:, 0].tolist(), strict=True):
                guesses[number].append(token)
        return guesses

    def forget(self, sequence: SequenceState) -> None:
        """It has ended."""
        self._known.pop(sequence, None)

    def clear(self, tenant: str | None) -> None:
        """It remembers nothing of texts that have ended."""

    def _room(self, one: Wanted) -> int:
        """How many entries of scratch its row takes behind what it holds; 0 where its last state is not known."""
        position = one.sequence.num_tokens - 2
        if self._at(one.sequence, position) is None:
            return 0
        if not self._layers:
            return one.most
        return place_of(one.sequence).bucket.num_positions - position

    def _run(
        self,
        sequences: Sequence[SequenceState],
        starts: Sequence[int],
        begins: Sequence[bool],
        tokens: mx.array,
        states: mx.array,
    ) -> mx.array:
        span = span_of(sequences, starts, begins, tokens.shape[1])
        for layer in self._layers:
            layer.span = span
        return self._head.run(tokens, states, span)

    def _before(self, chunks: Sequence[Chunk], states: mx.array) -> mx.array:
        """[B, 1, D']: the state before each chunk, or zeros."""
        picked = [self._at(chunk.sequence, chunk.start - 1) for chunk in chunks]
        nothing = mx.zeros((1, 1, states.shape[-1]), states.dtype)
        return self._gathered([each if each is not None else (nothing, 0, 0) for each in picked])

    def _at(self, sequence: SequenceState, position: int) -> tuple[mx.array, int, int] | None:
        known = self._known.get(sequence)
        if known is None or not known.start <= position < known.stop:
            return None
        return known.array, known.row, position - known.start

    def _gathered(self, picked: Sequence[tuple[mx.array, int, int] | None]) -> mx.array:
        """[B, 1, D'] of (array, row, column) each."""
        groups: dict[int, list[int]] = {}
        for number, each in enumerate(picked):
            assert each is not None
            groups.setdefault(id(each[0]), []).append(number)
        parts, order = [], []
        for numbers in groups.values():
            inside = [each for number in numbers if (each := picked[number]) is not None]
            array = inside[0][0]
            rows, columns = ([each[axis] for each in inside] for axis in (1, 2))
            if array.shape[1] == 1 and rows == list(range(array.shape[0])):
                parts.append(array)
            else:
                parts.append(array[mx.array(rows), mx.array(columns)][:, None])
            order += numbers
        together = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        if order == list(range(len(order))):
            return together
        return together[mx.array(np.argsort(order).astype(np.int32))]

    def _kept(self, chunks: Sequence[Chunk], before: mx.array | None, states: mx.array) -> mx.array:
        """Those of the states that the next chunks, and guesses, may begin with; a chunk may be begun anew."""
        firsts = [chunk.start for chunk in chunks]
        if states.shape[1] > MAX_CARRIED and not any(chunk.draft for chunk in chunks):
            firsts = [chunk.stop - 1 for chunk in chunks]
            last = mx.array([chunk.num_tokens - 1 for chunk in chunks])
            states = states[mx.arange(len(chunks)), last][:, None]
        elif self._goes_back and before is not None:
            firsts = [chunk.start - 1 for chunk in chunks]
            states = mx.concatenate([before, states], axis=1)
        for row, (chunk, first) in enumerate(zip(chunks, firsts, strict=True)):
            self._known[chunk.sequence] = _States(states, row, first, chunk.stop)
        return states
