"""The difference of two arms' means in [0, 1], tested itself, at every look. Outcomes in, an interval out.

The test is the growth-rate-optimal e-variable for two proportions (Turner, Ly, Grünwald 2024, "Generic E-variables
for exact sequential k-sample tests that allow for optional stopping"), and the interval is every difference that it
does not refuse (Turner, Grünwald 2023, "Exact anytime-valid confidence intervals for contingency tables and
beyond"), both carried over to outcomes that are fractions. `log_evidence` has the formula and why it holds.

A block is one outcome of the arm with the smaller weight, and as many of the other as the weights say, each arm's in
the order in which they came. A block waits for its last outcome; outcomes beyond the last whole block wait too. What
it rests on: which outcome comes next, and when, does not depend on how it turned out.

No maintained package does this: safestats is for R, and its port to Python knows one fixed alternative and no
difference but 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq

from serve.errors import RequestError
from serve.experiments.statistics import Interval

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

BETS = 0.9 * 1.5 ** -np.arange(15.0)
"""From 0.9, which finds 0.1 against 0.9 in a few blocks, to 0.003, for differences that take a million."""
BET_SCALE = 0.3
"""Of the half-Cauchy prior over bets: shifts of the log-odds by less are about equally likely."""
_MASSES = BETS / (
    1 + (BETS / BET_SCALE) ** 2
)  # BETS stand at equal ratios: a density times the bet is a mass.
WEIGHTS = _MASSES / _MASSES.sum()
PRECISION = 1e-6


@dataclass(frozen=True)
class Blocks:
    """How two arms' outcomes, each in order of arrival, are cut into J blocks.

    control_ends, treatment_ends  [J] outcomes up to and with each block; nowhere two blocks end at one outcome
    treatment_share               of all outcomes, as the weights say
    """

    control_ends: Integers
    treatment_ends: Integers
    treatment_share: float

    def swapped(self) -> Blocks:
        """The same blocks with the arms' parts exchanged."""
        return Blocks(self.treatment_ends, self.control_ends, 1 - self.treatment_share)


def cut(num_control: int, num_treatment: int, ratio: float = 1.0) -> Blocks:
    """As many whole blocks as so many outcomes make.

    ratio  the treatment's weight over the control's; a part of an outcome is carried to the next block, so 1.5
           gives 1, 2, 1, 2, … outcomes of the treatment beside one of the control
    """
    more = max(ratio, 1 / ratio)
    fewer_count, more_count = (num_control, num_treatment) if ratio >= 1 else (num_treatment, num_control)
    ones = np.arange(1, min(fewer_count, int(more_count / more) + 1) + 1)
    ends = np.floor(ones * more)
    whole = ends <= more_count
    ones, ends = ones[whole], ends[whole].astype(np.int64)
    share = ratio / (1 + ratio)
    return Blocks(ones, ends, share) if ratio >= 1 else Blocks(ends, ones, share)


def log_evidence(control: Floats, treatment: Floats, difference: float, blocks: Blocks) -> Floats:
    """[..., J] log of the evidence after each block that treatment - control is above `difference`.

    control, treatment  [..., N], [..., M] outcomes in order of arrival; leading axes are separate experiments

    For the null "treatment - control <= d", a centre (c, c + d) and a bet b in [0, 1], the evidence of a block of
    n outcomes y of the control and m outcomes z of the treatment is

        F = prod (1 - b/n (y - c)) * prod (1 + b/m (z - c - d)).

    It is theirs: for outcomes 0 and 1, F is the likelihood ratio of the alternative (c - b/n c(1-c),
    c+d + b/m (c+d)(1-c-d)) to (c, c + d). There, along the line of the null, the alternative's divergence
    n KL + m KL has the derivative n b/n - m b/m = 0, so (c, c + d) is its projection on the null, as optimal growth
    asks; for d = 0 it is the alternative's weighted mean, as in the first paper. b/n and b/m are nearly the shifts of
    the log-odds.

    It is valid: F is linear in every outcome, so for independent outcomes of means p and q its expectation is
    (1 - b/n (p-c))^n (1 + b/m (q-c-d))^m <= exp(b (q-p-d)), which is at most 1 wherever q - p <= d. Nothing else
    about the outcomes is used: they may be fractions, and both arms may drift together. With centres and bets from
    earlier blocks alone, the product over blocks, and a fixed mixture of products over bets, is a supermartingale
    under the null. It ever reaches 1/alpha with probability at most alpha (Ville), whenever one looks.

    It falls as d grows, whatever was seen: a larger d has no larger c and no smaller c + d (`_distances`). So what
    is refused lies below one bound, and the interval is exact.
    """
    total = np.full((*control.shape[:-1], len(blocks.control_ends)), -np.inf)
    if not total.size:
        return total
    against = _distances(control, treatment, difference, blocks)
    for bet, weight in zip(BETS, WEIGHTS, strict=True):
        logs = [np.log1p(bet * each).cumsum(axis=-1) for each in against]
        wealth = logs[0][..., blocks.control_ends - 1] + logs[1][..., blocks.treatment_ends - 1]
        np.logaddexp(total, log(weight) + wealth, out=total)
    return total


