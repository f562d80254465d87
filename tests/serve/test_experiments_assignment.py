"""Assignment: sticky, independent between salts, in the configured shares."""

import random
from collections import Counter

import pytest

from serve.experiments.assignment import Experiment, Variant, assign, draw

UNITS = [f"user-{i}" for i in range(4000)]


def experiment(*weights: float, salt: str = "s") -> Experiment:
    return Experiment("e", salt, tuple(Variant(f"v{i}", f"m{i}", w) for i, w in enumerate(weights)))


def test_a_unit_keeps_its_variant_and_a_draw_is_a_published_function_of_salt_unit_and_variant():
    arms = experiment(1, 1)
    assert [assign(arms, unit) for unit in UNITS] == [assign(experiment(1, 1), unit) for unit in UNITS]
    # Fixed for ever: a replica of another version must agree.
    assert draw("tickets", "alice", "tickets-all") == pytest.approx(0.40101676451457785, abs=1e-15)


def test_units_arrive_in_the_configured_shares():
    found = Counter(assign(experiment(1, 3), unit).name for unit in UNITS)
    assert found["v1"] / len(UNITS) == pytest.approx(0.75, abs=0.03)


def test_another_salt_is_another_independent_split():
    first = [assign(experiment(1, 1, salt="a"), unit).name for unit in UNITS]
    second = [assign(experiment(1, 1, salt="b"), unit).name for unit in UNITS]
    agree = sum(a == b for a, b in zip(first, second, strict=True))
    assert agree / len(UNITS) == pytest.approx(0.5, abs=0.04)


def test_salt_unit_and_variant_do_not_run_into_each_other():
    assert draw("a", "b:c", "d") != draw("a:b", "c", "d")
    assert draw("a", "b", "c:d") != draw("a", "b:c", "d")


def moves(before: Experiment, after: Experiment) -> Counter[tuple[str, str]]:
    """How many units go from one variant to another."""
    pairs = ((assign(before, unit).name, assign(after, unit).name) for unit in UNITS)
    return Counter((a, b) for a, b in pairs if a != b)


def test_moving_weight_moves_only_the_units_it_must():
    moved = moves(experiment(50, 50), experiment(60, 40))
    assert set(moved) == {("v1", "v0")}
    assert moved["v1", "v0"] / len(UNITS) == pytest.approx(0.1, abs=0.02)


def test_a_third_arm_moves_a_third_of_the_units_to_itself_and_as_many_from_each():
    moved = moves(experiment(1, 1), experiment(1, 1, 1))
    assert set(moved) == {("v0", "v2"), ("v1", "v2")}
    assert sum(moved.values()) / len(UNITS) == pytest.approx(1 / 3, abs=0.03)
    assert moved["v0", "v2"] == pytest.approx(moved["v1", "v2"], rel=0.15)


@pytest.mark.parametrize("seed", range(40))
def test_no_unit_moves_but_to_an_arm_that_grew_by_more_than_its_own(seed):
    """Over random weights and arms, in any order: arms come, go, and change their weights."""
    rng = random.Random(seed)
    names = [f"v{i}" for i in range(rng.randint(2, 6))]
    before = {name: rng.uniform(0.1, 5) for name in names if rng.random() < 0.8} or {"v0": 1.0}
    after = {
        name: weight * rng.choice([1, 1, 2, 0.3]) for name, weight in before.items() if rng.random() < 0.8
    }
    after |= {name: rng.uniform(0.1, 5) for name in names if name not in before}
    after = after or {"v0": 1.0}
    arms = [tuple(Variant(n, n, w) for n, w in rng.sample(list(a.items()), len(a))) for a in (before, after)]
    old, new = (Experiment("e", f"{seed}", variants) for variants in arms)
    for (source, target), count in moves(old, new).items():
        growth = after.get(source, 0) / before[source], after[target] / before.get(target, 1e-300)
        assert growth[1] > growth[0], (source, target, count)
    # Every arm still has its share, so the rest is all that has to move.
    found = Counter(assign(new, unit).name for unit in UNITS)
    for variant in new.variants:
        assert found[variant.name] / len(UNITS) == pytest.approx(new.share(variant), abs=0.035)


@pytest.mark.parametrize("seed", range(10))
def test_one_arm_that_comes_goes_or_grows_moves_exactly_the_difference_of_its_shares(seed):
    rng = random.Random(seed)
    weights = [rng.uniform(0.2, 3) for _ in range(rng.randint(2, 5))]
    changed = [*weights[:-1], weights[-1] * rng.choice([0.3, 2, 5])]
    for before, after in ((weights, changed), (weights[:-1], weights), (weights, weights[:-1])):
        moved = moves(experiment(*before), experiment(*after))
        last = f"v{len(weights) - 1}"
        share = [w[-1] / sum(w) if len(w) == len(weights) else 0.0 for w in (before, after)]
        assert {last} >= {b if share[1] > share[0] else a for a, b in moved}
        assert sum(moved.values()) / len(UNITS) == pytest.approx(abs(share[1] - share[0]), abs=0.03)


def test_scaling_all_weights_and_listing_arms_in_another_order_moves_nobody():
    assert not moves(experiment(1, 2, 3), experiment(10, 20, 30))
    turned = Experiment("e", "s", experiment(1, 2, 3).variants[::-1])
    assert not moves(experiment(1, 2, 3), turned)
