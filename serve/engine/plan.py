"""What the next forward runs, in words: sequences, rows and token ranges; and what it gave. No arrays.

Rows of the batch are compact: decoding rows are [0, num_decoding), prefilling rows follow.

    row      0 … num_decoding-1 | num_decoding … num_rows-1
             decode, one token  | prefill, a chunk each
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.engine.request import Request, TokenLogprob


@dataclass(eq=False)
class SequenceState:
    """One request on its way. The scheduler alone changes it.

    KV positions [0, num_cached_tokens) are written; `generated` holds the tokens drawn so far. What is to be
    computed before the next token is drawn is `num_tokens`: the prompt, and after a preemption the answer so far too.
    """

    request: Request
    arrival: int = -1
    """Its number in the order of arrival."""
    row: int = -1
    num_cached_tokens: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def group(self) -> str:
        """Whose it is."""
        return self.request.group or self.request.id

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt.token_ids)

    @property
    def num_tokens(self) -> int:
        """Length of the prompt and of the answer so far."""
        return self.num_prompt_tokens + len(self.generated)

    @property
    def max_total_tokens(self) -> int:
        """KV positions the sequence may come to need."""
        assert self.request.sampling.max_tokens is not None, "set by Engine.check"
        return self.num_prompt_tokens + self.request.sampling.max_tokens

    @property
    def slot(self) -> int:
        """Its adapter's place in the bank; 0 is the base."""
        return self.request.adapter.slot if self.request.adapter is not None else 0

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and answer."""
        prompt = self.request.prompt.token_ids
        after = self.generated[max(start - len(prompt), 0) : max(stop - len(prompt), 0)]
        return [*prompt[start:stop], *after]


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, stop) of one sequence; the last chunk ends in a drawn token."""

    sequence: SequenceState
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """True when all tokens that there are have been computed after this chunk."""
        return self.stop == self.sequence.num_tokens


@dataclass(frozen=True)
class Plan:
    """One step. `moves` come first: rows to copy (from, to), all read before any is written."""

    moves: tuple[tuple[int, int], ...]
    prefill: tuple[PrefillChunk, ...]
    decode: tuple[SequenceState, ...]
    """In row order."""
    composition: int
    """Changes whenever the decoding rows or their order do; arrays made for one value serve until the next."""
    num_rows: int
    """All rows that hold positions after this step are below it, those included that it does not run."""
    num_positions: int
    """Positions of the longest of them."""

    @property
    def is_empty(self) -> bool:
        """Nothing to run."""
        return not self.prefill and not self.decode


@dataclass(frozen=True)
class Drawn:
    """What a step gave one sequence: its next tokens, or that its logits were not numbers."""

    sequence: SequenceState
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    """One a token, or none."""
    is_sound: bool = True
    """False: no token could be drawn, for the logits held NaN or +inf."""
