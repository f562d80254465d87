"""A Plan in, drawn tokens out. The one file that builds a step's arrays, and the one place that evaluates them.

A step is started, and read later: the next one may be started in between, and then feeds on tokens that nobody has
read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from serve.adapters.bank.bank import Bank
from serve.cache.capacity import Bucket, Place
from serve.cache.families import make_rows
from serve.cache.segment import Segment
from serve.cache.spans import Span, span_parts
from serve.constraints.after_thoughts import GrammarAfterThoughts
from serve.constraints.edit import GrammarEdit, Masks
from serve.engine.decode_state import DecodeState, DrawState
from serve.engine.drafts import Reader
from serve.engine.edits import LogitsChange, parts_of
from serve.engine.plan import Capture, Chunk, Drawn, Encode, Plan, SequenceState
from serve.engine.request import TokenLogprob
from serve.engine.sampler import Draws, Logprobs
from serve.engine.scores import Scores, num_scored, scores_of
from serve.engine.sights import NOTHING, Inputs, Sights, blocks_of
from serve.errors import RequestError
from serve.model.network import Network
from serve.model.vision import Features

logger = logging.getLogger(__name__)

PAD_TOKEN = 0
NOTHING_MAY_COME = (
    "the request's constraints leave no token that may come next: all that its grammar takes here is kept from "
    "coming, as min_tokens keeps ends and stop_token_ids"
)


class Captured(NamedTuple):
    """A copy of what a row held."""

    capture: Capture
    segment: Segment


@dataclass(eq=False)
class Encoded:
    """A picture on its way through the tower. Its arrays may not be computed yet."""

    encode: Encode
    features: Features | None = None
    is_sound: mx.array | None = None
    """Whether all of them are numbers."""
    error: Exception | None = None
    """What was raised; there are no features then."""


@dataclass
class Flight:
    """A step that has been started. Its arrays may not be computed yet."""

    plan: Plan
    sequences: list[SequenceState]
    """[N] of each token that is drawn, whose it is or would be: in the order of the batch, one with a draft as often
    as it has guesses and once more."""
    began_s: float = 0.0
    """By time.perf_counter."""
    draws: Draws | None = None
    scores: list[Scores] = field(default_factory=list)
    """Of prompts, in the order of their tokens."""
    errors: dict[int, Exception] = field(default_factory=dict)
    """What edits raised, or that they left nothing to draw, by index in the batch."""
    captured: list[Captured] = field(default_factory=list)
    encoded: list[Encoded] = field(default_factory=list)

    def arrays(self) -> list[mx.array]:
        """What is read of it."""
        of_scores = [array for each in self.scores for array in each.arrays()]
        return [*(self.draws.arrays() if self.draws is not None else ()), *of_scores]

    def tokens(self) -> dict[SequenceState, int]:
        """What it draws, read now: whoever asks waits until it is computed. Nobody has a draft."""
        assert self.plan.width == 1, "a step with drafts is read before the next is built"
        if self.draws is None:
            return {}
        token_ids: list[int] = np.asarray(self.draws.token_ids).tolist()
        return dict(zip(self.sequences, token_ids, strict=True))


class Runner:
    """Owns the rows; drives network and bank. Every method runs on the thread that owns the arrays.

    ahead  a step goes on while the thread does, until it is read
    """

    def __init__(
        self,
        network: Network,
        bank: Bank,
        sights: Sights | None = None,
        *,
        readers: Sequence[Reader] = (),
        row_chunk_tokens: int,
        ahead: bool = False,
    ) -> None:
        """Raises ModelError where a family's rows cannot be what its own cache is.

        sights   None for a text model
        readers  drafters that are shown each forward's states; their own layers stand with the rows
        """
        self._network = network
        self._bank = bank
        self._sights = sights
        self._evaluate = mx.async_eval if ahead else mx.eval
        self.rows = make_rows(network, prefill_chunk_tokens=row_chunk_tokens)
        self.rows.prove()
        self._readers = readers
        self._shown: list[mx.array] = []  # what readers want computed with the step
        for reader in readers:
            reader.bind(network, bank, self.rows)
        self._taps = sorted({tap for reader in readers for tap in reader.taps})
        self._capacities: Mapping[Bucket, int] = {}
        self._decoding: DecodeState | None = None
        self._drafted: tuple[object, DrawState] | None = None
        """Of the last step with drafts, by who drew how often."""
        self._masks = Masks()
        self._last: Flight | None = None  # what was started last, read or not

    def start(self, plan: Plan) -> Flight:
        """One step: pictures, rows to their places, one-token chunks, the others, draw. Evaluated once, at its end,
        but for pictures, each of which is by itself; and where an edit needs a token of the step in flight, the
        forwards are on their way while that is read.

        Feeds on the tokens of the step before it, read or not.
        """
        began_s = time.perf_counter()
        captured = self.capture(plan.departures)
        encoded = [self._encode(each) for each in plan.encodes]
        self._place(plan)
        scores: list[Scores] = []
        hidden, chunks = self._hidden(plan, scores)
        captured += self.capture(plan.captures)
        sequences = [chunk.sequence for chunk in chunks]
        flight = Flight(plan, sequences, began_s, scores=scores, captured=captured, encoded=encoded)
        if hidden is not None:
            self._draw(flight, hidden, chunks)
        # The step's one evaluation. The rows are named because a prompt's middle chunk leads to no token.
        self._evaluate(flight.arrays(), self.rows.arrays(), self._shown)
        self._shown = []
        self._last = flight
        return flight

    def read(self, flight: Flight) -> list[Drawn]:
        """What a started step has drawn: one entry for each row whose tokens are all computed.

        A row whose logits are not numbers is told, and the others are as they would have been without it.
        """
        if flight.draws is None:
            return []
        drawn = _read(flight, flight.draws)
        if self.rows.has_states and flight.plan.is_guessing:
            drawn = self._put_back(flight.plan, drawn)
        return drawn

    def _put_back(self, plan: Plan, drawn: Sequence[Drawn]) -> list[Drawn]:
        """Rows whose states have taken in what is not theirs, a guess or padding, are as before the step."""
        chunks = {chunk.sequence: chunk for chunk in plan.chunks[: plan.num_single]}
        found: list[Drawn] = []
        lengths: dict[int, int] = {}
        for one in drawn:
            chunk = chunks.get(one.sequence)
            is_exact = chunk is None or (
                chunk.num_tokens == plan.width and len(one.token_ids) == one.num_drafted + 1
            )
            if chunk is not None and not is_exact:
                lengths[one.sequence.state_row] = chunk.start
            found.append(one if is_exact else one._replace(is_back=True))
        self.rows.put_back(lengths)
        return found

    def capture(self, captures: Sequence[Capture]) -> list[Captured]:
        """Copies of rows as they are now; what is started afterwards does not change them."""
        captured = [
            Captured(each, self.rows.take(each.place, each.state_row, each.start, each.stop))
            for each in captures
        ]
        if captured:
            mx.async_eval([list(each.segment.arrays().values()) for each in captured])
        return captured

    def clear(self) -> None:
        """Give the rows' memory back; none is in use."""
        self.rows.clear()
        self._capacities = {}
        self._decoding = self._last = self._drafted = None

    def reset(self) -> None:
        """Forget all rows, whatever state a failed step left them in."""
        self.clear()
        self._bank.rows.set([])

    def _encode(self, encode: Encode) -> Encoded:
        """One picture, by the tower of its sequence's adapter where that has one."""
        assert self._sights is not None, "a text model is given pictures"
        sequence = encode.sequence
        self._bank.rows.set([sequence.slot] if sequence.feature_key(encode.number).tower else [])
        try:
            features, is_sound = self._sights.encode(encode)
            self._evaluate(features, is_sound)
        except Exception as error:  # whatever it is, it is one picture's trouble
            logger.exception("a picture of request %s cannot be encoded", sequence.request.id)
            return Encoded(encode, error=error)
        return Encoded(encode, features, is_sound)

    def _place(self, plan: Plan) -> None:
        """Grow buffers, move rows, shrink buffers, and fill rows from prefixes."""
        before, after = self._capacities, plan.capacities
        if after is before:
            return
        self._capacities = after
        wide = {bucket: max(before.get(bucket, 0), after.get(bucket, 0)) for bucket in {**before, **after}}
        if wide != before:
            self.rows.resize(wide)
        if plan.moves or plan.state_moves:
            self.rows.move(plan.moves, plan.state_moves)
        if wide != after:
            self.rows.resize(after)
        for sequence, prefix in plan.restores:
            assert sequence.place is not None
            self.rows.put(sequence.place, sequence.state_row, prefix.segments, prefix.num_tokens)

    def _hidden(self, plan: Plan, scores: list[Scores]) -> tuple[mx.array | None, list[Chunk]]:
        """Final hidden states [N, 1, D] that lead to a token, and what would have been computed before each. Of
        prompts whose tokens' log-probabilities are wanted, those are added to `scores`."""
        singles, others = plan.chunks[: plan.num_single], plan.chunks[plan.num_single :]
        parts: list[mx.array] = []
        drawing: list[Chunk] = []
        if singles and plan.is_split:
            self._split(plan, singles, scores, parts, drawing)
        elif singles:
            if self.rows.has_states and plan.is_guessing:
                self.rows.hold_states()
            hidden = self._single(plan, singles)  # [B, W, D]
            if plan.num_prefilled:
                scores += self._scores(hidden, singles)
            _choose(hidden, singles, parts, drawing)
        if others:
            hidden = self._padded(plan, others)  # [B, T, D]
            scores += self._scores(hidden, others)
            _choose(hidden, others, parts, drawing)
        if not parts:
            return None, []
        return (parts[0] if len(parts) == 1 else mx.concatenate(parts)), drawing

    def _scores(self, hidden: mx.array, chunks: Sequence[Chunk]) -> list[Scores]:
        found: list[Scores] = []
        for index, chunk in enumerate(chunks):
            if num_scored(chunk):
                self._bank.rows.set([chunk.sequence.slot])
                found += scores_of(self._network, hidden[index], chunk)
        return found

    def _single(self, plan: Plan, chunks: Sequence[Chunk]) -> mx.array:
        decoding = self._decoding
        width, was_drafted = plan.width, self._last is not None and self._last.plan.width > 1
        if decoding is None or decoding.composition != plan.composition:
            span = _span(chunks, width, plan.num_state_rows)
            deltas = self._sights.deltas(chunks) if self._sights else None
            decoding = self._decoding = DecodeState(plan.composition, DrawState.of(chunks), span, deltas)
        elif width > 1 or was_drafted:  # rows have come on by as much as was right
            decoding.span = _span(chunks, width, plan.num_state_rows)
        else:
            decoding.span = decoding.span.next()
        tokens = self._single_tokens(plan, chunks) if width == 1 else mx.array(_padded(chunks, width))
        inputs = NOTHING
        if self._sights is not None:
            if plan.num_prefilled and any(c.start < c.sequence.num_prompt_tokens for c in chunks):
                inputs = self._sights.prompts(tokens, chunks)
            else:
                inputs = self._sights.decoding(decoding.span, decoding.deltas)
        return self._forward(tokens, decoding.span, decoding.draw.slots, inputs, chunks)

    def _single_tokens(self, plan: Plan, chunks: Sequence[Chunk]) -> mx.array:
        """[B, 1]: known ones, or what the step before this one draws."""
        last, count = self._last, len(chunks)
        drawn = last.draws.token_ids if last is not None and last.draws is not None else None
        if last is not None and last.plan.width > 1:
            drawn = None
        if last is not None and drawn is not None and last.plan.composition == plan.composition:
            of_singles = last.sequences[:count]
            if len(of_singles) == count and of_singles[-1] is chunks[-1].sequence:
                return drawn[:count, None]
        known = [c.sequence.token(c.start) if c.start < c.sequence.num_tokens else None for c in chunks]
        tokens = mx.array([[token or 0] for token in known], dtype=mx.int32)
        if None not in known:
            return tokens
        assert last is not None, "nobody is to draw what is not known"
        assert drawn is not None
        index_of = {sequence: index for index, sequence in enumerate(last.sequences)}
        indices = [
            0 if token is not None else index_of[c.sequence] for token, c in zip(known, chunks, strict=True)
        ]
        is_known = mx.array([[token is not None] for token in known])
        return mx.where(is_known, tokens, drawn[mx.array(indices)][:, None].astype(mx.int32))

    def _split(
        self,
        plan: Plan,
        chunks: Sequence[Chunk],
        scores: list[Scores],
        parts: list[mx.array],
        drawing: list[Chunk],
    ) -> None:
        """What `_hidden` adds of the first chunks, by a forward for each length."""
        if self._decoding is not None and self._decoding.composition != plan.composition:
            self._decoding = None
        found: list[mx.array] = []
        order: list[int] = []
        for length in sorted({chunk.num_tokens for chunk in chunks}):
            numbers = [number for number, chunk in enumerate(chunks) if chunk.num_tokens == length]
            same = [chunks[number] for number in numbers]
            hidden = self._padded(plan, same)
            scores += self._scores(hidden, same)
            _choose(hidden, same, found, [])
            order += [number for number in numbers if chunks[number].draws]
        if order:
            parts.append(mx.concatenate(found)[mx.array(np.argsort(order).astype(np.int32))])
            drawing += [chunks[number] for number in sorted(order)]

    def _padded(self, plan: Plan, chunks: Sequence[Chunk]) -> mx.array:
        width = max(chunk.num_tokens for chunk in chunks)
        batch = mx.array(_padded(chunks, width))
        inputs = self._sights.prompts(batch, chunks) if self._sights else NOTHING
        return self._forward(batch, _span(chunks, width, plan.num_state_rows), _slots(chunks), inputs, chunks)

    def _forward(
        self, tokens: mx.array, span: Span, slots: Sequence[int], inputs: Inputs, chunks: Sequence[Chunk]
    ) -> mx.array:
        self.rows.set_span(span)
        self._bank.rows.set(slots)
        if not self._readers:
            return self._network.hidden(tokens, self.rows.caches, inputs.embeddings, inputs.extras)
        with self._network.tapped(self._taps) as taken:
            hidden = self._network.hidden(tokens, self.rows.caches, inputs.embeddings, inputs.extras)
        for reader in self._readers:
            self._shown += reader.observe(tokens, hidden, taken, chunks)
        return hidden

    def _draw(self, flight: Flight, hidden: mx.array, chunks: Sequence[Chunk]) -> None:
        draw = self._draw_state(flight.plan, chunks)
        changes = self._changes(flight, hidden, chunks, draw.edited) if draw.edited else {}
        self._bank.rows.set(draw.slots)
        logits = self._network.logits(hidden)[:, 0]  # [B, V]
        counters = [] if draw.sampler.is_greedy else [chunk.num_answer_tokens for chunk in chunks]
        flight.draws = draw.sampler.draw(logits, counters, changes)

    def _draw_state(self, plan: Plan, chunks: Sequence[Chunk]) -> DrawState:
        """How the rows draw that do; most often all one-token rows and no others."""
        singles = plan.chunks[: plan.num_single]
        if self._decoding is not None and len(chunks) == len(singles) and chunks[-1] is singles[-1]:
            return self._decoding.draw
        if len(chunks) > len(plan.chunks):  # drafts, often as long as in the step before
            key = plan.composition, tuple(chunk.sequence for chunk in chunks)
            if self._drafted is None or self._drafted[0] != key:
                self._drafted = key, DrawState.of(chunks)
            return self._drafted[1]
        return DrawState.of(chunks)

    def _changes(
        self, flight: Flight, hidden: mx.array, chunks: Sequence[Chunk], edited: Sequence[int]
    ) -> dict[int, LogitsChange]:
        """By row, what its edit does to its logits, now that it knows all tokens before them."""
        drawn: dict[SequenceState, int] = {}
        # With drafts all that comes before them is known.
        if flight.plan.width == 1 and any(
            chunks[row].num_answer_tokens > len(chunks[row].sequence.generated) for row in edited
        ):
            assert self._last is not None, "nobody is to draw what is not known"
            self._evaluate(hidden, self.rows.arrays())
            drawn = self._last.tokens()
        changes: dict[int, LogitsChange] = {}
        drafts = {chunk.sequence: chunk.draft for chunk in flight.plan.chunks if chunk.draft}
        first_of: dict[SequenceState, int] = {}
        for row in edited:
            sequence = chunks[row].sequence
            if sequence not in first_of:  # the rows behind its first are its draft's
                first_of[sequence] = row
                with _own_trouble(flight, row):
                    _tell(chunks[row], drawn)
        asked = {row: sequence for sequence, row in first_of.items() if row not in flight.errors}
        changes |= self._asked(flight, asked)
        if drafts:
            changes |= self._behind_guesses(flight, asked, changes, drafts)
        return changes

    def _asked(self, flight: Flight, sequences: Mapping[int, SequenceState]) -> dict[int, LogitsChange]:
        """By row, what its sequence's edit does now."""
        edits = [sequence.edit for sequence in sequences.values()]
        self._masks.fill(
            [
                part.current
                for edit in edits
                for part in parts_of(edit)
                if isinstance(part, (GrammarEdit, GrammarAfterThoughts)) and part.current is not None
            ]
        )
        changes: dict[int, LogitsChange] = {}
        for row, sequence in sequences.items():
            assert sequence.edit is not None
            with _own_trouble(flight, row):
                change = sequence.edit.change()
                if change is not None:
                    changes[row] = change
        return changes

    def _behind_guesses(
        self,
        flight: Flight,
        first: Mapping[int, SequenceState],
        changes: dict[int, LogitsChange],
        drafts: Mapping[SequenceState, Sequence[int]],
    ) -> dict[int, LogitsChange]:
        """By row, what edits do behind their sequences' guesses, up to the first that is not allowed: it will not be
        drawn. `changes`: before the first guess, by row; they stay what they are."""
        found: dict[int, LogitsChange] = {}
        going = {row: sequence for row, sequence in first.items() if drafts.get(sequence)}
        num_told = dict.fromkeys(going.values(), 0)
        while going:
            asked: dict[int, SequenceState] = {}
            for row, sequence in going.items():
                number, change = num_told[sequence], found.get(row, changes.get(row))
                if number == len(drafts[sequence]) or row in flight.errors:
                    continue
                guess = drafts[sequence][number]
                if change is not None:
                    if not change.allows(guess):
                        continue
                    (found if row in found else changes)[row] = change.copy()
                assert sequence.edit is not None
                with _own_trouble(flight, row + 1):
                    sequence.edit.advance([guess])
                    num_told[sequence] += 1
                    asked[row + 1] = sequence
            found |= self._asked(flight, asked)
            going = asked
        for row, sequence in first.items():
            count = num_told.get(sequence, 0)
            if count:
                if row + count in found:
                    found[row + count] = found[row + count].copy()
                with _own_trouble(flight, row):
                    assert sequence.edit is not None
                    sequence.edit.retract(count)
        return found


