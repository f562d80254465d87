"""Statements about means in [0, 1] that stay true however often one looks. Numbers in, intervals out.

Per arm: the beta-binomial mixture confidence sequence (Robbins 1970; Howard, Ramdas, McAuliffe, Sekhon 2021).
For observations x_i in [0, 1] with mean p, the weighted AM-GM inequality gives
q^x (1-q)^(1-x) / (p^x (1-p)^(1-x)) <= x q/p + (1-x)(1-q)/(1-p), whose expectation is 1, so the likelihood ratio
mixed over q ~ Beta(a, b) is a supermartingale and, by Ville's inequality, exceeds 1/alpha ever with probability
at most alpha. No normal approximation: it holds from the first observation on.

Two arms are compared in `difference.py`. These lines are ours because gbstats needs numpy < 2 and confseq needs a
compiler at installation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log
from typing import Literal

import numpy as np
from scipy.optimize import brentq
from scipy.special import betaln
from scipy.stats import chisquare

from serve.errors import RequestError

Verdict = Literal["better", "worse", "undecided"]


@dataclass(frozen=True)
class Interval:
    """A closed interval; [0, 1] or [-1, 1] says that nothing is known."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def log_evidence(p: float, total: float, count: int, a: float = 0.5, b: float = 0.5) -> float:
    """Log of the mixture likelihood ratio against "the mean is p", after `count` values that sum to `total`."""
    mixture = float(betaln(a + total, b + count - total) - betaln(a, b))
    return mixture - _xlogy(total, p) - _xlogy(count - total, 1 - p)


def confidence_sequence(total: float, count: int, alpha: float, a: float = 0.5, b: float = 0.5) -> Interval:
    """Every p that the data so far do not refuse at level `alpha`. Over all looks together, the true mean is
    ever left out with probability at most `alpha`. `total` is the sum of `count` values in [0, 1]."""
    if not 0 < alpha < 1:
        raise RequestError(f"alpha: found {alpha}; expected a number between 0 and 1", param="alpha")
    if not 0 <= total <= count:
        raise RequestError(f"outcomes: {count} values sum to {total}; each must lie in [0, 1]")
    if count == 0:
        return Interval(0.0, 1.0)
    mean = total / count

    def excess(p: float) -> float:
        return log_evidence(p, total, count, a, b) - log(1 / alpha)

    # The evidence is convex in p and below the threshold at the mean, so there is one root on each side.
    least, most = 1e-300, 1 - 1e-16
    low = float(brentq(excess, least, mean)) if mean > least and excess(least) > 0 else 0.0
    high = float(brentq(excess, mean, most)) if mean < most and excess(most) > 0 else 1.0
    return Interval(low, high)


def verdict(interval: Interval) -> Verdict:
    """What an interval for a difference says about the treatment."""
    if interval.low > 0:
        return "better"
    return "worse" if interval.high < 0 else "undecided"


def sample_ratio_p_value(counts: Sequence[int], shares: Sequence[float]) -> float | None:
    """Pearson's chi-square test that units arrived in the configured shares; None with fewer than 5 expected."""
    expected = np.asarray(shares, dtype=float) * sum(counts)
    if not len(expected) or expected.min() < 5:
        return None
    return float(chisquare(np.asarray(counts, dtype=float), expected).pvalue)


def _xlogy(x: float, y: float) -> float:
    if x == 0:
        return 0.0
    return x * log(y) if y > 0 else -inf
