"""Assignment: sticky, independent between salts, in the configured shares."""

from collections import Counter

import pytest

from serve.experiments.assignment import Experiment, Variant, assign, position

UNITS = [f"user-{i}" for i in range(4000)]


def experiment(*weights: float, salt: str = "s") -> Experiment:
    return Experiment("e", salt, tuple(Variant(f"v{i}", f"m{i}", w) for i, w in enumerate(weights)))


def test_a_unit_keeps_its_variant_and_position_is_a_published_function_of_salt_and_unit():
    arms = experiment(1, 1)
    assert [assign(arms, unit) for unit in UNITS] == [assign(experiment(1, 1), unit) for unit in UNITS]
    # Fixed for ever: a replica of another version must agree.
    assert position("tickets", "alice") == pytest.approx(0.9892149989838694, abs=1e-15)


def test_units_arrive_in_the_configured_shares():
    found = Counter(assign(experiment(1, 3), unit).name for unit in UNITS)
    assert found["v1"] / len(UNITS) == pytest.approx(0.75, abs=0.03)


def test_another_salt_is_another_independent_split():
    first = [assign(experiment(1, 1, salt="a"), unit).name for unit in UNITS]
    second = [assign(experiment(1, 1, salt="b"), unit).name for unit in UNITS]
    agree = sum(a == b for a, b in zip(first, second, strict=True))
    assert agree / len(UNITS) == pytest.approx(0.5, abs=0.04)


def test_salt_and_unit_do_not_run_into_each_other():
    assert position("a", "b:c") != position("a:b", "c")


def test_moving_weight_moves_only_the_units_it_must():
    before = [assign(experiment(50, 50), unit).name for unit in UNITS]
    after = [assign(experiment(60, 40), unit).name for unit in UNITS]
    moved = Counter((a, b) for a, b in zip(before, after, strict=True) if a != b)
    assert set(moved) == {("v1", "v0")}
    assert moved["v1", "v0"] / len(UNITS) == pytest.approx(0.1, abs=0.02)