def _padded(chunks: Sequence[Chunk], width: int) -> np.ndarray:
    """[B, width] int32 tokens."""
    tokens = np.full((len(chunks), width), PAD_TOKEN, dtype=np.int32)
    for index, chunk in enumerate(chunks):
        tokens[index, : chunk.num_tokens] = chunk.tokens
    return tokens


@contextmanager
def _own_trouble(flight: Flight, row: int) -> Iterator[None]:
    """Whatever is raised, is one row's trouble."""
    try:
        yield
    except Exception as error:
        logger.exception("what request %s may draw cannot be told", flight.sequences[row].request.id)
        flight.errors[row] = error


def _tell(chunk: Chunk, drawn: Mapping[SequenceState, int]) -> None:
    """A row's edit hears of the tokens that it has not heard of; `drawn` holds the last."""
    sequence = chunk.sequence
    is_known = max(sequence.num_told, len(sequence.generated)) >= chunk.num_answer_tokens
    sequence.tell(() if is_known else (drawn[sequence],))


def _choose(hidden: mx.array, chunks: Sequence[Chunk], parts: list[mx.array], drawing: list[Chunk]) -> None:
    """Add [N, 1, D], the states of [B, T, D] that lead to a token, and what was computed up to each."""
    if hidden.shape[1] == 1 and all(chunk.draws for chunk in chunks):
        parts.append(hidden)
        drawing += chunks
        return
    chosen = [(index, each) for index, chunk in enumerate(chunks) if chunk.draws for each in chunk.draws_of]
    if chosen:
        rows = np.asarray([index for index, _ in chosen], dtype=np.int32)
        at = np.asarray([each.num_tokens - 1 for _, each in chosen], dtype=np.int32)
        parts.append(hidden[mx.array(rows), mx.array(at)][:, None])
        drawing += [each for _, each in chosen]


