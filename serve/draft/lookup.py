"""Guesses from texts that are at hand: prompt lookup, or n-gram drafting (Saxena 2023; vLLM's `ngram`).

A row's last tokens are looked for in its own prompt and answer, in the prediction that came with the request, and in
earlier answers of the same tenant, salt and adapter. What followed there is the guess, of at most as many tokens as
agreed; where it comes true, the next guess goes on from there, and may be longer. No array, no model: some
microseconds a row, whatever its length.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from serve.engine.drafts import MAX_DRAFT, Wanted
from serve.engine.plan import SequenceState
from serve.model.ngrams import SIZES, Ngrams, ngram_keys

NAME = "ngram"
"""By which requests choose it, vLLM's word."""
MIN_MATCH = 2
REMEMBERED_TOKENS = 1 << 18
"""Of earlier answers, of all spaces together."""
BYTES_PER_TOKEN = 104
"""Of an earlier answer's token at most."""
LEAST_TOKENS = 256
"""What a space counts for at least: it has tables, however little was said there."""
SPACE_TOKENS = 1 << 16
"""Of one space."""
SEEN_BACK = 32
"""So far back two texts are compared, once an n-gram is found."""
END = -1
"""Between two answers."""


class Space(NamedTuple):
    """Who may see whose answers."""

    tenant: str
    salt: str
    adapter: str
    """By what it does; "": the base."""

    @classmethod
    def of(cls, sequence: SequenceState) -> Space:
        """Whose the answer is."""
        request = sequence.request
        adapter = request.adapter.effect_hash if request.adapter is not None else ""
        return cls(request.tenant, request.cache_salt, adapter)


class Match(NamedTuple):
    """The row's text goes on as another, or as itself earlier."""

    text: Ngrams
    position: int
    """Of what is to come, in that text."""
    length: int
    """Tokens before it that agree, as far as they were compared."""


