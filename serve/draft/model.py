"""A drafter that is a model: a small one with the target's tokenizer, batched on rows of its own.

A round, for all sequences that guesses are wanted of: rows that lack many tokens take in a part of them; rows that
lack few run those, and then the guesses one by one, all rows together. Guesses are drawn as the target draws, with
the row's settings, seed and counters: one random number falls on both distributions, and a guess is right as often as
these let it (common random numbers). Where the draft model's likeliest token is right more often, it is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from serve.cache.families import make_rows
from serve.cache.spans import Span
from serve.constraints.edit import Masks
from serve.draft.adapters import DraftAdapters
from serve.draft.agreement import check_agreement
from serve.draft.edits import GuessEdits
from serve.draft.kinds import Group, GuessKind, GuessKinds
from serve.draft.places import Samplers
from serve.draft.prefixes import DraftPrefixes
from serve.draft.rows import DraftRows, Followed, order_of, span_of
from serve.engine.drafts import MAX_DRAFT, Wanted
from serve.engine.plan import SequenceState
from serve.errors import ConfigError
from serve.model.loading import LoadedModel

NAME = "model"
"""By which requests choose it."""
PAD_TOKEN = 0
FEW_TOKENS = 8
"""What a row may lack and still guess in the same forward: after a draft, one or two."""
CATCH_UP_TOKENS = 256
LEAST_CATCH_UP = 32
"""Tokens of one row at least, where several share a round's."""


