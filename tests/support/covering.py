"""Covering arrays: few cases in which every few values of different dimensions come together.

A case is one value's number of each dimension. Greedy, after Cohen, Dalal, Fredman and Patton 1997 (AETG): of some
random cases, each around a combination that is still missing, always the one with most that are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import gcd, prod

import numpy as np

NUM_CANDIDATES = 60


def covering(sizes: Sequence[int], strength: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Cases with every combination of `strength` values. sizes: how many values each dimension has."""
    rng, dimensions = np.random.default_rng(seed), np.array(sizes)
    chosen = np.array(list(combinations(range(len(sizes)), strength)))  # [C, strength]
    radix = np.cumprod(np.insert(dimensions[chosen[:, :0:-1]], 0, 1, axis=1), axis=1)[:, ::-1]
    counts = dimensions[chosen].prod(axis=1)
    starts = np.cumsum(counts) - counts
    is_missing, cases = np.ones(counts.sum(), bool), []
    while is_missing.any():
        seeds = rng.choice(np.flatnonzero(is_missing), NUM_CANDIDATES)
        of = np.searchsorted(starts, seeds, side="right") - 1
        values = (seeds - starts[of])[:, None] // radix[of] % dimensions[chosen[of]]
        candidates = rng.integers(dimensions, size=(NUM_CANDIDATES, len(sizes)))
        np.put_along_axis(candidates, chosen[of], values, axis=1)
        held = starts + (candidates[:, chosen] * radix).sum(axis=2)  # [candidates, C]
        best = is_missing[held].sum(axis=1).argmax()
        is_missing[held[best]] = False
        cases.append(tuple(candidates[best].tolist()))
    return cases


def numbered(sizes: Sequence[int], number: int) -> tuple[int, ...]:
    """Case `number` of the full product, which is in an order that mixes all dimensions; each comes once."""
    size = prod(sizes)
    stride = next(step for step in range(int(size * 0.618), size + 2) if gcd(step, size) == 1)
    left, case = number * stride % size, []
    for count in sizes:
        left, value = divmod(left, count)
        case.append(value)
    return tuple(case)
