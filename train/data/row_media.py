"""What one sequence shows: its media with their places, where its tokens stand, and who sees whom. Host data.

Pixels are not held: they are read when a forward, or the engine, asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from serve.model.prompt import Media, Prompt, Rope


@dataclass(frozen=True, eq=False)
class RowMedia:
    """Beside a sequence's tokens; `media`, `rope` and `blocks` are those of a `Prompt`.

    A rope may be of fewer tokens than the sequence has: those behind it are words.
    """

    media: tuple[Media, ...]
    rope: Rope | None = None
    blocks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, prompt: Prompt) -> RowMedia:
        """What a prompt shows."""
        return cls(prompt.media, prompt.rope, prompt.blocks)

    @property
    def stop(self) -> int:
        """Behind its last placeholder."""
        return max(one.stop for one in self.media)

    @property
    def num_placeholders(self) -> int:
        """Tokens that stand for media."""
        return sum(len(one.positions) for one in self.media)

    @property
    def placeholders(self) -> np.ndarray:
        """Where they stand, ascending."""
        return np.concatenate([one.positions for one in self.media])

    def rope_positions(self, num_tokens: int) -> np.ndarray:
        """[3, num_tokens] int32 of a sequence that begins with these media and goes on with words."""
        plain = np.broadcast_to(np.arange(num_tokens, dtype=np.int32), (3, num_tokens))
        if self.rope is None:
            return plain
        known = self.rope.positions[:, :num_tokens]
        return np.concatenate([known, plain[:, known.shape[1] :] + self.rope.delta], axis=1, dtype=np.int32)

    def prompt(self, token_ids: Sequence[int]) -> Prompt:
        """As the engine takes it, with these tokens."""
        return Prompt(tuple(token_ids), self.media, self.rope, self.blocks)


class Standing(NamedTuple):
    """Where in a row of a batch a sequence with media stands: columns [start, stop)."""

    start: int
    stop: int
    media: RowMedia


def media_array(rows: Sequence[Sequence[Standing]]) -> np.ndarray | None:
    """What stands in each row of a batch, as one of its arrays: [B] of tuples. None where nothing does."""
    if not any(rows):
        return None
    found = np.empty(len(rows), object)
    for place, standing in enumerate(rows):
        found[place] = tuple(standing)
    return found


def rope_of(rows: Sequence[Sequence[Standing]], width: int) -> np.ndarray:
    """[3, B, width] int32: where each token stands in its sequence. Words beside media stand at their column."""
    plain = np.arange(width, dtype=np.int32)
    found = np.tile(plain, (3, len(rows), 1))
    for place, standing in enumerate(rows):
        for one in standing:
            # Behind its own tokens is padding, or the next document, which comes later.
            found[:, place, one.start :] = one.media.rope_positions(width - one.start)
    return found


def blocks_of(rows: Sequence[Sequence[Standing]], width: int) -> np.ndarray | None:
    """[B, width] int32: which block of its row a token is in, -1 for none. None where no row has any."""
    if not any(one.media.blocks for standing in rows for one in standing):
        return None
    found = np.full((len(rows), width), -1, np.int32)
    for place, standing in enumerate(rows):
        blocks = [(one.start, block) for one in standing for block in one.media.blocks]
        for number, (begin, (start, stop)) in enumerate(blocks):
            found[place, begin + start : begin + stop] = number
    return found