class DraftModel:
    """Guesses by a draft model. Lives on the thread that owns the arrays, but for `num_bytes`.

    It guesses nothing for prompts with pictures, clips or sounds, which the draft model does not see.
    """

    def __init__(
        self,
        model: LoadedModel,
        target: LoadedModel,
        *,
        max_bytes: int,
        max_rows: int = 64,
        adapters: Mapping[str, str | Path] = {},
        max_tokens: int = MAX_DRAFT,
        catch_up_tokens: int = CATCH_UP_TOKENS,
        guesses: GuessKind = "learned",
    ) -> None:
        """
        max_bytes        of rows, prefixes and adapters of the draft model
        max_tokens       of one guess
        adapters         by name of the target's adapter: the draft model's own for it
        catch_up_tokens  of texts that rows have not taken in yet, in one round, padding included
        guesses          drawn as the target draws, or the likeliest tokens, or whichever come true more often

        ConfigError where its tokenizer is not the target's, its rows cannot be rolled back, or not even one has room;
        ModelError where it cannot be batched; what `DraftAdapters` raises.
        """
        check_agreement(model, target)
        self._network = model.network
        self._max_context = model.max_context
        self._vocab_size = min(model.network.vocab_size, target.network.vocab_size)
        self._max_tokens = min(
            max_tokens, catch_up_tokens
        )  # a window's buffer has room for as many beside it
        self._catch_up_tokens = catch_up_tokens
        rows = make_rows(model.network, prefill_chunk_tokens=catch_up_tokens)
        if rows.cost.state_bytes:
            raise ConfigError(
                f"draft model {model.name} keeps recurrent state, which takes in every token for good, so its rows "
                f"cannot go back to before a guess that was wrong; choose one with attention alone"
            )
        rows.prove()
        self._adapters = DraftAdapters(model, adapters, max_bytes)
        self._max_bytes = max_bytes - self._adapters.num_bytes
        if not rows.cost.max_positions(self._max_bytes):
            raise ConfigError(
                f"draft model {model.name}: {max_bytes} bytes do not hold its adapters and one row beside them"
            )
        self._rows = DraftRows(rows, max_rows, self._max_bytes)
        self._prefixes = DraftPrefixes(model, rows, self._max_bytes)
        self._kinds = GuessKinds(guesses)
        self._num_rounds = 0
        self._samplers = Samplers()
        self._masks = Masks()

    @property
    def max_bytes(self) -> int:
        """Of rows, prefixes and adapters of the draft model."""
        return self._max_bytes + self._adapters.num_bytes

    @property
    def num_bytes(self) -> int:
        """Memory of its rows, prefixes and adapters. From any thread."""
        return self._rows.num_bytes + self._prefixes.num_bytes + self._adapters.num_bytes

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int] | None]:
        """For each at most `most` guesses; None for a row that has not caught up with its text yet or has no room
        now, and never any for one whose prompt shows something, or that is too long."""
        try:
            return self._propose(wanted)
        except BaseException:
            self.reset()  # whatever state its rows were left in
            raise

    def forget(self, sequence: SequenceState) -> None:
        """It has ended: what was computed for it is kept as a prefix, and its row given back."""
        one = self._rows.find(sequence)
        if one is not None:
            self._settle(one)
            self._prefixes.keep(one)
            self._rows.release(sequence)
            self._bound_prefixes()

    def clear(self, tenant: str | None = None) -> None:
        """Drop what is kept of a tenant's texts; of everybody's, where none is named."""
        self._prefixes.clear(tenant)

    def reset(self) -> None:
        """Forget all rows."""
        self._rows.clear()
        self._adapters.bank.rows.set([])

    def check_integrity(self) -> None:
        """AssertionError if rows or bytes do not agree."""
        self._rows.check_integrity()
        assert self._rows.num_bytes + self._prefixes.num_bytes <= self._max_bytes

    def _propose(self, wanted: Sequence[Wanted]) -> list[list[int] | None]:
        self._num_rounds += 1
        reach = min(max((each.most for each in wanted), default=0), self._max_tokens)
        asked = [one for each in wanted if (one := self._follow(each.sequence, reach)) is not None]
        seated = self._rows.seat(asked)
        self._bound_prefixes()
        for one in seated:
            if not one.num_known and one.num_missing > FEW_TOKENS:
                self._prefixes.restore(one)
        self._catch_up([one for one in seated if one.num_missing > FEW_TOKENS])
        ready = [one for one in seated if one.num_missing <= FEW_TOKENS]
        guesses = self._guess(ready, reach) if ready else {}
        late = {one.sequence for one in asked} - guesses.keys()
        return [
            None if each.sequence in late else guesses.get(each.sequence, [])[: each.most] for each in wanted
        ]

    def _follow(self, sequence: SequenceState, reach: int) -> Followed | None:
        """What is followed of it, with room for `reach` guesses; None where there is nothing to guess."""
        request, num_positions = sequence.request, sequence.num_tokens + reach
        if request.prompt.media or num_positions > self._max_context:
            return None
        one = self._rows.find(sequence)
        if one is None:
            slot, effect_hash = self._adapters.of(request.adapter)
            one = Followed(sequence, slot, effect_hash)
        self._settle(one)
        one.num_positions, one.asked_at = num_positions, self._num_rounds
        return one

    def _settle(self, one: Followed) -> None:
        """What came is known, of its text and of which kind of guess was right."""
        if one.first is not None and one.first[0] < one.sequence.num_tokens:
            position, drawn, likeliest = one.first
            self._kinds.note(_group(one), drawn, likeliest, one.sequence.token(position))
            one.first = None
        one.settle()

    def _bound_prefixes(self) -> None:
        """They have what rows leave."""
        self._prefixes.bound(self._max_bytes - self._rows.num_bytes)

    def _catch_up(self, behind: list[Followed]) -> None:
        """Take in a part of what these lack, up to all but the last token: as much of each, those that have waited
        longest first where not all have a turn."""
        if not behind:
            return
        behind.sort(key=lambda one: one.served_at)
        served = order_of(behind[: max(self._catch_up_tokens // LEAST_CATCH_UP, 1)])
        share = self._catch_up_tokens // len(served)
        stops = [min(one.sequence.num_tokens - 1, one.num_known + share) for one in served]
        width = max(stop - one.num_known for one, stop in zip(served, stops, strict=True))
        tokens = np.full((len(served), width), PAD_TOKEN, dtype=np.int32)
        for row, (one, stop) in enumerate(zip(served, stops, strict=True)):
            tokens[row, : stop - one.num_known] = one.sequence.tokens(one.num_known, stop)
        span = span_of(served, [one.num_known for one in served], width)
        self._forward(mx.array(tokens), span, served)
        # What attends to the rows as they are must have read them when the next forward writes.
        mx.eval(self._rows.rows.arrays())
        for one, stop in zip(served, stops, strict=True):
            one.num_known, one.served_at = stop, self._num_rounds
            if one.num_missing == 1 and not one.is_kept:
                one.is_kept = True
                self._prefixes.keep(one)

    def _guess(self, ready: Sequence[Followed], reach: int) -> dict[SequenceState, list[int]]:
        """What follows each: all rows run together, and where no row's logits are edited, nothing is read before the
        last of them is drawn."""
        edits = GuessEdits([one.sequence for one in ready], self._masks, self._vocab_size)
        try:
            return self._guess_edited(ready, reach, edits)
        finally:
            edits.take_back()

    def _guess_edited(
        self, ready: Sequence[Followed], reach: int, edits: GuessEdits
    ) -> dict[SequenceState, list[int]]:
        sequences = [one.sequence for one in ready]
        sampler = self._samplers.of(sequences)
        counters = [len(sequence.generated) for sequence in sequences]
        hidden = self._last_hidden(ready)
        span = span_of(ready, [sequence.num_tokens for sequence in sequences], 1)
        # Where nobody draws, the sampler's tokens are the likeliest.
        are_likeliest = [not sampler.is_greedy and self._kinds.is_likeliest(_group(one)) for one in ready]
        drawn: list[mx.array] = []
        firsts: tuple[mx.array, ...] = ()
        while True:
            logits = edits.edited(self._network.logits(hidden)[:, 0, : self._vocab_size])  # [B, V]
            both: tuple[mx.array, ...] = ()
            if not firsts or not all(are_likeliest):
                both = (sampler.tokens(logits, [counter + len(drawn) for counter in counters]),)
            if not sampler.is_greedy and (not firsts or any(are_likeliest)):
                both = (*both, mx.argmax(logits, axis=-1).astype(mx.int32))
            firsts = firsts or both
            drawn.append(_chosen(both, are_likeliest))
            if len(drawn) == reach:
                break
            if not edits.are_over:
                mx.eval(drawn[-1], self._rows.rows.arrays())
                edits.tell(np.asarray(drawn[-1]).tolist())
            hidden = self._forward(drawn[-1][:, None].astype(mx.int32), span, ready)
            span = span.next()
        guesses = mx.stack(drawn, axis=1)  # [B, reach]
        mx.eval(guesses, firsts, self._rows.rows.arrays())
        found: list[list[int]] = np.asarray(guesses).tolist()
        for one, tokens in zip(ready, found, strict=True):
            one.num_known, one.guesses = one.sequence.num_tokens, tokens[:-1]
        if len(firsts) > 1:
            for one, *tokens in zip(ready, *(np.asarray(each).tolist() for each in firsts), strict=True):
                one.first = (one.num_known, *tokens)
        return dict(zip(sequences, found, strict=True))

    def _last_hidden(self, ready: Sequence[Followed]) -> mx.array:
        """[B, 1, D] behind the last token of each, all that they lack taken in."""
        counts = [one.num_missing for one in ready]
        tokens = np.full((len(ready), max(counts)), PAD_TOKEN, dtype=np.int32)
        for row, one in enumerate(ready):
            tokens[row, : counts[row]] = one.sequence.tokens(one.num_known, one.sequence.num_tokens)
        span = span_of(ready, [one.num_known for one in ready], max(counts))
        hidden = self._forward(mx.array(tokens), span, ready)  # [B, T, D]
        if len(set(counts)) == 1:
            return hidden[:, -1:]
        last = mx.array(np.asarray(counts, dtype=np.int32) - 1)
        return hidden[mx.arange(len(ready)), last][:, None]

    def _forward(self, tokens: mx.array, span: Span, followed: Sequence[Followed]) -> mx.array:
        self._rows.rows.set_span(span)
        self._adapters.bank.rows.set([one.slot for one in followed])
        return self._network.hidden(tokens, self._rows.rows.caches)


def _group(one: Followed) -> Group:
    return one.adapter, one.sequence.request.sampling.temperature


def _chosen(kinds: Sequence[mx.array], are_likeliest: Sequence[bool]) -> mx.array:
    """[B] of draws and likeliest tokens [B] each row's own kind; where there is one kind, that."""
    if len(kinds) == 1:
        return kinds[0]
    if all(are_likeliest) or not any(are_likeliest):
        return kinds[all(are_likeliest)]
    return mx.where(mx.array(list(are_likeliest)), kinds[1], kinds[0])
