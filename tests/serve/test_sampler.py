"""The sampler against the distributions it claims, and its independence of company."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from serve.engine.request import Sampling
from serve.engine.sampler import Sampler

V = 50
NUM_DRAWS = 4000


def draw_many(logits: mx.array, settings: Sampling, num_draws: int = NUM_DRAWS) -> np.ndarray:
    """Draws for seeds 0 … n-1, as rows of one batch."""
    rows = [Sampling(**{**settings.__dict__, "seed": seed}) for seed in range(num_draws)]
    batch = mx.broadcast_to(logits[None], (num_draws, logits.size))
    return np.asarray(Sampler(rows).tokens(batch, [3] * num_draws))


def reference(logits: mx.array, settings: Sampling) -> np.ndarray:
    """The filtered distribution, in numpy: temperature, then top_k, top_p, min_p."""
    scaled = np.asarray(logits, dtype=np.float64) / settings.temperature
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    kept = np.zeros(V, dtype=bool)
    kept[order[: settings.top_k or V]] = True
    ranked = np.where(kept, probs, 0)[order]
    kept[order[(np.cumsum(ranked) - ranked) >= settings.top_p * ranked.sum()]] = False
    kept &= probs >= settings.min_p * probs.max()
    return np.where(kept, probs, 0) / probs[kept].sum()


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(1),
        Sampling(1, temperature=0.6),
        Sampling(1, top_k=5),
        Sampling(1, top_p=0.7),
        Sampling(1, min_p=0.2),
        Sampling(1, temperature=1.4, top_k=20, top_p=0.8, min_p=0.02),
    ],
)
def test_draws_follow_the_filtered_distribution_and_never_leave_it(settings):
    mx.random.seed(1)
    logits = mx.random.normal((V,)) * 2
    expected = reference(logits, settings)
    drawn = draw_many(logits, settings)
    assert set(drawn) <= set(np.flatnonzero(expected))
    found = np.bincount(drawn, minlength=V) / NUM_DRAWS
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / NUM_DRAWS)


def test_a_row_draws_the_same_alone_and_among_rows_of_every_kind():
    mx.random.seed(2)
    kinds = [Sampling(1, temperature=0), Sampling(1), Sampling(1, top_p=0.5), Sampling(1, top_k=3, min_p=0.1)]
    rows = [Sampling(**{**kinds[i % 4].__dict__, "seed": i}) for i in range(13)]
    logits = mx.random.normal((13, V)) * 3
    counters = list(range(13))
    together = Sampler(rows).tokens(logits, counters).tolist()
    alone = [Sampler([row]).tokens(logits[i : i + 1], [counters[i]]).item() for i, row in enumerate(rows)]
    assert together == alone
    shuffled = np.random.default_rng(0).permutation(13)
    again = Sampler([rows[i] for i in shuffled]).tokens(
        logits[mx.array(shuffled)], [counters[i] for i in shuffled]
    )
    assert again.tolist() == [together[i] for i in shuffled]


def test_every_position_and_all_64_bits_of_a_seed_give_other_draws():
    logits = mx.zeros((1, V))
    by_position = [Sampler([Sampling(1, seed=5)]).tokens(logits, [k]).item() for k in range(40)]
    by_high_bits = [Sampler([Sampling(1, seed=k << 40)]).tokens(logits, [0]).item() for k in range(40)]
    assert len(set(by_position)) > 15
    assert len(set(by_high_bits)) > 15
