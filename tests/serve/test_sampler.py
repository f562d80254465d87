"""The sampler against the distributions it claims, and its independence of company."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, apply_xtc
from mlx_vlm.sample_utils import apply_top_n_sigma
from scipy.stats import chisquare

from serve.engine.request import Sampling
from serve.engine.sampler import Sampler, likeliest

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


def by_mlx_lm(logits: mx.array, row: Sampling) -> np.ndarray:
    """What of a row's distribution mlx-lm's and mlx-vlm's filters leave; at temperature 1, where their order with
    temperature makes no difference."""
    logprobs = logits[None] - mx.logsumexp(logits)
    if row.top_n_sigma:
        logprobs = apply_top_n_sigma(logprobs, row.top_n_sigma)
    if row.top_k:
        logprobs = apply_top_k(logprobs, row.top_k)
    logprobs = logprobs - mx.logsumexp(logprobs)
    if row.top_p < 1:
        logprobs = apply_top_p(logprobs, row.top_p)
    if row.min_p:
        logprobs = apply_min_p(logprobs, row.min_p)
    if row.xtc_probability:
        assert row.xtc_probability == 1
        logprobs = apply_xtc(logprobs, 1.0, row.xtc_threshold, list(row.xtc_special_tokens))
    return np.asarray(mx.softmax(logprobs[0]))


def filtered_row(rng: random.Random, size: int) -> Sampling:
    """Every filter, each as often there as not."""
    settings: dict[str, object] = {"seed": rng.getrandbits(60)}
    for name, value in (
        ("top_n_sigma", rng.uniform(0.3, 3)),
        ("top_k", rng.choice([1, 2, 7, size // 2, size - 1])),
        ("top_p", rng.uniform(0.05, 0.99)),
        ("min_p", rng.choice([0.01, 0.2, 1.0])),
    ):
        if rng.random() < 0.5:
            settings[name] = value
    if rng.random() < 0.5:
        settings |= {"xtc_probability": 1.0, "xtc_threshold": rng.choice([0.01, 0.1, 0.3])}
        settings["xtc_special_tokens"] = tuple(rng.sample(range(size), rng.randrange(3)))
    return Sampling(1, **settings)


@pytest.mark.parametrize("size", [9, 50, 3000])
@pytest.mark.parametrize("seed", range(8))
def test_filters_leave_what_mlx_lms_leave_whichever_rows_are_beside(seed, size):
    rng = random.Random(seed)
    mx.random.seed(seed)
    rows = [filtered_row(rng, size) for _ in range(12)] + [Sampling(1), Sampling(1, temperature=0)]
    logits = mx.random.normal((14, size)) * rng.choice([1, 4])
    found = np.asarray(Sampler(rows).probabilities(logits, range(14)))
    for number, row in enumerate(rows[:13]):
        np.testing.assert_allclose(found[number], by_mlx_lm(logits[number], row), rtol=2e-4, atol=1e-6)
    assert found[13].argmax() == np.asarray(logits[13]).argmax()
    assert found[13].sum() == found[13].max() == 1


def test_probabilities_are_those_that_tokens_are_drawn_by():
    mx.random.seed(5)
    logits = mx.random.normal((V,)) * 2
    row = Sampling(1, temperature=1.3, top_k=20, top_p=0.9, min_p=0.02, top_n_sigma=2.5)
    expected = np.asarray(Sampler([row]).probabilities(logits[None], [0]))[0]
    found = np.bincount(draw_many(logits, row), minlength=V) / NUM_DRAWS
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / NUM_DRAWS)


def test_xtc_falls_as_often_as_it_is_asked_to_and_not_with_the_draw():
    logits = mx.log(mx.array([0.5, 0.3, 0.15, 0.05]))
    drawn = draw_many(logits, Sampling(1, xtc_probability=0.3, xtc_threshold=0.1), 20_000)
    # Where it falls, 0.5 and 0.3 are out, and of the rest 0.15 has three quarters.
    kept, cut = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0, 0, 0.75, 0.25])
    counts = np.bincount(drawn, minlength=4)
    assert chisquare(counts, 20_000 * (0.7 * kept + 0.3 * cut)).pvalue > 1e-4
    spared = draw_many(
        logits, Sampling(1, xtc_probability=1.0, xtc_threshold=0.1, xtc_special_tokens=(0,)), 2000
    )
    assert set(spared) == {0, 2, 3}


MARKOV = 8
"""Tokens of a language in which each hangs on the one before."""
FILTERS = (
    {},
    {"temperature": 0.7, "top_p": 0.85},
    {"temperature": 1.4, "top_k": 4, "min_p": 0.1},
    {"top_n_sigma": 1.2},
)


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("num_rows", [1, 4])
def test_three_tokens_in_a_row_have_their_joint_law(filters, num_rows):
    """chi-squared over 20,000 draws; in four rows the others draw by other rules."""
    mx.random.seed(9)
    table = mx.random.normal((MARKOV, MARKOV)) * 1.5
    num_seeds = 20_000
    others = [{"temperature": 0.0}, {"temperature": 2.0}, {"top_k": 2}][: num_rows - 1]
    rows = [
        Sampling(1, seed=seed, **settings) for seed in range(num_seeds) for settings in (filters, *others)
    ]
    sampler = Sampler(rows)
    tokens, joint = mx.zeros(len(rows), dtype=mx.int32), np.zeros(num_seeds, dtype=int)
    for number in range(3):
        tokens = sampler.tokens(table[tokens], [number] * len(rows)).astype(mx.int32)
        joint = joint * MARKOV + np.asarray(tokens)[::num_rows]
    law = np.stack([_law(np.asarray(table[token]), filters) for token in range(MARKOV)])
    expected = (law[0][:, None, None] * law[:, :, None] * law[None]).reshape(-1)
    counts = np.bincount(joint, minlength=MARKOV**3)
    assert not counts[expected == 0].any(), "a token that the filters leave out"
    is_often = expected * num_seeds >= 5
    found = np.append(counts[is_often], counts[~is_often].sum())
    wanted = np.append(expected[is_often], expected[~is_often].sum()) * num_seeds
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    assert chisquare(found, wanted * found.sum() / wanted.sum()).pvalue > 1e-4


def _law(logits: np.ndarray, filters: dict) -> np.ndarray:
    """A row's distribution, in numpy, with no word of the sampler's."""
    scaled = logits.astype(np.float64) / filters.get("temperature", 1.0)
    if "top_n_sigma" in filters:
        scaled = np.where(scaled < scaled.max() - filters["top_n_sigma"] * scaled.std(), -np.inf, scaled)
    probs = np.exp(scaled - scaled.max())
    probs /= probs.sum()
    order = np.argsort(-probs)
    kept = np.zeros(len(probs), dtype=bool)
    kept[order[: filters.get("top_k", len(probs))]] = True
    ranked = np.where(kept, probs, 0)[order]
    kept[order[(np.cumsum(ranked) - ranked) >= filters.get("top_p", 1.0) * ranked.sum()]] = False
    kept &= probs >= filters.get("min_p", 0.0) * probs.max()
    return np.where(kept, probs, 0) / probs[kept].sum()


@pytest.mark.parametrize(("size", "count"), [(5, 3), (259, 20), (20_000, 1), (20_000, 20), (151_936, 20)])
def test_the_likeliest_few_are_those_of_a_whole_sort(size, count):
    mx.random.seed(size)
    values = mx.random.normal((3, size))
    # Rounded to few values, the likeliest of some blocks are equal to those that are second in others.
    for each in (values, mx.round(values), mx.round(values * 0.4), mx.where(values > 1, values, -mx.inf)):
        found, wanted = likeliest(each, count), mx.argsort(-each, axis=-1)[:, :count]
        assert found.tolist() == wanted.tolist()


def test_tokens_that_cannot_come_do_not_widen_top_n_sigma():
    logits = mx.random.normal((1, V), key=mx.random.key(3))
    row = Sampling(1, top_n_sigma=1.0)
    barred = mx.concatenate([logits, mx.full((1, 40), -mx.inf)], axis=1)
    found = np.asarray(Sampler([row]).probabilities(barred, [0]))[0]
    np.testing.assert_allclose(found[:V], by_mlx_lm(logits[0], row), rtol=1e-4, atol=1e-7)
    assert not found[V:].any()
