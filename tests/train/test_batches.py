"""Laws of batches: true lengths, every row once an epoch, any batch at any time, nothing global."""

from __future__ import annotations

import numpy as np
import pytest

from train.data.batches import BatchPlan, collate, validation_rows
from train.data.tokens import TokenizedExample


def lognormal(count: int, spread: float = 0.8, seed: int = 0) -> list[int]:
    drawn = np.exp(np.random.default_rng(seed).normal(5, spread, count))
    return np.clip(drawn, 4, 2048).astype(int).tolist()


def row(length: int, num_targets: int) -> TokenizedExample:
    is_target = np.zeros(length, bool)
    is_target[length - num_targets :] = True
    return TokenizedExample(np.arange(1, length + 1, dtype=np.int32), is_target, "f", 1)


@pytest.mark.parametrize("batch_size", [4, 8, 16])
@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_padding_is_small_because_batches_go_by_true_length(batch_size, spread):
    lengths = lognormal(4000, spread)
    plan = BatchPlan(lengths, batch_size, seed=0)
    assert plan.padding_share < 0.07
    rows = [row(length, 1) for length in lengths]
    batches = [collate(rows, plan.rows(index)) for index in range(plan.batches_per_epoch)]
    measured = 1 - sum(b.num_tokens for b in batches) / sum(b.tokens.size for b in batches)
    assert measured == pytest.approx(plan.padding_share)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 3000])
def test_each_row_stands_in_each_epoch_exactly_once(count):
    plan = BatchPlan(lognormal(count), 8, seed=3)
    size = plan.batches_per_epoch
    for epoch in range(3):
        seen = [r for index in range(epoch * size, (epoch + 1) * size) for r in plan.rows(index)]
        assert sorted(seen) == list(range(count))
        assert {plan.epoch(index) for index in range(epoch * size, (epoch + 1) * size)} == {epoch}


def test_any_batch_can_be_asked_for_at_any_time():
    lengths = lognormal(500)
    plan = BatchPlan(lengths, 8, seed=1)
    forward = [plan.rows(index) for index in range(150)]
    fresh = BatchPlan(lengths, 8, seed=1)
    assert [fresh.rows(index) for index in reversed(range(150))] == forward[::-1]


def test_seed_and_epoch_change_the_order():
    lengths = lognormal(500)
    plan, other = BatchPlan(lengths, 8, seed=1), BatchPlan(lengths, 8, seed=2)
    size = plan.batches_per_epoch
    first = [plan.rows(index) for index in range(size)]
    assert first != [plan.rows(index) for index in range(size, 2 * size)]
    assert first != [other.rows(index) for index in range(size)]


def test_batches_do_not_come_in_order_of_length():
    lengths = lognormal(2000)
    plan = BatchPlan(lengths, 8, seed=0)
    means = [np.mean([lengths[r] for r in plan.rows(index)]) for index in range(plan.batches_per_epoch)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_neither_planning_nor_validating_touches_the_global_generator_or_the_order():
    lengths = lognormal(300)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    plan = BatchPlan(lengths, 8, seed=1)
    undisturbed = [plan.rows(index) for index in range(40)]
    disturbed = []
    for index in range(40):
        validation_rows(lengths, 8, 3)
        disturbed.append(plan.rows(index))
    assert disturbed == undisturbed
    assert (np.random.get_state()[1] == before).all()


def test_a_collated_batch_holds_its_rows_and_counts_them():
    rows = [row(5, 2), row(12, 3), row(9, 1)]
    batch = collate(rows, (2, 0, 1))
    assert batch.tokens.shape == batch.is_target.shape == (3, 17)  # a forward reads 16
    assert batch.tokens.dtype == np.int32
    assert (batch.num_tokens, batch.num_targets, batch.row_ids) == (26, 6, (2, 0, 1))
    for place, r in enumerate((2, 0, 1)):
        length = len(rows[r])
        assert batch.tokens[place, :length].tolist() == rows[r].token_ids.tolist()
        assert batch.is_target[place, :length].tolist() == rows[r].is_target.tolist()
        assert not batch.tokens[place, length:].any()
        assert not batch.is_target[place, length:].any()


def test_validation_is_the_same_rows_each_time_and_represents_the_lengths():
    lengths = lognormal(2000, 1.0)
    batches = validation_rows(lengths, 8, 25)
    assert batches == validation_rows(lengths, 8, 25)
    chosen = [r for rows in batches for r in rows]
    assert len(chosen) == len(set(chosen)) == 200
    assert np.mean([lengths[r] for r in chosen]) == pytest.approx(np.mean(lengths), rel=0.05)


@pytest.mark.parametrize(("num_batches", "expected"), [(-1, 21), (0, 0), (2, 16), (99, 21)])
def test_validation_takes_as_many_rows_as_asked_and_never_one_twice(num_batches, expected):
    chosen = [r for rows in validation_rows(lognormal(21), 8, num_batches) for r in rows]
    assert len(chosen) == len(set(chosen)) == expected
