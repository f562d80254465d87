"""A Plan in, drawn tokens out. The one file that builds a step's arrays, and the one place that evaluates them."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from serve.adapters.bank import Bank
from serve.cache.capacity import RowCost
from serve.cache.rows import Span
from serve.engine import probe
from serve.engine.plan import Drawn, Plan, SequenceState
from serve.engine.request import TokenLogprob
from serve.engine.sampler import Logprobs, Sampler
from serve.model.network import TextNetwork

PAD_TOKEN = 0


class Runner:
    """Owns the rows; drives network and bank. Every method runs on the thread that owns the arrays."""

    def __init__(self, network: TextNetwork, bank: Bank) -> None:
        self._network = network
        self._bank = bank
        self.rows = probe.make_rows(network)
        self._decode_arrays: tuple[int, list[int], Sampler] | None = None

    def probe(self) -> RowCost:
        """What a row costs. ModelError where a family's rows cannot be what its own cache is."""
        cost = probe.measure(self._network, self.rows)
        if cost.state_bytes:
            probe.prove(self._network, self.rows)
        return cost

    def run(self, plan: Plan) -> list[Drawn]:
        """One step: move rows, decode, prefill, draw. Lazily built, evaluated once at its end.

        One entry for each row whose tokens are all computed; a row whose logits are not numbers is told, and the
        others are as they would have been without it.
        """
        self.rows.move(plan.moves)
        hidden, sequences = self._hidden(plan)
        if not sequences:
            # The rows are named because a prompt's middle chunk leads to no token.
            mx.eval(self.rows.arrays())
            return []
        sampler = self._sampler(plan, sequences)
        self._bank.rows.set(_slots(sequences))
        logits = self._network.logits(hidden)[:, 0]  # [B, V]
        drawn = sampler.draw(logits, [len(sequence.generated) for sequence in sequences])  # [B]
        is_sound = sampler.is_sound(logits, drawn)  # [B]
        logprobs = sampler.logprobs(logits, drawn)
        # The step's one evaluation.
        mx.eval(drawn, is_sound, logprobs.arrays() if logprobs else [], self.rows.arrays())
        return _read(sequences, drawn, is_sound, logprobs)

    def reset(self) -> None:
        """Forget all rows, whatever state a failed step left them in."""
        self.rows.clear()
        self._bank.rows.set([])
        self._decode_arrays = None

    def _hidden(self, plan: Plan) -> tuple[mx.array, list[SequenceState]]:
        """Final hidden states [B, 1, D] of every row that draws a token, and whose they are."""
        parts: list[mx.array] = []
        sequences = list(plan.decode)
        if plan.decode:
            parts.append(self._decode(plan))
        if plan.prefill:
            hidden, finished = self._prefill(plan)
            if finished:
                parts.append(hidden)
                sequences.extend(finished)
        if not parts:
            return mx.zeros((0, 1, 1)), []
        return (parts[0] if len(parts) == 1 else mx.concatenate(parts)), sequences

    def _decode(self, plan: Plan) -> mx.array:
        tokens = np.fromiter((s.generated[-1] for s in plan.decode), np.int32, len(plan.decode))
        starts = [s.num_cached_tokens for s in plan.decode]
        rows = [s.row for s in plan.decode]
        span = Span(rows, starts, 1, num_rows=plan.num_rows, longest=plan.num_positions)
        return self._forward(mx.array(tokens[:, None]), span, self._cached(plan)[0])

    def _prefill(self, plan: Plan) -> tuple[mx.array, list[SequenceState]]:
        chunks = plan.prefill
        width = max(chunk.stop - chunk.start for chunk in chunks)
        tokens = np.full((len(chunks), width), PAD_TOKEN, dtype=np.int32)
        for index, chunk in enumerate(chunks):
            tokens[index, : chunk.stop - chunk.start] = chunk.sequence.tokens(chunk.start, chunk.stop)
        sequences = [chunk.sequence for chunk in chunks]
        span = Span(
            [sequence.row for sequence in sequences],
            [chunk.start for chunk in chunks],
            width,
            num_rows=plan.num_rows,
            new_rows=[chunk.sequence.row for chunk in chunks if chunk.start == 0],
            longest=plan.num_positions,
        )
        hidden = self._forward(mx.array(tokens), span, _slots(sequences))  # [B, T, D]
        last = [(index, c.stop - c.start - 1) for index, c in enumerate(chunks) if c.is_last]
        if not last:
            return hidden, []
        indices, columns = (mx.array(np.asarray(part, dtype=np.int32)) for part in zip(*last, strict=True))
        return hidden[indices, columns][:, None], [chunks[index].sequence for index, _ in last]

    def _forward(self, tokens: mx.array, span: Span, slots: Sequence[int]) -> mx.array:
        self.rows.set_span(span)
        self._bank.rows.set(slots)
        return self._network.hidden(tokens, cache=self.rows.caches)

    def _cached(self, plan: Plan) -> tuple[list[int], Sampler]:
        """Slots and settings of the decoding rows: arrays that live as long as the composition does."""
        if self._decode_arrays is None or self._decode_arrays[0] != plan.composition:
            settings = [sequence.request.sampling for sequence in plan.decode]
            self._decode_arrays = (plan.composition, _slots(plan.decode), Sampler(settings))
        return self._decode_arrays[1], self._decode_arrays[2]

    def _sampler(self, plan: Plan, sequences: Sequence[SequenceState]) -> Sampler:
        if len(sequences) == len(plan.decode):
            return self._cached(plan)[1]
        return Sampler([sequence.request.sampling for sequence in sequences])


def _slots(sequences: Sequence[SequenceState]) -> list[int]:
    """Each row's slot; the bank keeps the arrays it makes of them."""
    return [sequence.slot for sequence in sequences]


def _read(
    sequences: Sequence[SequenceState], drawn: mx.array, is_sound: mx.array, logprobs: Logprobs | None
) -> list[Drawn]:
    details = {} if logprobs is None else _details(sequences, logprobs)
    token_ids: list[int] = np.asarray(drawn).tolist()
    sound: list[bool] = np.asarray(is_sound).tolist()
    return [
        Drawn(sequence, (token_id,), _entries(token_id, details.get(index)))
        if sound[index]
        else Drawn(sequence, (), is_sound=False)
        for index, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True))
    ]


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
