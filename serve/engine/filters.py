"""Which tokens a row may draw, from its probabilities after temperature: top_n_sigma, top_k, top_p, min_p, XTC.

A row is looked at as little as its own settings allow, whatever its company: min_p, top_n_sigma and XTC need no
order; a top_k of less than MAX_CANDIDATES needs that many candidates and not the vocabulary; top_p alone needs all
of it sorted.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from serve.engine.request import Sampling

MAX_CANDIDATES = 1024
"""Ties with a top_k's last token are kept up to so many tokens together."""
MAX_TOP_K = 2**31 - 1


def is_filtered(row: Sampling) -> bool:
    """Whether it draws from less than its vocabulary."""
    return row.top_k > 0 or row.top_p < 1 or row.min_p > 0 or row.top_n_sigma > 0 or row.xtc_probability > 0


def has_candidates(row: Sampling) -> bool:
    """Whether what it may draw is among its MAX_CANDIDATES likeliest tokens."""
    return 0 < row.top_k < MAX_CANDIDATES


def needs_order(row: Sampling) -> bool:
    """Whether probabilities must be sorted to know what it keeps."""
    return row.top_k > 0 or row.top_p < 1


class Filters:
    """Of M rows, all with candidates or none, and all in need of an order or none."""

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._rows = rows
        self._is_ordered = any(map(needs_order, rows))
        self._has_sigma = any(row.top_n_sigma > 0 for row in rows)
        self.has_xtc = any(row.xtc_probability > 0 for row in rows)
        """Whether `keep` looks at random numbers."""
        self._top_k = _column([min(row.top_k, MAX_TOP_K) for row in rows], mx.int32)
        self._top_p = _column([row.top_p for row in rows])
        self._min_p = _column([row.min_p for row in rows])
        self._sigma = _column([row.top_n_sigma for row in rows])
        self._xtc_probability = _column([row.xtc_probability for row in rows])
        self._xtc_threshold = _column([row.xtc_threshold for row in rows])
        self._spared: mx.array | None = None

    def cut(self, scaled: mx.array) -> mx.array:
        """Logits [M, V] without those below n standard deviations under the largest: Tang et al. 2024, as mlx-vlm has
        it. Temperature makes no difference; a token that cannot come (−inf) does not count."""
        if not self._has_sigma:
            return scaled
        is_there = scaled > -mx.inf
        count = is_there.sum(axis=-1, keepdims=True)
        mean = mx.where(is_there, scaled, 0).sum(axis=-1, keepdims=True) / count
        square = mx.where(is_there, mx.square(scaled - mean), 0).sum(axis=-1, keepdims=True) / count
        level = scaled.max(axis=-1, keepdims=True) - self._sigma * mx.sqrt(square)
        return mx.where((self._sigma > 0) & (scaled < level), -mx.inf, scaled)

    def keep(self, probs: mx.array, uniform: mx.array | None, ids: mx.array | None = None) -> mx.array:
        """Probabilities [M, N] of all tokens or of candidates; 0 where a token is left out, not scaled anew.

        uniform  [M, 1] for XTC, a number for each row
        ids      [M, N] the candidates; None: token t stands at t
        """
        if self._is_ordered:
            floor = _floor(probs, self._top_k, self._top_p, self._min_p)
        else:
            floor = self._min_p * probs.max(axis=-1, keepdims=True)
        probs = mx.where(probs >= floor, probs, 0)
        return probs if uniform is None else self._exclude(probs, uniform, ids)

    def _exclude(self, probs: mx.array, uniform: mx.array, ids: mx.array | None) -> mx.array:
        """XTC, as mlx-lm's apply_xtc: of what exceeds the threshold the least likely stays."""
        share = probs / probs.sum(axis=-1, keepdims=True)
        least = mx.where(share > self._xtc_threshold, share, mx.inf).min(axis=-1, keepdims=True)
        is_out = (share > least) & (uniform < self._xtc_probability)
        return mx.where(is_out & ~self._is_spared(probs, ids), 0, probs)

    def _is_spared(self, probs: mx.array, ids: mx.array | None) -> mx.array:
        if ids is not None:
            most = max(len(row.xtc_special_tokens) for row in self._rows)
            tokens = [[*row.xtc_special_tokens, *[-1] * most][:most] for row in self._rows]
            spared = mx.array(np.asarray(tokens, dtype=np.int32).reshape(len(tokens), 1, most))
            return (ids[:, :, None].astype(mx.int32) == spared).any(axis=-1)
        if self._spared is None:
            spared_tokens = np.zeros(probs.shape, dtype=bool)
            for number, row in enumerate(self._rows):
                spared_tokens[number, list(row.xtc_special_tokens)] = True
            self._spared = mx.array(spared_tokens)
        return self._spared


def _column(values: Sequence[float], dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(list(values), dtype=dtype)[:, None]


def _floor(probs: mx.array, top_k: mx.array, top_p: mx.array, min_p: mx.array) -> mx.array:
    """[M, 1] the smallest probability each row keeps. Ties at the floor are kept."""
    ordered = -mx.sort(-probs, axis=-1)  # [M, N] descending
    rank = mx.arange(probs.shape[-1], dtype=mx.int32)[None]
    in_top_k = (top_k == 0) | (rank < top_k)
    kept = mx.where(in_top_k, ordered, 0)
    before = mx.cumsum(kept, axis=-1) - kept
    in_top_p = before < top_p * mx.sum(kept, axis=-1, keepdims=True)
    in_min_p = ordered >= min_p * ordered[:, :1]
    keeps = in_top_k & in_top_p & in_min_p
    keeps = keeps | (rank == 0)
    return mx.min(mx.where(keeps, ordered, mx.inf), axis=-1, keepdims=True)
