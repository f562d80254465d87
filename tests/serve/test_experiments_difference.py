"""The test of a difference: valid under peeking, as a law and by simulation, and as quick as it was meant to be."""

from __future__ import annotations

from itertools import product
from math import log

import numpy as np
import pytest

from serve.errors import RequestError
from serve.experiments.difference import BETS, WEIGHTS, cut, difference_interval, log_evidence

ALPHA = 0.05
FIXED_N = 353
"""Users an arm with which one look finds 0.6 against 0.7 with power 0.8 at level 0.05."""


def outcomes_of(
    rng: np.random.Generator, mean: float, shape: tuple[int, int], kind: str = "0 or 1"
) -> np.ndarray:
    """Independent values in [0, 1] of one mean: 0 and 1, Beta, or thirds."""
    if kind == "0 or 1":
        return (rng.random(shape) < mean).astype(float)
    if kind == "beta":
        return rng.beta(2 * mean, 2 * (1 - mean), shape)
    return rng.binomial(3, mean, shape) / 3


def refused(control: np.ndarray, treatment: np.ndarray, difference: float, ratio: float = 1.0) -> np.ndarray:
    """[experiments, J] bool: the interval after this block does not hold `difference`. Falling evidence makes the
    two one thing, which test_the_interval_is_what_the_evidence_does_not_refuse checks."""
    blocks = cut(control.shape[-1], treatment.shape[-1], ratio)
    above = log_evidence(control, treatment, difference, blocks)
    below = log_evidence(treatment, control, -difference, blocks.swapped())
    return np.maximum(above, below) >= log(2 / ALPHA)


def simulate(
    num_experiments: int, num_units: int, means: tuple[float, float], difference: float, seed: int, **options
) -> np.ndarray:
    """[experiments, J] looks after every block, a few experiments at a time. options: ratio, kind."""
    ratio = options.get("ratio", 1.0)
    kind = options.get("kind", "0 or 1")
    rng = np.random.default_rng(seed)
    sizes = [round(num_units * min(1, 1 / ratio)), round(num_units * min(1, ratio))]
    looks = []
    for start in range(0, num_experiments, 100):
        count = min(100, num_experiments - start)
        arms = [outcomes_of(rng, m, (count, n), kind) for m, n in zip(means, sizes, strict=True)]
        looks.append(refused(*arms, difference, ratio))
    return np.concatenate(looks)


def median_stop(looks: np.ndarray) -> float:
    """Of the block at which an experiment is decided; those that never are count as infinitely long."""
    return float(np.median(np.where(looks.any(axis=1), looks.argmax(axis=1) + 1.0, np.inf)))


