"""What a chunk's hidden states say of the prompt's own tokens: log-probabilities, ranks, and what was likelier."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from serve.engine.plan import Chunk, SequenceState
from serve.engine.request import TokenLogprob
from serve.engine.sampler import likeliest, log_softmax
from serve.model.network import Network

SCORED_TOKENS = 64
"""So many positions' logits there are at a time, however long the chunk is."""


@dataclass(frozen=True)
class Scores:
    """Of a prompt's tokens [first, first + n), lazily."""

    sequence: SequenceState
    first: int
    values: mx.array
    """[n] log p"""
    ranks: mx.array
    """[n] 1: nothing is likelier."""
    top_ids: mx.array | None
    """[n, k]"""
    top_values: mx.array | None

    def arrays(self) -> list[mx.array]:
        """What must be evaluated before it is read."""
        parts = (self.values, self.ranks, self.top_ids, self.top_values)
        return [part for part in parts if part is not None]

    def entries(self) -> list[TokenLogprob]:
        """One a token."""
        values, ranks = np.asarray(self.values).tolist(), np.asarray(self.ranks).tolist()
        count = len(values)
        tops: list[tuple[tuple[int, float], ...]] = [()] * count
        if self.top_ids is not None and self.top_values is not None:
            ids, top_values = np.asarray(self.top_ids).tolist(), np.asarray(self.top_values).tolist()
            tops = [tuple(zip(*pair, strict=True)) for pair in zip(ids, top_values, strict=True)]
        token_ids = self.sequence.request.prompt.token_ids[self.first : self.first + count]
        return list(map(TokenLogprob, token_ids, values, tops, ranks))


def num_scored(chunk: Chunk) -> int:
    """Of how many of the chunk's positions the next token is the prompt's, and wanted."""
    sequence = chunk.sequence
    if sequence.request.sampling.num_prompt_logprobs is None:
        return 0
    return max(min(chunk.stop, sequence.num_prompt_tokens - 1) - chunk.start, 0)


def scores_of(network: Network, hidden: mx.array, chunk: Chunk) -> list[Scores]:
    """From hidden states [T, D] of a chunk, a few positions at a time, each after those before it. The bank is set to
    the row's adapter."""
    sequence, found = chunk.sequence, list[Scores]()
    token_ids = sequence.request.prompt.token_ids
    most = sequence.request.sampling.num_prompt_logprobs or 0
    end = num_scored(chunk)
    for start in range(0, end, SCORED_TOKENS):
        stop = min(start + SCORED_TOKENS, end)
        states = hidden[start:stop][None]  # [1, n, D]
        if found:
            states = mx.depends(states, found[-1].arrays())
        normal = log_softmax(network.logits(states)[0])  # [n, V]
        first = chunk.start + start + 1
        targets = mx.array(token_ids[first : first + stop - start])[:, None]
        values = mx.take_along_axis(normal, targets, axis=-1)  # [n, 1]
        ranks = (normal > values).sum(axis=-1) + 1
        ids = likeliest(normal, most) if most else None
        tops = None if ids is None else mx.take_along_axis(normal, ids, axis=-1)
        found.append(Scores(sequence, first, values[:, 0], ranks, ids, tops))
    return found
