"""Likeliest tokens or draws: whichever come true more often are guessed."""

from __future__ import annotations

import random

import pytest

from serve.draft.kinds import GuessKinds

GROUP = ("", 1.0)


def hear(kinds: GuessKinds, drawn: float, likeliest: float, count: int, rng: random.Random) -> int:
    """Guesses of which these shares are right. Returns how often the likeliest was guessed."""
    chosen = 0
    for _ in range(count):
        chosen += kinds.is_likeliest(GROUP)
        kinds.note(GROUP, int(rng.random() < drawn), int(rng.random() < likeliest), 1)
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_the_kind_that_comes_true_more_often_is_guessed_and_is_left_when_it_does_not(seed):
    kinds, rng = GuessKinds("learned"), random.Random(seed)
    assert hear(kinds, 0.2, 0.8, 400, rng) > 380
    assert hear(kinds, 0.8, 0.2, 400, rng) < 150
    assert hear(kinds, 0.9, 0.5, 400, rng) == 0


def test_groups_learn_by_themselves_and_what_is_set_is_kept():
    kinds, rng = GuessKinds("learned"), random.Random(0)
    hear(kinds, 0.1, 0.9, 50, rng)
    assert kinds.is_likeliest(GROUP)
    assert not kinds.is_likeliest(("an adapter", 1.0))
    assert not kinds.is_likeliest(("", 0.5))
    for kind in ("drawn", "likeliest"):
        kinds = GuessKinds(kind)
        hear(kinds, 0.1, 0.9, 50, rng)
        hear(kinds, 0.9, 0.1, 200, rng)
        assert kinds.is_likeliest(GROUP) == (kind == "likeliest")
