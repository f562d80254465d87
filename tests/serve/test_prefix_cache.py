"""The prefix cache in memory: bounds, pins, spaces, counts. No arrays, no model."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from serve.cache.precision import PLAIN, KvPrecision, precision
from serve.cache.prefix import PrefixCache, Space, start_after
from tests.children.kept import kept, values_of

SPACE = Space("base", "", "plain")


def restored(cache: PrefixCache, tokens, limit: int | None = None, space: Space = SPACE) -> int:
    """Length of what a row would be given; its numbers are those of these tokens."""
    match = cache.match(space, tokens, len(tokens) if limit is None else limit)
    if match is None:
        return 0
    joined = np.concatenate([segment.values for segment in match.segments])[: match.num_tokens]
    assert np.array_equal(joined, values_of(tokens[: match.num_tokens]))
    cache.release(match)
    return match.num_tokens


def add(cache: PrefixCache, tokens, space: Space = SPACE, **options) -> None:
    known = cache.known(space, tokens)
    if known < len(tokens):
        cache.insert(space, tokens, known, kept(tokens, known, **options))


def test_the_cache_and_its_disk_import_no_mlx():
    code = "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None; import serve.cache.prefix"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "form",
    [
        PLAIN,
        precision(8, start_after=100),
        precision(4, value_bits=8, group_size=32, start_after=7, num_plain_layers=2),
        precision(3.5, start_after=12),
        KvPrecision("turbo", 3, 4, start_after=0),
    ],
)
def test_a_spaces_label_tells_where_quantizing_starts(form):
    assert start_after(SPACE._replace(precision=form.label)) == form.start_after


def test_a_second_turn_finds_the_first_and_its_answer():
    cache = PrefixCache(max_bytes=1000)
    first = [1, 2, 3, 4, 5]
    add(cache, first)
    assert restored(cache, first, len(first) - 1) == 4, "the last token is left to run"
    answer = [*first, 6, 7, 8]
    add(cache, answer)
    assert restored(cache, [*answer, 9, 10]) == 8
    assert cache.num_bytes == 8 * 4
    stats = cache.stats()
    assert (stats.num_queries, stats.num_hits) == (2, 2)
    assert (stats.num_query_tokens, stats.num_hit_tokens) == (14, 12)
    assert stats.num_segments == 2


def test_a_request_that_asks_again_is_counted_once():
    cache = PrefixCache(max_bytes=1000)
    assert cache.match(SPACE, [1, 2], 1) is None
    assert cache.match(SPACE, [1, 2], 1, is_first=False) is None
    assert cache.stats().num_queries == 1


def test_memory_stays_within_its_bound_and_what_is_used_stays():
    cache = PrefixCache(max_bytes=40 * 4)
    rng = random.Random(0)
    system = [1, 2, 3, 4, 5, 6, 7, 8]
    add(cache, system)
    for _ in range(200):
        add(cache, [*system, *(rng.randrange(9) for _ in range(rng.randrange(1, 12)))])
        assert cache.num_bytes <= 40 * 4
        cache.check_integrity()
        assert restored(cache, [*system, 99]) == 8
    assert cache.stats().num_evicted > 100


def test_a_segment_larger_than_all_memory_evicts_nobody():
    cache = PrefixCache(max_bytes=10 * 4)
    add(cache, [1, 2, 3])
    add(cache, list(range(50, 70)))
    assert restored(cache, [1, 2, 3]) == 3
    assert cache.stats().num_evicted == 0


def test_what_rows_leave_is_the_bound_and_what_is_pinned_leaves_when_it_is_released():
    cache = PrefixCache(max_bytes=1000)
    tokens = list(range(20))
    add(cache, tokens[:10])
    add(cache, tokens)
    match = cache.match(SPACE, tokens, 5)
    cache.shrink(0)
    assert cache.num_bytes == 40
    assert match.num_tokens == 5
    cache.check_integrity()
    cache.release(match)
    assert cache.num_bytes == 0
    assert cache.stats().num_segments == 0
    add(cache, tokens)
    assert cache.num_bytes == 0
    cache.shrink(10_000)
    add(cache, tokens)
    assert cache.num_bytes == 80
    for number in range(100, 130):
        add(cache, [number, *range(20)])
    assert cache.num_bytes <= 1000, "its own bound holds, however much rows leave"
    cache.shrink(100)
    cache.check_integrity()
    assert restored(cache, [129, *range(20)]) == 21
    assert restored(cache, [128, *range(20)]) == 0


def test_a_match_is_given_back_once():
    cache = PrefixCache(max_bytes=1000)
    add(cache, [1, 2, 3])
    match = cache.match(SPACE, [1, 2, 3], 3)
    cache.release(match)
    with pytest.raises(AssertionError, match="twice"):
        cache.release(match)


def test_a_tenant_is_forgotten_alone():
    cache = PrefixCache(max_bytes=1000)
    spaces = [SPACE._replace(tenant=tenant, salt=salt) for tenant in ("", "a", "b") for salt in ("", "s")]
    for space in spaces:
        add(cache, [1, 2, 3], space)
    cache.clear("a")
    assert [restored(cache, [1, 2, 3], space=space) for space in spaces] == [3, 3, 0, 0, 3, 3]
    cache.clear("")
    assert [restored(cache, [1, 2, 3], space=space) for space in spaces] == [0, 0, 0, 0, 3, 3]
    cache.clear()
    assert cache.num_bytes == cache.stats().num_segments == 0


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_left_when_all_is_released_and_memory_is_taken_away(seed):
    rng = random.Random(seed)
    cache = PrefixCache(max_bytes=400, window=5 * (seed % 2), has_state=seed == 2)
    spaces = [SPACE._replace(tenant=str(number)) for number in range(3)]
    texts, matches, num_hits = [[1]], [], 0
    for _ in range(400):
        head, space = rng.choice(texts), rng.choice(spaces)
        tokens = [*head[: rng.randint(0, len(head))], *(rng.randrange(3) for _ in range(rng.randint(1, 20)))]
        texts = [*texts[-20:], tokens]
        match = cache.match(space, tokens, len(tokens) - 1)
        if match is not None:
            num_hits += 1
            matches.append(match)
        add(cache, tokens, space)
        if len(matches) > 5:
            cache.release(matches.pop(rng.randrange(len(matches))))
        if rng.random() < 0.1:
            cache.shrink(rng.randrange(400))
        cache.check_integrity()
    assert num_hits > 40
    for match in matches:
        cache.release(match)
    cache.shrink(0)
    cache.check_integrity()
    assert cache.num_bytes == cache.stats().num_segments == 0
