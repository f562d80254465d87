"""One arm's mean at every look, the verdict, and the split of units."""

from math import exp

import numpy as np
import pytest
from scipy.special import betaln

from serve.errors import LatheError
from serve.experiments.statistics import (
    Interval,
    confidence_sequence,
    log_evidence,
    sample_ratio_p_value,
    verdict,
)

ALPHA = 0.05


def ever_left_out(draws: np.ndarray, p: float, alpha: float) -> np.ndarray:
    """[runs, looks] values in [0, 1] → [runs] bool: some look's set did not hold p. Vectorised over all looks."""
    n = np.arange(1, draws.shape[1] + 1)
    total = draws.cumsum(axis=1)
    evidence = betaln(0.5 + total, 0.5 + n - total) - betaln(0.5, 0.5)
    evidence -= total * np.log(p) + (n - total) * np.log1p(-p)
    return (evidence > np.log(1 / alpha)).any(axis=1)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.85])
def test_peeking_after_every_one_of_2000_observations_is_wrong_at_most_alpha_of_the_time(p):
    rng = np.random.default_rng(7)
    draws = (rng.random((1000, 2000)) < p).astype(float)
    wrong = ever_left_out(draws, p, ALPHA).mean()
    assert wrong <= ALPHA
    # A fixed-sample 95 % interval looked at as often is wrong far more: the test can tell.
    n = np.arange(1, 2001)
    mean = draws.cumsum(axis=1) / n
    wald = np.abs(mean - p) > 1.96 * np.sqrt(p * (1 - p) / n)
    assert wald[:, 30:].any(axis=1).mean() > 3 * ALPHA


def test_values_between_0_and_1_are_covered_too():
    rng = np.random.default_rng(8)
    draws = rng.beta(0.6, 1.4, size=(600, 1500))
    assert ever_left_out(draws, 0.3, ALPHA).mean() <= ALPHA


def test_the_vectorised_law_above_is_the_one_that_reports_use():
    rng = np.random.default_rng(9)
    draws = rng.random((40, 60)).round(2)
    for row in draws:
        held = [0.5 in confidence_sequence(row[:n].sum(), n, 0.3) for n in range(1, 61)]
        assert ever_left_out(row[None], 0.5, 0.3)[0] == (not all(held))


def test_an_interval_that_leaves_out_zero_is_a_verdict():
    assert verdict(Interval(0.01, 0.2)) == "better"
    assert verdict(Interval(-0.2, -0.01)) == "worse"
    assert verdict(Interval(-0.2, 0.01)) == verdict(Interval(0.0, 0.1)) == "undecided"


@pytest.mark.parametrize(
    ("total", "count"),
    [(0, 1), (1, 1), (0, 9), (9, 9), (3, 9), (0.3, 1), (1e-9, 5), (4.999999999, 5), (5e5, 10**6)],
)
def test_the_interval_is_exactly_the_set_that_the_evidence_does_not_refuse(total, count):
    found = confidence_sequence(total, count, ALPHA)
    assert total / count in found
    for edge in (found.low, found.high):
        if 0 < edge < 1:
            assert exp(log_evidence(edge, total, count)) == pytest.approx(1 / ALPHA, rel=1e-3)


def test_nothing_seen_is_nothing_known_and_more_data_is_narrower():
    assert confidence_sequence(0, 0, ALPHA) == Interval(0.0, 1.0)
    widths = [(lambda i: i.high - i.low)(confidence_sequence(0.4 * n, n, ALPHA)) for n in (10, 100, 1000)]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize(("total", "count", "alpha"), [(3, 2, 0.05), (-1, 2, 0.05), (1, 2, 0.0), (1, 2, 1.0)])
def test_impossible_input_is_refused(total, count, alpha):
    with pytest.raises(LatheError):
        confidence_sequence(total, count, alpha)


def test_a_broken_split_is_seen_and_a_fair_one_is_not():
    assert sample_ratio_p_value([500, 620], [0.5, 0.5]) < 0.001
    assert sample_ratio_p_value([251, 749], [0.25, 0.75]) > 0.1
    assert sample_ratio_p_value([1, 3], [0.5, 0.5]) is None