class LookupDrafter:
    """Holds each row's answer, and what it remembers of earlier ones."""

    def __init__(
        self,
        *,
        max_tokens: int = MAX_DRAFT,
        min_match: int = MIN_MATCH,
        remembered_tokens: int = REMEMBERED_TOKENS,
    ) -> None:
        """max_tokens: of one guess; min_match: so many tokens agree at least, one of SIZES; remembered_tokens: of
        earlier answers, 0: none."""
        assert min_match in SIZES
        self._max_tokens = max_tokens
        self._min_match = min_match
        self._answers = Answers(remembered_tokens)
        self._rows: dict[SequenceState, _Row] = {}

    @property
    def max_bytes(self) -> int:
        """Of earlier answers."""
        return self._answers.max_tokens * BYTES_PER_TOKEN

    @property
    def num_bytes(self) -> int:
        """Memory held, but for what prompts know of themselves."""
        return self._answers.num_bytes + sum(row.own.num_bytes for row in tuple(self._rows.values()))

    @property
    def num_rows(self) -> int:
        """Whose answers it follows."""
        return len(self._rows)

    @property
    def num_remembered(self) -> int:
        """Tokens of earlier answers."""
        return self._answers.num_tokens

    def propose(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """What followed the longest n-gram that ends a row's text, when that came last."""
        return [self._guess(sequence, min(most, self._max_tokens)) for sequence, most in wanted]

    def forget(self, sequence: SequenceState) -> None:
        """Its answer is remembered, if its row was sound."""
        self._rows.pop(sequence, None)
        if sequence.is_sound and sequence.generated:
            # By the end of the prompt an answer is known from its first token on.
            self._answers.add(Space.of(sequence), [*_before(sequence, SIZES[-1]), *sequence.generated])

    def clear(self, tenant: str | None = None) -> None:
        """Earlier answers of a tenant are forgotten; everybody's, where none is named."""
        self._answers.clear(tenant)

    def _guess(self, sequence: SequenceState, most: int) -> list[int]:
        row = self._rows.get(sequence)
        if row is None:
            row = self._rows[sequence] = _Row(sequence)
            row.foresee()
        row.follow(sequence.generated)
        if row.match is None or row.is_over:
            row.match = row.find([*row.texts, *self._answers.of(row.space)], self._min_match)
        return [] if row.match is None else row.copied(min(most, row.match.length))


class _Row:
    """One sequence's text: `own` is the end of the prompt, as far as is looked back, and the answer."""

    def __init__(self, sequence: SequenceState) -> None:
        request = sequence.request
        self.space = Space.of(sequence)
        self.own = Ngrams(_before(sequence, SEEN_BACK))
        self.num_before = len(self.own)
        self.prediction = request.prediction
        given = [self.prediction] if self.prediction is not None else []
        self.texts = [*given, self.own, request.prompt.ngrams]
        self.match: Match | None = None

    @property
    def num_known(self) -> int:
        """Tokens of the answer that it was told of."""
        return len(self.own) - self.num_before

    @property
    def is_over(self) -> bool:
        """Nothing follows in the text that it goes on as."""
        match = self.match
        assert match is not None
        return match.position >= len(match.text) or match.text.tokens[match.position] < 0

    def foresee(self) -> None:
        """Before its first token the answer is what was predicted."""
        if self.prediction is not None and not self.num_known:
            self.match = Match(self.prediction, 0, SEEN_BACK)

    def follow(self, generated: Sequence[int]) -> None:
        """The answer so far. What it went on as may hold on, or not."""
        new = generated[self.num_known :]
        self.own.extend(new)
        if self.match is None:
            return
        text, position, length = self.match
        stop = position + len(new)
        is_so = stop <= len(text) and text.tokens[position:stop] == array("q", new)
        self.match = Match(text, stop, length + len(new)) if is_so else None

    def find(self, texts: Sequence[Ngrams], least: int) -> Match | None:
        """Of the longest n-gram that ends it and that a text holds, the longest match; of equals the first."""
        own = self.own.tokens
        tail = own[-SIZES[-1] :]  # of 64-bit numbers, as texts are
        keys = dict(zip(SIZES, ngram_keys(tail), strict=False))
        for size in reversed(SIZES[SIZES.index(least) :]):
            if size not in keys:
                continue
            found = [
                Match(text, position, size + self._agreeing(text.tokens, position - size, len(own) - size))
                for text in texts
                if (position := text.find(size, keys[size], tail)) is not None and text.tokens[position] >= 0
            ]
            if found:
                return max(found, key=lambda match: match.length)
        return None

    def _agreeing(self, tokens: array[int], stop: int, own_stop: int) -> int:
        """How many tokens before two positions are the same."""
        own, most = self.own.tokens, min(stop, own_stop, SEEN_BACK)
        for number in range(1, most + 1):
            if tokens[stop - number] != own[own_stop - number]:
                return number - 1
        return most

    def copied(self, count: int) -> list[int]:
        """What follows in that text; where that is its own, what is copied goes on from what was copied."""
        assert self.match is not None
        text, position, _ = self.match
        tokens = text.tokens[position : position + count].tolist()
        if text is self.own:
            while len(tokens) < count:
                tokens += tokens[: count - len(tokens)]
        first_end = next((number for number, token in enumerate(tokens) if token < 0), len(tokens))
        return tokens[:first_end]


class Answers:
    """Earlier answers by space, in two texts each: the recent one, and the one before it, which goes when the recent
    one is full. Whose space was looked at longest ago is forgotten first."""

    def __init__(self, max_tokens: int) -> None:
        """max_tokens: of all spaces; 0: nothing is remembered."""
        self.max_tokens = max_tokens
        self._text_tokens = min(SPACE_TOKENS, max_tokens) // 2
        self._texts: OrderedDict[Space, tuple[Ngrams, ...]] = OrderedDict()
        self._num_counted = 0

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(text.num_bytes for texts in tuple(self._texts.values()) for text in texts)

    @property
    def num_tokens(self) -> int:
        """Of all spaces."""
        return sum(map(_count, self._texts.values()))

    def of(self, space: Space) -> tuple[Ngrams, ...]:
        """What is remembered there, the recent first."""
        texts = self._texts.get(space, ())
        if texts:
            self._texts.move_to_end(space)
        return texts

    def add(self, space: Space, token_ids: Sequence[int]) -> None:
        """An answer's tokens, or as many of the last as a text has room for."""
        new = [*token_ids[-self._text_tokens + 1 :], END] if self._text_tokens > 1 else []
        if not new:
            return
        recent, *older = self._take(space) or (Ngrams(array("q")),)
        if len(recent) + len(new) > self._text_tokens:
            recent, older = Ngrams(array("q")), [recent]
        recent.extend(new)
        self._texts[space] = texts = (recent, *older)
        self._num_counted += _counted(texts)
        while self._num_counted > self.max_tokens and len(self._texts) > 1:
            self._take(next(iter(self._texts)))

    def clear(self, tenant: str | None) -> None:
        """Nothing of that tenant is remembered any more; of nobody, where none is named."""
        for space in [space for space in self._texts if tenant is None or space.tenant == tenant]:
            self._take(space)

    def _take(self, space: Space) -> tuple[Ngrams, ...]:
        texts = self._texts.pop(space, ())
        self._num_counted -= _counted(texts) if texts else 0
        return texts


def _count(texts: Sequence[Ngrams]) -> int:
    return sum(map(len, texts))


def _counted(texts: Sequence[Ngrams]) -> int:
    return max(_count(texts), LEAST_TOKENS)


def _before(sequence: SequenceState, count: int) -> array[int]:
    """The last tokens of the prompt."""
    return sequence.request.prompt.keys[-count:]
