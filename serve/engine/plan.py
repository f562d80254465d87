"""What the next forward runs, in words: sequences, rows and token ranges; and what it gave. No arrays.

Every part of a step is a Chunk: decode, prefill, and what follows a restored prefix. Chunks of one token, and of one
and what is guessed to follow it, come first, in one forward, ordered by bucket and row, so that those of one bucket
are its rows [0, n); the others are a second.

    chunks   0 … num_single-1                            | num_single …
             one token each and its draft, one forward   | a second forward, padded to its longest chunk
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from serve.cache.capacity import Bucket, Move, Place
from serve.cache.features import FeatureKey
from serve.cache.precision import PLAIN, KvPrecision
from serve.engine.drafts import Drafting
from serve.engine.edits import LogitsEdit
from serve.engine.request import Progress, Request, TokenLogprob
from serve.model.prompt import Media


@dataclass(eq=False)
class SequenceState:
    """One request on its way. The scheduler alone changes it.

    Positions of its row: [0, num_cached_tokens) are written, and [num_cached_tokens, num_planned_tokens) are by the
    steps in flight. `generated` holds the tokens drawn and read so far. What is to be computed before the next token
    is drawn is `num_tokens`: the prompt, and after a preemption the answer so far too.
    """

    request: Request
    arrival: int = -1
    """Its number in the order of arrival."""
    place: Place | None = None
    """Its row of keys and values; None while it waits."""
    state_row: int = -1
    num_cached_tokens: int = 0
    num_planned_tokens: int = 0
    num_in_flight: int = 0
    """Steps that run it and are not committed."""
    num_captured_tokens: int = 0
    """Where the capture of a step in flight ends; 0 if there is none. The prefix cache has not got it yet."""
    num_restored_tokens: int | None = None
    """Found in the prefix cache when it first began; None until then."""
    num_shared_tokens: int = 0
    """Where it parts from another text that was computed, and its recurrent state is kept for whoever comes next."""
    has_looked: bool = False
    """The prefix cache was asked for it."""
    held: set[int] = field(default_factory=set)
    """Numbers of the prompt's media whose features are kept for it."""
    sought: set[int] = field(default_factory=set)
    """Numbers of those that have had features, and are counted."""
    slot: int = 0
    """Its adapter's place in the bank while `has_slot`; 0 is the base."""
    has_slot: bool = False
    """The slot is kept for it: it has a row."""
    is_gone: bool = False
    """It was taken out."""
    is_sound: bool = True
    """As far as is known, its row holds numbers."""
    generated: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt's tokens but the first, as far as they have been read."""
    edit: LogitsEdit | None = None
    """What changes its logits. `tell` alone tells it of tokens."""
    num_told: int = 0
    """Of the answer's tokens that the edit was told of."""
    drafting: Drafting | None = None
    """Who guesses its tokens, and how well; None: nobody."""

    def __post_init__(self) -> None:
        prompt = self.request.prompt
        self.num_prompt_tokens = len(prompt.token_ids)
        self.num_sighted_tokens = max((media.stop for media in prompt.media), default=0)
        """Behind the last token that media fill."""
        max_tokens = self.request.sampling.max_tokens
        assert max_tokens is not None, "set by Engine.check"
        self.max_total_tokens = self.num_prompt_tokens + max_tokens
        """Tokens of prompt and answer at most. The last one is never written."""
        self.group = self.request.group or self.request.id
        """Whose it is."""
        self.precision = self.request.precision or PLAIN
        self.quantize_after = prompt.whole(self.precision.start_after)
        """A row of at most so many tokens is plain: as `start_after` says, or as many as end before a block there."""
        self.final_precision = self.precision.at(self.precision.start_after + 1)
        """Of its row once that is longer."""
        self._prompt_keys = prompt.keys

    @property
    def num_tokens(self) -> int:
        """Length of the prompt and of the answer so far."""
        return self.num_prompt_tokens + len(self.generated)

    @property
    def progress(self) -> Progress:
        """How far it is; from any thread."""
        num_generated = len(self.generated)
        running: Literal["prefill", "decode"] = "decode" if num_generated else "prefill"
        phase: Literal["waiting", "prefill", "decode"] = "waiting" if self.place is None else running
        return Progress(phase, self.num_prompt_tokens, self.num_cached_tokens, num_generated)

    def tell(self, drawn: Sequence[int] = ()) -> None:
        """Its edit hears of the answer's tokens that it has not heard of, and of `drawn` behind them."""
        if self.edit is None:
            return
        news = [*self.generated[self.num_told :], *drawn]
        if news:
            self.num_told += len(news)
            self.edit.advance(news)

    @property
    def num_behind(self) -> int:
        """Known tokens before the last that its row is to take in again, for one behind them was not its own."""
        return max(self.num_tokens - 1 - self.num_planned_tokens, 0)

    @property
    def is_scoring(self) -> bool:
        """Log-probabilities of its prompt are wanted, and not all known: nothing of it is taken from a prefix."""
        wanted = self.request.sampling.num_prompt_logprobs is not None
        return wanted and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def is_spent(self) -> bool:
        """Its last token is drawn, or a step in flight draws it."""
        return self.num_planned_tokens >= self.max_total_tokens - 1

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and answer."""
        prompt = self.request.prompt.token_ids
        after = self.generated[max(start - len(prompt), 0) : max(stop - len(prompt), 0)]
        return [*prompt[start:stop], *after]

    def keys(self, stop: int) -> array[int]:
        """By which a prefix knows its first `stop` tokens."""
        keys = self._prompt_keys[:stop]
        keys.extend(self.generated[: max(stop - self.num_prompt_tokens, 0)])
        return keys

    def feature_key(self, number: int) -> FeatureKey:
        """By which the features of one of its prompt's media are kept."""
        request = self.request
        tower = request.adapter.tower_hash if request.adapter is not None else ""
        return FeatureKey(request.prompt.media[number].key, tower, request.tenant, request.cache_salt)

    def token(self, position: int) -> int:
        """The token there, of prompt or answer."""
        number = position - self.num_prompt_tokens
        return self.generated[number] if number >= 0 else self.request.prompt.token_ids[position]

    def precision_at(self, num_tokens: int) -> KvPrecision:
        """What a row of so many tokens is stored in."""
        return PLAIN if num_tokens <= self.quantize_after else self.final_precision