def difference_interval(
    control: Floats, treatment: Floats, alpha: float, ratio: float = 1.0, *, precision: float = PRECISION
) -> Interval:
    """Every treatment - control that the outcomes so far do not refuse at level `alpha`: over all looks together,
    the true difference of means is ever left out with probability at most `alpha`.

    control, treatment  [N], [M] outcomes in [0, 1], each in order of arrival
    ratio               the treatment's weight over the control's
    Raises RequestError for an alpha, a ratio or outcomes outside their range.
    """
    if not 0 < alpha < 1:
        raise RequestError(f"alpha: found {alpha}; expected a number between 0 and 1", param="alpha")
    if not 0 < ratio < np.inf:
        raise RequestError(f"ratio: found {ratio}; expected a positive number", param="ratio")
    for outcomes in (control, treatment):
        if outcomes.size and not (outcomes.min() >= 0 and outcomes.max() <= 1):
            raise RequestError(f"outcomes: found {outcomes.min()} to {outcomes.max()}; expected 0 to 1")
    blocks = cut(len(control), len(treatment), ratio)
    low = _lower_bound(control, treatment, alpha / 2, blocks, precision)
    high = -_lower_bound(treatment, control, alpha / 2, blocks.swapped(), precision)
    return Interval(low, high)


def _lower_bound(control: Floats, treatment: Floats, alpha: float, blocks: Blocks, precision: float) -> float:
    """The least difference that is not refused; never above it."""

    def excess(difference: float) -> float:
        return _log_evidence_now(control, treatment, difference, blocks) + log(alpha)

    # At 1 no factor is above 1, so there is a root wherever -1 is refused.
    if not len(blocks.control_ends) or excess(-1.0) <= 0:
        return -1.0
    return max(-1.0, float(brentq(excess, -1.0, 1.0, xtol=precision)) - 2 * precision)


def _log_evidence_now(control: Floats, treatment: Floats, difference: float, blocks: Blocks) -> float:
    """The last of `log_evidence`, without the others."""
    against = _distances(control, treatment, difference, blocks)
    wealth = [sum(float(np.log1p(bet * each).sum()) for each in against) for bet in BETS]
    return float(np.logaddexp.reduce(np.log(WEIGHTS) + wealth))


def _distances(
    control: Floats, treatment: Floats, difference: float, blocks: Blocks
) -> tuple[Floats, Floats]:
    """[..., N'], [..., M'] what each outcome in a block is multiplied with: 1 + bet · distance is its factor.

    Before each block both means are estimated from the blocks before it, and moved by their shares until they
    differ by `difference`: for 0 that is the pooled mean.
    """
    control_mean = _means_before(control, blocks.control_ends)  # [..., J]
    treatment_mean = _means_before(treatment, blocks.treatment_ends)
    moved = control_mean + blocks.treatment_share * (treatment_mean - control_mean - difference)
    centre = np.clip(moved, max(0.0, -difference), min(1.0, 1 - difference))
    return (
        -_over_size(control, centre, blocks.control_ends),
        _over_size(treatment, centre + difference, blocks.treatment_ends),
    )


def _means_before(outcomes: Floats, ends: Integers) -> Floats:
    """[..., J] the mean of the outcomes before each block, and of two halves."""
    starts = np.concatenate(([0], ends[:-1]))
    total = np.concatenate((np.zeros((*outcomes.shape[:-1], 1)), outcomes.cumsum(axis=-1)), axis=-1)
    return (0.5 + total[..., starts]) / (1 + starts)


def _over_size(outcomes: Floats, centre: Floats, ends: Integers) -> Floats:
    """[..., ends[-1]] (outcome - its block's centre) / its block's size."""
    sizes = np.diff(ends, prepend=0)
    block = np.repeat(np.arange(len(ends)), sizes)
    return (outcomes[..., : ends[-1]] - centre[..., block]) / sizes[block]
