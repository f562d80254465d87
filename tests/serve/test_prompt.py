"""Prompts: by which keys a prefix knows their tokens, and where what is computed of them may end."""

from __future__ import annotations

import random

import numpy as np
import pytest

from serve.model.prompt import Media, Prompt


def media(key: str, positions) -> Media:
    return Media("image", key, np.asarray(list(positions), np.int32), {}, 1)


def common(left: Prompt, right: Prompt) -> int:
    """Tokens that a prefix of one and of the other has in common."""
    pairs = zip(left.keys, right.keys, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left.keys), len(right.keys)))


def test_text_is_known_by_its_ids():
    assert list(Prompt((5, 6, 2**31)).keys) == [5, 6, 2**31]


def test_another_picture_under_the_same_ids_is_another_text_from_its_first_placeholder_on():
    ids = tuple(range(20))
    first, second = (Prompt(ids, (media("a", range(4, 9)), media(key, range(12, 15)))) for key in "bc")
    assert common(first, second) == 12
    assert common(first, Prompt(ids, (media("a", range(4, 9)), media("b", range(12, 15))))) == 20
    assert common(first, Prompt(ids, (media("a", range(4, 9)),))) == 12, "a placeholder that nothing fills"
    swapped = Prompt(ids, (media("b", range(4, 9)), media("a", range(12, 15))))
    assert common(first, swapped) == 4
    assert all(key < 0 for key in first.keys[4:9])
    assert len({*first.keys}) == 20, "each placeholder has a key of its own"


def test_a_picture_is_the_same_wherever_it_stands_and_however_its_placeholders_are_parted():
    one = Prompt(tuple(range(20)), (media("a", range(4, 9)),))
    other = Prompt(tuple(range(20)), (media("a", [10, 12, 14, 15, 19]),))
    assert [*one.keys[4:9]] == [other.keys[i] for i in (10, 12, 14, 15, 19)]


def test_a_block_is_another_one_wherever_it_differs_from_its_first_token_on():
    """What stands at its beginning was computed with all of it."""
    ids = tuple(range(20))
    prompt = Prompt(ids, (media("a", range(2, 6)),), blocks=((0, 12),))
    assert common(prompt, Prompt(ids, prompt.media, blocks=((0, 12),))) == 20
    assert common(prompt, Prompt(ids, prompt.media, blocks=((0, 13),))) == 0
    assert common(prompt, Prompt(ids, prompt.media)) == 0
    assert common(prompt, Prompt((*ids[:11], 99, *ids[12:]), prompt.media, blocks=((0, 12),))) == 0
    assert common(prompt, Prompt((*ids[:12], 99, *ids[13:]), prompt.media, blocks=((0, 12),))) == 12
    assert prompt.keys[0] < 0


@pytest.mark.parametrize("seed", range(20))
def test_an_end_is_whole_where_no_block_holds_it(seed):
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(60), 2 * rng.randrange(6)))
    blocks = tuple(zip(cuts[::2], cuts[1::2], strict=True))
    prompt = Prompt((0,) * 60, blocks=blocks)
    inside = {at for start, stop in blocks for at in range(start + 1, stop)}
    for stop in range(70):
        assert prompt.whole(stop) == max(at for at in range(stop + 1) if at not in inside)
        assert prompt.block_stop(stop) == dict(blocks).get(stop, stop)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_placeholder_of_a_stretch_is_found(seed):
    rng = random.Random(seed)
    positions = sorted(rng.sample(range(40), 12))
    one = media("a", positions)
    assert (one.start, one.stop) == (positions[0], positions[-1] + 1)
    for start in range(42):
        for stop in range(start, 42):
            assert one.first_in(start, stop) == next((p for p in positions if start <= p < stop), None)