def _span(chunks: Sequence[Chunk], num_tokens: int, num_state_rows: int) -> Span:
    places = [_place(chunk) for chunk in chunks]
    parts = span_parts(places, [chunk.start for chunk in chunks], [chunk.begins for chunk in chunks])
    state_rows = [chunk.sequence.state_row for chunk in chunks]
    blocks = blocks_of(chunks) if num_tokens > 1 else None
    return Span(parts, num_tokens, state_rows, num_state_rows, blocks)


def _place(chunk: Chunk) -> Place:
    assert chunk.sequence.place is not None
    return chunk.sequence.place


def _slots(chunks: Sequence[Chunk]) -> list[int]:
    """Each row's slot; the bank keeps the arrays it makes of them."""
    return [chunk.sequence.slot for chunk in chunks]


def _read(flight: Flight, draws: Draws) -> list[Drawn]:
    details = {} if draws.logprobs is None else _details(flight.sequences, draws.logprobs)
    token_ids: list[int] = np.asarray(draws.token_ids).tolist()
    sound: list[bool] = np.asarray(draws.is_sound).tolist()
    if draws.may_come is not None:
        for row in np.flatnonzero(np.asarray(draws.is_sound) & ~np.asarray(draws.may_come)).tolist():
            flight.errors.setdefault(row, RequestError(NOTHING_MAY_COME))
    if flight.plan.width > 1:
        return _verified(flight, token_ids, sound, details)
    if not details and all(sound) and not flight.errors:
        return [
            Drawn(sequence, (token,)) for sequence, token in zip(flight.sequences, token_ids, strict=True)
        ]
    return [
        Drawn(sequence, (token_id,), _entries(token_id, details.get(index)))
        if sound[index] and index not in flight.errors
        else Drawn(sequence, (), is_sound=False, error=flight.errors.get(index))
        for index, (sequence, token_id) in enumerate(zip(flight.sequences, token_ids, strict=True))
    ]