class Chunk(NamedTuple):
    """Tokens [start, stop) of one sequence run, and its row holds `stop` positions then. With a draft, fewer of them
    may turn out to be the sequence's."""

    sequence: SequenceState
    start: int
    stop: int
    begins: bool
    """The row holds nothing yet, whatever its last sequence left there."""
    draws: bool
    """All tokens that there are have been computed after it, so the next one is drawn."""
    draft: tuple[int, ...] = ()
    """Guesses of its last tokens; a token is drawn after the one before them, and after each."""

    @property
    def num_tokens(self) -> int:
        """How many run."""
        return self.stop - self.start

    @property
    def tokens(self) -> list[int]:
        """Those that run; the sequence knows all but the draft's."""
        return [*self.sequence.tokens(self.start, self.stop - len(self.draft)), *self.draft]

    @property
    def draws_of(self) -> list[Chunk]:
        """One for each token that is drawn: as if it ended before it."""
        if not self.draft:
            return [self]
        first = self.stop - len(self.draft)
        return [self._replace(stop=stop, draft=()) for stop in range(first, self.stop + 1)]

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of the answer before the one that is drawn after it."""
        return self.stop - self.sequence.num_prompt_tokens


class Encode(NamedTuple):
    """One of a prompt's media goes through the tower. Its features are at hand when the next step is planned."""

    sequence: SequenceState
    number: int
    """Among the prompt's media."""

    @property
    def media(self) -> Media:
        """What is encoded."""
        return self.sequence.request.prompt.media[self.number]


class Found(Protocol):
    """A prefix that a row can be given. Whoever asked for it releases it."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def segments(self) -> Sequence[Any]: ...


class Restore(NamedTuple):
    """The row of `sequence` is to hold the prefix, and nothing behind it."""

    sequence: SequenceState
    prefix: Found


class Capture(NamedTuple):
    """Positions [start, stop) of a row are to be copied for the prefix cache; the row holds `stop` of them."""

    sequence: SequenceState
    place: Place
    state_row: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """One step, in the order of its fields: copies of rows that leave, pictures encoded, buffers' sizes, moves,
    restores, forwards, copies of what prompts have computed."""

    departures: tuple[Capture, ...] = ()
    """Of rows whose sequences ended or were preempted, where they stood before this plan."""
    encodes: tuple[Encode, ...] = ()
    """For steps to come: no chunk of this one waits for them."""
    capacities: Mapping[Bucket, int] = field(default_factory=dict)
    """Rows of each bucket; those left out have none."""
    moves: tuple[Move, ...] = ()
    state_moves: tuple[tuple[int, int], ...] = ()
    restores: tuple[Restore, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    num_single: int = 0
    """So many of the chunks, the first, have one token, and guesses of those that follow it. Where rows keep a state
    that had taken in a wrong guess, they have more, which they run again."""
    width: int = 1
    """Tokens a row of the first forward, guesses and padding included; 1 where nobody has a draft."""
    is_split: bool = False
    """The first chunks run in a forward for each length, and none is padded: nobody guesses, and rows take in what
    they had to give back."""
    captures: tuple[Capture, ...] = ()
    composition: int = 0
    """Changes whenever the sequences of the one-token chunks, their order or their places do, and with the number of
    rows where those keep state. Two plans in a row with the same one run the same rows, one token later."""
    num_state_rows: int = 0
    """Rows that have a sequence, whether this step runs them or not."""
    num_bytes: int = 0
    """Of all rows while this plan is the last."""
    num_prefilled: int = 0
    """Tokens of prompts, and of answers that are computed anew."""

    @property
    def num_padded(self) -> int:
        """Tokens of the second forward, padding included."""
        others = self.chunks[self.num_single :]
        return len(others) * max((chunk.num_tokens for chunk in others), default=0)

    @property
    def is_guessing(self) -> bool:
        """Rows of the first forward may run tokens that turn out to be nobody's."""
        return self.width > 1 and not self.is_split

    @property
    def is_empty(self) -> bool:
        """Nothing to run, and nothing to copy."""
        return not self.chunks and not self.departures and not self.encodes


class Drawn(NamedTuple):
    """What a step gave one sequence: its next tokens, or that its logits were not numbers."""

    sequence: SequenceState
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token, or none."""
    is_sound: bool = True
    """False: no token could be drawn, for the logits held NaN or +inf, or nothing that may come."""
    error: Exception | None = None
    """What its edit raised, or that it left nothing to draw; it is not sound then."""
    num_drafted: int = 0
    """Guesses that were checked; those before the last of `token_ids` were right."""
    is_back: bool = False
    """Its row is what it was before the step: what the step ran of it, it runs again."""
