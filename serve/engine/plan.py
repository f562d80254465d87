"""What the next forward runs, in words: sequences, rows and token ranges. No arrays.

Rows of the batch are compact: decoding rows are [0, num_decoding), prefilling rows follow.

    row      0 … num_decoding-1 | num_decoding … num_rows-1
             decode, one token  | prefill, a chunk each
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve.engine.request import Request


@dataclass(eq=False)
class Sequence:
    """One request on its way. The scheduler alone changes it.

    KV positions [0, num_cached_tokens) are written; `generated` holds the tokens drawn so far.
    """

    request: Request
    row: int = -1
    num_cached_tokens: int = 0
    generated: list[int] = field(default_factory=list)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.prompt.token_ids)

    @property
    def max_total_tokens(self) -> int:
        """KV positions the sequence may come to need."""
        return self.num_prompt_tokens + self.request.sampling.max_tokens

    @property
    def slot(self) -> int:
        """Its adapter's place in the bank; 0 is the base."""
        return self.request.adapter.slot if self.request.adapter is not None else 0


@dataclass(frozen=True)
class PrefillChunk:
    """Prompt tokens [start, stop) of one sequence; the last chunk ends in a drawn token."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def is_last(self) -> bool:
        """True when the prompt is complete after this chunk."""
        return self.stop == self.sequence.num_prompt_tokens


@dataclass(frozen=True)
class Plan:
    """One step. `moves` come first: rows to copy (from, to), all read before any is written."""

    moves: tuple[tuple[int, int], ...]
    prefill: tuple[PrefillChunk, ...]
    decode: tuple[Sequence, ...]
    """In row order."""
    composition: int
    """Changes whenever the decoding rows or their order do; arrays made for one value serve until the next."""
    num_rows: int
    """Rows in use after the moves, those included that this step does not run."""

    @property
    def is_empty(self) -> bool:
        """Nothing to run."""
        return not self.prefill and not self.decode
