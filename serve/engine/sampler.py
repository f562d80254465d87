"""Logits → one token a row, each row with its own settings. No loop over rows, no state but the settings' arrays.

    logits ── edited ──▶ ── temperature ──▶ ── filters ──▶ ── a random number ──▶ token
              penalties, biases, masks         top_n_sigma, top_k, top_p, min_p, XTC

Randomness is counter-based: row r's u for its k-th token comes from a threefry key that is a hash of (seed_r, k),
so the same logits give the same tokens alone and in any company. A row's path (greedy, plain, filtered) depends on
its own settings alone. Filters apply after temperature, in vLLM's order: top_k, top_p, min_p.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import mlx.core as mx
import numpy as np

from serve.engine.edited import edited
from serve.engine.edits import LogitsChange
from serve.engine.filters import MAX_CANDIDATES, Filters, has_candidates, is_filtered, needs_order
from serve.engine.request import MAX_TEMPERATURE, Sampling

MIN_TEMPERATURE = 1e-6
NO_CHANGES: Mapping[int, LogitsChange] = MappingProxyType({})
BLOCK = 256
"""Tokens of a vocabulary that are looked at together for the likeliest few."""
_MASK64 = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FOR_XTC = np.uint64(0xD1B54A32D192ED03)
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


@dataclass(frozen=True)
class Draws:
    """What a step's logits gave, lazily."""

    token_ids: mx.array
    """[B]"""
    is_sound: mx.array
    """[B] bool: a row's logits hold neither NaN nor +inf, and what was drawn has a probability."""
    logprobs: Logprobs | None
    may_come: mx.array | None = None
    """[B] bool: what was drawn has a probability after the row's changes, too; None: no row was changed."""

    def arrays(self) -> list[mx.array]:
        """What must be evaluated before it is read."""
        of_changes = () if self.may_come is None else (self.may_come,)
        return [
            self.token_ids,
            self.is_sound,
            *of_changes,
            *(self.logprobs.arrays() if self.logprobs else ()),
        ]


@dataclass(frozen=True)
class _Group:
    """Rows that go one way."""

    rows: mx.array | None
    """[M] their numbers; None: all, in order."""
    indices: tuple[int, ...]
    temperature: mx.array
    """[M, 1]"""
    filters: Filters | None
    has_candidates: bool = False


class Sampler:
    """The settings of one batch of rows as arrays; rebuilt when the rows change, not every step."""

    def __init__(self, rows: Sequence[Sampling]) -> None:
        self._greedy = tuple(i for i, row in enumerate(rows) if row.temperature == 0)
        self._groups = _groups(rows)
        order = [*self._greedy, *(i for group in self._groups for i in group.indices)]
        self._restore = (
            None if order == list(range(len(rows))) else mx.array(np.argsort(order).astype(np.int32))
        )
        self._seed = _mixed(np.asarray([row.seed & _MASK64 for row in rows], dtype=np.uint64))
        self._has_xtc = any(group.filters is not None and group.filters.has_xtc for group in self._groups)
        self._asking = tuple(i for i, row in enumerate(rows) if row.num_logprobs is not None)
        self._num_top = max((row.num_logprobs or 0 for row in rows), default=0)

    @property
    def is_greedy(self) -> bool:
        """No row draws at random: `draw` looks at no counter."""
        return not self._groups

    def draw(
        self,
        logits: mx.array,
        counters: Sequence[int],
        changes: Mapping[int, LogitsChange] = NO_CHANGES,
    ) -> Draws:
        """logits [B, V]; counters: how many tokens each row has drawn so far; changes: by row, before temperature.

        Log-probabilities are of the logits as they came.
        """
        changed = edited(logits, changes)
        token_ids = self.tokens(changed, counters)
        may_come = None
        if changes:
            may_come = mx.take_along_axis(changed, token_ids[:, None], axis=-1)[:, 0] > -mx.inf
        return Draws(token_ids, self.is_sound(logits, token_ids), self.logprobs(logits, token_ids), may_come)

    def tokens(self, logits: mx.array, counters: Sequence[int]) -> mx.array:
        """[B] ids drawn from logits [B, V] that are changed already."""
        if self.is_greedy:
            return mx.argmax(logits, axis=-1)

        def draw(uniform: mx.array, ids: mx.array | None, probs: mx.array) -> mx.array:
            cumulative = mx.cumsum(probs, axis=-1)
            # Strictly below the total, so that the first position past the target always exists and has mass.
            target = uniform * cumulative[:, -1:] * (1 - 1e-6)
            at = mx.argmax(cumulative > target, axis=-1)  # [M]
            return at if ids is None else mx.take_along_axis(ids, at[:, None], axis=-1)[:, 0]

        def likeliest(logits: mx.array) -> mx.array:
            return mx.argmax(logits, axis=-1)

        return self._by_group(logits, counters, likeliest, draw)

    def probabilities(self, logits: mx.array, counters: Sequence[int]) -> mx.array:
        """[B, V] by what each row's next token is drawn, of logits that are changed already; XTC's own random number
        has fallen."""

        def whole(uniform: mx.array, ids: mx.array | None, probs: mx.array) -> mx.array:
            probs = probs / probs.sum(axis=-1, keepdims=True)
            if ids is None:
                return probs
            return mx.put_along_axis(mx.zeros((probs.shape[0], logits.shape[1])), ids, probs, axis=-1)

        def certain(logits: mx.array) -> mx.array:
            is_it = mx.arange(logits.shape[1])[None] == mx.argmax(logits, axis=-1, keepdims=True)
            return is_it.astype(mx.float32)

        return self._by_group(logits, counters, certain, whole)

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
        normal = log_softmax(logits[rows])
        of_drawn = mx.take_along_axis(normal, drawn[rows][:, None].astype(mx.int32), axis=-1)[:, 0]
        if self._num_top == 0:
            return Logprobs(self._asking, of_drawn, None, None)
        ids = likeliest(normal, self._num_top)
        return Logprobs(self._asking, of_drawn, ids, mx.take_along_axis(normal, ids, axis=-1))

    def _by_group(
        self,
        logits: mx.array,
        counters: Sequence[int],
        of_greedy: Callable[[mx.array], mx.array],
        of_random: Callable[[mx.array, mx.array | None, mx.array], mx.array],
    ) -> mx.array:
        """[B, …]; of_random(uniform [M, 1], candidates [M, N] or None, probabilities [M, N or V])."""
        keys = _keys(self._seed, counters)
        uniform = _uniform(_halves(keys))[:, None]  # [B, 1]
        for_xtc = _uniform(_halves(_mixed(keys ^ _FOR_XTC)))[:, None] if self._has_xtc else None
        parts = []
        if self._greedy:
            parts.append(of_greedy(logits[mx.array(self._greedy)]))
        for group in self._groups:
            rows = group.rows
            picked, of_draw = (part if rows is None else part[rows] for part in (logits, uniform))
            of_xtc = for_xtc if for_xtc is None or rows is None else for_xtc[rows]
            ids, probs = _kept(group, picked, of_xtc)
            parts.append(of_random(of_draw, ids, probs))
        drawn = parts[0] if len(parts) == 1 else mx.concatenate([_as_ids(part) for part in parts])
        return drawn if self._restore is None else drawn[self._restore]


