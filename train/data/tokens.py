"""Examples -> token ids with a loss mask, and a report of what was kept. Rendering is serve's ChatTemplate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from serve.model.template import ChatTemplate
from train.data.example import Example
from train.recipe import Recipe


@dataclass(frozen=True)
class TokenizedExample:
    """One training sequence. `is_target[i]`: token i is predicted from tokens before i and counts; never i = 0."""

    token_ids: np.ndarray  # [T] int32
    is_target: np.ndarray  # [T] bool
    source: str
    line: int

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_targets(self) -> int:
        """Tokens the loss counts."""
        return int(self.is_target.sum())


@dataclass(frozen=True)
class TokenizeReport:
    """What became of the rows. A conversation may give several sequences, so kept + dropped may exceed read."""

    num_read: int
    num_sequences: int
    num_truncated: int
    num_tokens: int
    num_targets: int
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> sequences
    dropped_places: tuple[str, ...] = ()  # file:line of the first few
    histogram: tuple[tuple[int, int], ...] = ()  # (upper bound of length in tokens, sequences)
    longest: int = 0


def tokenize(
    examples: Sequence[Example], template: ChatTemplate, tokenizer: object, recipe: Recipe
) -> tuple[list[TokenizedExample], TokenizeReport]:
    """Tokenize every example as serving would; DataError under `excess_length_strategy: raise`."""
    raise NotImplementedError
