"""Logits → one token a row, each row with its own settings. No loop over rows, no state but the settings' arrays.

Randomness is counter-based: row r's u for its k-th token comes from a threefry key that is a hash of (seed_r, k),
so the same logits give the same tokens alone and in any company. A row's path (greedy, plain, filtered) depends on
its own settings alone. Filters apply after temperature, in vLLM's order: top_k, top_p, min_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from serve.engine.request import MAX_TEMPERATURE, Sampling

MIN_TEMPERATURE = 1e-6
MAX_TOP_K = 2**31 - 1
_MASK64 = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_uniform = mx.vmap(lambda key: mx.random.uniform(key=key))


@dataclass(frozen=True)
class Logprobs:
    """For the rows that asked: log p of the drawn token [m], and the k likeliest ids and values [m, k]."""

    rows: tuple[int, ...]
    drawn: mx.array
    top_ids: mx.array | None
    top_values: mx.array | None

    def arrays(self) -> list[mx.array]:
        """What must be evaluated before it is read."""
        return [value for value in (self.drawn, self.top_ids, self.top_values) if value is not None]


class Sampler:
    """The settings of one batch of rows as arrays; rebuilt when the rows change, not every step."""

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._greedy = [i for i, row in enumerate(rows) if row.temperature == 0]
        self._plain = [i for i, row in enumerate(rows) if row.temperature > 0 and not _filters(row)]
        self._filtered = [i for i, row in enumerate(rows) if row.temperature > 0 and _filters(row)]
        order = [*self._greedy, *self._plain, *self._filtered]
        self._identity = order == list(range(len(rows)))
        self._restore = mx.array(np.argsort(np.asarray(order)).astype(np.int32))
        temperatures = [min(max(row.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE) for row in rows]
        self._temperature = mx.array(temperatures, dtype=mx.float32)
        self._seed = _mixed(np.asarray([row.seed & _MASK64 for row in rows], dtype=np.uint64))
        self._top_k = mx.array([min(row.top_k, MAX_TOP_K) for row in rows], dtype=mx.int32)
        self._top_p = mx.array([row.top_p for row in rows], dtype=mx.float32)
        self._min_p = mx.array([row.min_p for row in rows], dtype=mx.float32)
        self._asking = tuple(i for i, row in enumerate(rows) if row.num_logprobs is not None)
        self._num_top = max((row.num_logprobs or 0 for row in rows), default=0)

    @property
    def is_greedy(self) -> bool:
        """No row draws at random: `draw` looks at no counter."""
        return not self._plain and not self._filtered

    def draw(self, logits: mx.array, counters: Sequence[int]) -> mx.array:
        """logits [B, V]; counters: how many tokens each row has drawn so far. Returns [B] token ids, lazily."""
        if self.is_greedy:
            return mx.argmax(logits, axis=-1)
        keys = mx.array(_keys(self._seed, counters))  # [B, 2]
        uniform = _uniform(keys)  # [B]
        parts = []
        if self._greedy:
            parts.append(mx.argmax(logits[mx.array(self._greedy)], axis=-1))
        for rows, has_filters in ((self._plain, False), (self._filtered, True)):
            if rows:
                parts.append(self._draw_random(logits, uniform, mx.array(rows), has_filters))
        drawn = mx.concatenate([part.astype(mx.uint32) for part in parts])
        return drawn if self._identity else drawn[self._restore]

    def is_sound(self, logits: mx.array, drawn: mx.array) -> mx.array:
        """[B] bool: a row's logits hold neither NaN nor +inf, and what was drawn has a probability."""
        total = logits.astype(mx.float32).sum(axis=-1, keepdims=True)  # [B, 1]
        of_drawn = mx.take_along_axis(logits, drawn[:, None], axis=-1)  # [B, 1]
        # NaN and +inf stay in the sum; −inf is a token that cannot come, and −inf − −inf is NaN where it was drawn.
        return (total - of_drawn < mx.inf)[:, 0]

    def logprobs(self, logits: mx.array, drawn: mx.array) -> Logprobs | None:
        """Log-probabilities of the rows that asked for them, at temperature 1 and before any filter, in nats."""
        if not self._asking:
            return None
        rows = mx.array(self._asking)
        picked = logits[rows].astype(mx.float32)
        normal = picked - mx.logsumexp(picked, axis=-1, keepdims=True)
        of_drawn = mx.take_along_axis(normal, drawn[rows][:, None].astype(mx.int32), axis=-1)[:, 0]
        if self._num_top == 0:
            return Logprobs(self._asking, of_drawn, None, None)
        ids = mx.argsort(-normal, axis=-1)[:, : self._num_top]
        return Logprobs(self._asking, of_drawn, ids, mx.take_along_axis(normal, ids, axis=-1))

    def _draw_random(
        self, logits: mx.array, uniform: mx.array, rows: mx.array, has_filters: bool
    ) -> mx.array:
        scaled = logits[rows].astype(mx.float32) / self._temperature[rows][:, None]
        probs = mx.softmax(scaled, axis=-1)
        if has_filters:
            floor = _floor(probs, self._top_k[rows], self._top_p[rows], self._min_p[rows])
            probs = mx.where(probs >= floor, probs, 0)
        cumulative = mx.cumsum(probs, axis=-1)
        # Strictly below the total, so that the first position past the target always exists and has mass.
        target = uniform[rows][:, None] * cumulative[:, -1:] * (1 - 1e-6)
        return mx.argmax(cumulative > target, axis=-1)


def _floor(probs: mx.array, top_k: mx.array, top_p: mx.array, min_p: mx.array) -> mx.array:
    """[B, 1] the smallest probability each row keeps. Ties at the floor are kept."""
    ordered = -mx.sort(-probs, axis=-1)  # [B, V] descending
    rank = mx.arange(probs.shape[-1], dtype=mx.int32)[None]
    in_top_k = (top_k[:, None] == 0) | (rank < top_k[:, None])
    kept = mx.where(in_top_k, ordered, 0)
    before = mx.cumsum(kept, axis=-1) - kept
    in_top_p = before < top_p[:, None] * mx.sum(kept, axis=-1, keepdims=True)
    in_min_p = ordered >= min_p[:, None] * ordered[:, :1]
    keeps = in_top_k & in_top_p & in_min_p
    keeps = keeps | (rank == 0)
    return mx.min(mx.where(keeps, ordered, mx.inf), axis=-1, keepdims=True)


def _filters(row: Sampling) -> bool:
    return row.top_k > 0 or row.top_p < 1 or row.min_p > 0


def _keys(seeds: np.ndarray, counters: Sequence[int]) -> np.ndarray:
    """[B, 2] uint32: the keys of the k-th draws of these (mixed) seeds, different for different pairs."""
    keys = _mixed(seeds + np.asarray(counters, dtype=np.uint64) * _GOLDEN)
    return keys.view(np.uint32).reshape(-1, 2)


def _mixed(values: np.ndarray) -> np.ndarray:
    """A one-to-one scrambling of 64 bits, SplitMix64's: Steele, Lea and Flood 2014, `mix64`."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