# What holds exactly.


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Some outcomes of each arm, a ratio of weights, and a difference."""
    ratio = float(rng.choice([1, 2, 3, 1.5, 0.7, 1 / 3]))
    sizes = rng.integers(4, 40, 2)
    kind = rng.choice(["0 or 1", "beta", "thirds"])
    control, treatment = (
        outcomes_of(rng, m, (1, n), kind)[0] for m, n in zip(rng.random(2), sizes, strict=True)
    )
    return control, treatment, ratio, float(rng.uniform(-1, 1))


@pytest.mark.parametrize("seed", range(40))
def test_under_no_null_point_does_a_block_raise_the_evidence_in_expectation(seed):
    rng = np.random.default_rng(seed)
    control, treatment, ratio, difference = random_case(rng)
    blocks = cut(len(control), len(treatment), ratio)
    starts = [ends[-2] if len(ends) > 1 else 0 for ends in (blocks.control_ends, blocks.treatment_ends)]
    n, m = blocks.control_ends[-1] - starts[0], blocks.treatment_ends[-1] - starts[1]
    # The past as it was, then every way in which the last block may turn out.
    last = np.array(list(product((0.0, 1.0), repeat=int(n + m))))  # [2^(n+m), n+m]
    known = [
        np.tile(arm[:start], (len(last), 1)) for arm, start in zip((control, treatment), starts, strict=True)
    ]
    whole = np.hstack((known[0], last[:, :n])), np.hstack((known[1], last[:, n:]))
    evidence = log_evidence(*whole, difference, blocks)
    before = evidence[:, -2] if evidence.shape[1] > 1 else np.zeros(len(last))
    factor = np.exp(evidence[:, -1] - before)
    grid = np.linspace(0, 1, 101)
    pairs = [(p, p + difference) for p in grid if 0 <= p + difference <= 1]  # on the line
    pairs += [(p, q) for p in grid[::5] for q in grid[::5] if q - p <= difference]  # and all below it
    assert len(pairs) > 10 or difference < -0.8
    for p, q in pairs:
        chances = np.where(last[:, :n] > 0, p, 1 - p).prod(axis=1)
        chances = chances * np.where(last[:, n:] > 0, q, 1 - q).prod(axis=1)
        assert chances @ factor <= 1 + 1e-9


def test_against_equal_means_it_is_the_likelihood_ratio_to_the_alternatives_weighted_mean():
    # Turner, Ly, Grünwald: prod p_alt(y) / prod p_null(y), the null at (n a + m b) / (n + m). The first block of
    # 1 and 3 outcomes has its centre at 1/2.
    blocks = cut(1, 3, 3.0)
    outcomes = np.array(list(product((0.0, 1.0), repeat=4)))
    found = log_evidence(outcomes[:, :1], outcomes[:, 1:], 0.0, blocks)[:, 0]
    expected = np.zeros(len(outcomes))
    for bet, weight in zip(BETS, WEIGHTS, strict=True):
        a, b = 0.5 - bet * 0.25, 0.5 + bet / 3 * 0.25
        null = (a + 3 * b) / 4
        likelihood = np.where(outcomes > 0, [a, b, b, b], [1 - a, 1 - b, 1 - b, 1 - b]).prod(axis=1)
        expected += weight * likelihood / np.where(outcomes > 0, null, 1 - null).prod(axis=1)
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_evidence_falls_as_the_difference_grows_after_every_block(seed):
    control, treatment, ratio, _ = random_case(np.random.default_rng(seed))
    blocks = cut(len(control), len(treatment), ratio)
    grid = np.linspace(-1, 1, 201)
    evidence = np.array([log_evidence(control, treatment, d, blocks) for d in grid])
    assert (np.diff(evidence, axis=0) <= 1e-9).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_interval_is_what_the_evidence_does_not_refuse(seed):
    rng = np.random.default_rng(seed)
    control, treatment, ratio, _ = random_case(rng)
    found = difference_interval(control, treatment, ALPHA, ratio)
    for difference in np.linspace(-1, 1, 101):
        is_refused = refused(control, treatment, difference, ratio)[-1]
        assert is_refused == (difference not in found)
    assert -1 <= found.low <= found.high <= 1


@pytest.mark.parametrize("seed", range(10))
def test_exchanging_the_arms_turns_the_interval_round(seed):
    control, treatment, ratio, _ = random_case(np.random.default_rng(seed))
    found = difference_interval(control, treatment, ALPHA, ratio)
    turned = difference_interval(treatment, control, ALPHA, 1 / ratio)
    assert (-turned.high, -turned.low) == pytest.approx((found.low, found.high), abs=1e-5)


@pytest.mark.parametrize("seed", range(30))
def test_blocks_use_all_but_less_than_one_block_and_follow_the_weights(seed):
    rng = np.random.default_rng(seed)
    ratio = float(np.exp(rng.uniform(-4, 4)))
    counts = rng.integers(0, 2000, 2)
    blocks = cut(*counts, ratio)
    ends = np.stack((blocks.control_ends, blocks.treatment_ends))
    sizes = np.diff(ends, prepend=0)
    assert (sizes >= 1).all()
    assert (sizes.min(axis=0) == 1).all()
    more = max(ratio, 1 / ratio)
    assert np.isin(sizes.max(axis=0), [np.floor(more), np.ceil(more)]).all()
    assert np.abs(ends[1] - ends[0] * ratio).max(initial=0) <= max(1, ratio)
    waiting = counts - (ends[:, -1] if ends.size else 0)
    assert (waiting >= 0).all()
    needed = [1, int(np.ceil(more))] if ratio >= 1 else [int(np.ceil(more)), 1]
    assert (waiting < needed).any()


def test_what_comes_later_changes_no_earlier_look():
    rng = np.random.default_rng(3)
    control, treatment = outcomes_of(rng, 0.4, (2, 90), "beta")
    whole = log_evidence(control, treatment, 0.1, cut(90, 90, 1.5))
    for n, m in [(1, 1), (10, 90), (33, 40), (60, 89)]:
        blocks = cut(n, m, 1.5)
        part = log_evidence(control[:n], treatment[:m], 0.1, blocks)
        np.testing.assert_allclose(part, whole[: len(part)], rtol=1e-12, atol=1e-12)


def test_nothing_seen_is_nothing_known_and_more_data_is_narrower():
    none = np.array([])
    assert (difference_interval(none, none, ALPHA).low, difference_interval(none, none, ALPHA).high) == (
        -1,
        1,
    )
    assert difference_interval(np.ones(5), none, ALPHA).high == 1
    rng = np.random.default_rng(4)
    arms = outcomes_of(rng, 0.5, (2, 4000))
    widths = [(lambda i: i.high - i.low)(difference_interval(*arms[:, :n], ALPHA)) for n in (20, 200, 4000)]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.1


@pytest.mark.parametrize(
    ("control", "alpha", "ratio", "said"),
    [
        ([0.5, 1.1], 0.05, 1, "1.1"),
        ([-0.1], 0.05, 1, "-0.1"),
        ([np.nan], 0.05, 1, "nan"),
        ([1], 0, 1, "alpha"),
        ([1], 1, 1, "alpha"),
        ([1], 0.05, 0, "ratio"),
        ([1], 0.05, np.inf, "ratio"),
    ],
)
def test_impossible_input_is_refused(control, alpha, ratio, said):
    with pytest.raises(RequestError, match=said):
        difference_interval(np.array(control, dtype=float), np.array([0.5]), alpha, ratio)


# What holds with a probability: a sample always, the claims in full under `-m large`.


def test_a_sample_of_equal_arms_is_rarely_called_different_though_looked_at_after_every_block():
    looks = simulate(300, 500, (0.6, 0.6), 0.0, seed=1)
    assert looks.any(axis=1).mean() <= ALPHA
    # A fixed-sample test looked at as often is wrong far more: the simulation can tell.
    arms = outcomes_of(np.random.default_rng(1), 0.6, (600, 500)).reshape(2, 300, 500)
    n = np.arange(1, 501)
    means = arms.cumsum(axis=2) / n
    spread = np.sqrt((means * (1 - means)).sum(axis=0) / n)
    z = np.abs(means[1] - means[0]) > 1.96 * np.maximum(spread, 1e-9)
    assert z[:, 30:].any(axis=1).mean() > 3 * ALPHA


def test_a_sample_of_true_differences_is_found_about_as_soon_as_with_one_look():
    assert median_stop(simulate(200, 900, (0.6, 0.7), 0.0, seed=2)) <= 1.2 * FIXED_N


@pytest.mark.large
@pytest.mark.parametrize("rate", [0.6, 0.1, 0.01, 0.99])
def test_false_alarms_stay_below_alpha_in_4000_null_experiments_under_continuous_looks(rate):
    looks = simulate(4000, 2000, (rate, rate), 0.0, seed=round(1000 * rate))
    found = looks.any(axis=1).mean()
    print(f"rate {rate}: {found:.2%} false alarms of 4,000 null experiments, 2,000 looks each")
    assert found <= ALPHA


@pytest.mark.large
def test_06_against_07_is_found_with_at_most_a_fifth_more_users_than_one_look_takes():
    looks = simulate(4000, 1500, (0.6, 0.7), 0.0, seed=5)
    median = median_stop(looks)
    print(f"median {median:.0f} users an arm, {median / FIXED_N:.2f} of {FIXED_N}")
    assert median <= 1.2 * FIXED_N


@pytest.mark.large
@pytest.mark.parametrize(
    ("means", "ratio", "kind"),
    [
        ((0.6, 0.7), 1.0, "0 or 1"),
        ((0.02, 0.05), 1.0, "0 or 1"),
        ((0.99, 0.95), 1.0, "0 or 1"),
        ((0.0, 1.0), 1.0, "0 or 1"),
        ((0.5, 0.45), 3.0, "0 or 1"),
        ((0.3, 0.5), 1 / 9, "0 or 1"),
        ((0.4, 0.4), 1.5, "0 or 1"),
        ((0.4, 0.6), 1.0, "beta"),
        ((0.2, 0.2), 2.0, "beta"),
        ((0.7, 0.6), 0.5, "thirds"),
    ],
)
def test_the_true_difference_is_in_the_interval_at_every_look(means, ratio, kind):
    looks = simulate(2000, 2000, means, means[1] - means[0], seed=6, ratio=ratio, kind=kind)
    missed = looks.any(axis=1).mean()
    print(f"{means}, weights 1:{ratio:.3g}, {kind}: left out in {missed:.2%} of 2,000 experiments")
    assert missed <= ALPHA


@pytest.mark.large
def test_units_that_come_in_random_order_with_late_outcomes_are_covered_at_every_arrival():
    rng = np.random.default_rng(8)
    missed = 0
    for _ in range(300):
        arm = rng.random(600) < 0.4
        values = np.where(arm, outcomes_of(rng, 0.55, (1, 600))[0], outcomes_of(rng, 0.4, (1, 600))[0])
        arrival = np.argsort(rng.random(600) + rng.exponential(0.5, 600))
        arm, values = arm[arrival], values[arrival]
        # A look after every arrival sees the same blocks as a look after every block does.
        missed += refused(values[~arm], values[arm], 0.15, 0.4 / 0.6).any()
    assert missed / 300 <= ALPHA