def _verified(
    flight: Flight,
    token_ids: Sequence[int],
    sound: Sequence[bool],
    details: Mapping[int, tuple[float, tuple[tuple[int, float], ...]]],
) -> list[Drawn]:
    """Of each sequence the tokens that were drawn where everything before them was its own: as long as guesses are
    right, and one more. What cannot be drawn behind a guess is met again in the next step, without one."""
    drafts = {chunk.sequence: chunk.draft for chunk in flight.plan.chunks if chunk.draft}
    drawn: list[Drawn] = []
    first = 0
    while first < len(token_ids):
        sequence = flight.sequences[first]
        draft = drafts.get(sequence, ())
        if not sound[first] or first in flight.errors:
            drawn.append(Drawn(sequence, (), is_sound=False, error=flight.errors.get(first)))
        else:
            stop = first + 1
            for guess in draft:
                if guess != token_ids[stop - 1] or not sound[stop] or stop in flight.errors:
                    break
                stop += 1
            logprobs = [_entries(token_ids[at], details.get(at)) for at in range(first, stop)]
            drawn.append(
                Drawn(
                    sequence,
                    tuple(token_ids[first:stop]),
                    tuple(entry for entries in logprobs for entry in entries),
                    num_drafted=len(draft),
                )
            )
        first += len(draft) + 1
    return drawn


def _entries(
    token_id: int, detail: tuple[float, tuple[tuple[int, float], ...]] | None
) -> tuple[TokenLogprob, ...]:
    return () if detail is None else (TokenLogprob(token_id, *detail),)


def _details(
    sequences: Sequence[SequenceState], logprobs: Logprobs
) -> dict[int, tuple[float, tuple[tuple[int, float], ...]]]:
    """By index in the batch: log p of the drawn token, and the likeliest ones as many as that row asked for."""
    values = np.asarray(logprobs.drawn).tolist()
    top_ids, top_values = (
        np.asarray(part).tolist() if part is not None else []
        for part in (logprobs.top_ids, logprobs.top_values)
    )
    details = {}
    for number, index in enumerate(logprobs.rows):
        count = sequences[index].request.sampling.num_logprobs or 0
        top = tuple(zip(top_ids[number][:count], top_values[number][:count], strict=True)) if count else ()
        details[index] = (values[number], top)
    return details