def log_softmax(logits: mx.array) -> mx.array:
    """[N, V] in nats, in single precision."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def likeliest(values: mx.array, count: int) -> mx.array:
    """[N, count] ids of the largest of values [N, V], the first of equal ones first. Few need no sort of all: they
    stand in as many blocks, those whose maxima are largest."""
    size = values.shape[-1]
    num_blocks = -(-size // BLOCK)
    if count * 4 >= num_blocks:
        return mx.argsort(-values, axis=-1)[:, :count]
    padding = num_blocks * BLOCK - size
    blocks = mx.pad(values, [(0, 0), (0, padding)], constant_values=-mx.inf).reshape(-1, num_blocks, BLOCK)
    best = mx.sort(mx.argsort(-blocks.max(axis=-1), axis=-1)[:, :count], axis=-1)  # [N, count]
    inside = mx.take_along_axis(blocks, best[:, :, None], axis=1).reshape(len(values), -1)
    at = mx.argsort(-inside, axis=-1)[:, :count]
    return mx.take_along_axis(best, at // BLOCK, axis=-1) * BLOCK + at % BLOCK


def _groups(rows: Sequence[Sampling]) -> list[_Group]:
    """Random rows, by how they go."""
    ways: dict[tuple[bool, bool, bool], list[int]] = {}
    for index, row in enumerate(rows):
        if row.temperature > 0:
            ways.setdefault((is_filtered(row), needs_order(row), has_candidates(row)), []).append(index)
    groups = []
    for (has_filters, _, has_few), indices in sorted(ways.items()):
        inside = [rows[index] for index in indices]
        temperatures = [min(max(row.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE) for row in inside]
        groups.append(
            _Group(
                None if len(indices) == len(rows) else mx.array(indices),
                tuple(indices),
                mx.array(temperatures, dtype=mx.float32)[:, None],
                Filters(inside) if has_filters else None,
                has_few,
            )
        )
    return groups


def _kept(group: _Group, logits: mx.array, for_xtc: mx.array | None) -> tuple[mx.array | None, mx.array]:
    """Candidates [M, N] in the order of the vocabulary, or None for all of it; what each may weigh, [M, N or V]."""
    scaled = logits.astype(mx.float32) / group.temperature
    if group.filters is None:
        return None, mx.softmax(scaled, axis=-1)
    scaled = group.filters.cut(scaled)
    ids = None
    if group.has_candidates and scaled.shape[-1] > MAX_CANDIDATES:
        # As many for every row, whatever its top_k: what a row draws is not to hang on its company.
        ids = mx.sort(mx.argpartition(-scaled, MAX_CANDIDATES - 1, axis=-1)[:, :MAX_CANDIDATES], axis=-1)
        scaled = mx.take_along_axis(scaled, ids, axis=-1)
    probs = mx.softmax(scaled, axis=-1)
    return ids, group.filters.keep(probs, for_xtc if group.filters.has_xtc else None, ids)


def _as_ids(part: mx.array) -> mx.array:
    return part.astype(mx.uint32) if part.ndim == 1 else part


def _keys(seeds: np.ndarray, counters: Sequence[int]) -> np.ndarray:
    """[B] uint64: the keys of the k-th draws of these (mixed) seeds, different for different pairs."""
    return _mixed(seeds + np.asarray(counters, dtype=np.uint64) * _GOLDEN)


def _halves(keys: np.ndarray) -> mx.array:
    """[B, 2] uint32, as MLX takes keys."""
    return mx.array(keys.view(np.uint32).reshape(-1, 2))


def _mixed(values: np.ndarray) -> np.ndarray:
    """A one-to-one scrambling of 64 bits, SplitMix64's: Steele, Lea and Flood 2014, `mix64`."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
