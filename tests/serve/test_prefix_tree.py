"""The prefix tree alone, against a dict of everything that was ever inserted: no arrays, no model."""

from __future__ import annotations

import random
import subprocess
import sys
from array import array
from collections.abc import Callable

import numpy as np
import pytest

from serve.cache.precision import PLAIN, KvPrecision
from serve.cache.tree import DISK, MEMORY, PrefixTree, Space, itself
from serve.model.prompt import Prompt
from tests.children.kept import Kept, kept, values_of

SPACE = Space("base", "", "plain")
EIGHT_BITS = KvPrecision("affine", 8, 8)


def found(
    tree: PrefixTree,
    tokens,
    limit: int | None = None,
    *,
    space: Space = SPACE,
    start_after: int = 0,
    whole: Callable[[int], int] = itself,
) -> int:
    """Length of the longest prefix that can be restored; what is kept of it is what these tokens gave."""
    match = tree.find(space, tokens, len(tokens) if limit is None else limit, start_after, whole)
    if match is None:
        return 0
    values = [part(tree, node, match.num_tokens, start_after).values for node in match.path]
    joined = np.concatenate(values)[: match.num_tokens]
    assert np.array_equal(joined, values_of(tokens[: match.num_tokens]))
    return match.num_tokens


def part(tree: PrefixTree, node, num_tokens: int, start_after: int) -> Kept:
    tier = tree.tier_for(node, num_tokens, start_after)
    assert tier is not None
    return node.kept[tier]


def add(tree: PrefixTree, tokens, start: int = 0, *, space: Space = SPACE, tier: int = MEMORY, **options):
    nodes = tree.insert(space, tokens, start, kept(tokens, start, **options), tier)
    tree.check_integrity()
    return nodes


def test_the_tree_and_the_cache_over_it_import_no_mlx():
    code = "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None; import serve.cache.tree"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prefix_is_found_to_the_token_wherever_texts_part():
    tree = PrefixTree()
    add(tree, [1, 2, 3, 4, 5, 6])
    add(tree, [1, 2, 3, 7, 8])
    assert found(tree, [1, 2, 3, 4, 9]) == 4
    assert found(tree, [1, 2, 3, 7, 8, 9]) == 5
    assert found(tree, [1, 2, 3, 7, 8], 4) == 4
    assert found(tree, [1, 2, 9]) == 2
    assert found(tree, [2, 3]) == 0
    assert len(list(tree.nodes(SPACE))) == 3


def test_spaces_share_nothing():
    tree = PrefixTree()
    spaces = [
        SPACE,
        SPACE._replace(base="other"),
        SPACE._replace(adapter="sha256:1"),
        SPACE._replace(precision=EIGHT_BITS.label),
        SPACE._replace(tenant="b"),
        SPACE._replace(salt="s"),
        SPACE._replace(media="picture"),
    ]
    for number, space in enumerate(spaces):
        assert found(tree, [1, 2, 3], space=space) == 0, space
        add(tree, [1, 2, 3, *range(number)], space=space)
    for number, space in enumerate(spaces):
        assert found(tree, [1, 2, 3, *range(9)], space=space) == 3 + number
    tree.clear(spaces[4])
    assert [found(tree, [1, 2, 3], space=space) for space in spaces] == [3, 3, 3, 3, 0, 3, 3]


def random_tokens(rng: random.Random, earlier: list[list[int]]) -> list[int]:
    """Goes on from the middle of an earlier text, as often as not."""
    head = rng.choice(earlier) if earlier and rng.random() < 0.8 else []
    return [*head[: rng.randint(0, len(head))], *(rng.randint(0, 2) for _ in range(rng.randint(1, 12)))]


class Oracle:
    """Every position of every prefix that was inserted, with what is kept of it."""

    def __init__(self, window: int, has_state: bool) -> None:
        self.window, self.has_state = window, has_state
        self.positions: dict[tuple, set[str]] = {}
        self.states: set[tuple] = set()

    def insert(self, space, tokens, start: int, payload: Kept) -> None:
        stop = start + payload.num_tokens
        if not all((space, *tokens[: i + 1]) in self.positions for i in range(start)):
            return
        for i in range(start, stop):
            virtues = self.positions.setdefault((space, *tokens[: i + 1]), set())
            virtues |= {"window"} if i >= stop - payload.num_window_tokens else set()
            virtues |= {"plain"} if payload.precision.is_plain else set()
        if payload.has_state:
            self.states.add((space, *tokens[:stop]))

    def restorable(self, space, tokens, length: int, start_after: int) -> bool:
        virtues = [self.positions.get((space, *tokens[: i + 1])) for i in range(length)]
        return (
            None not in virtues
            and all("window" in one for one in virtues[max(length - self.window, 0) :] if self.window)
            and (length > start_after or all("plain" in one for one in virtues))
            and (not self.has_state or (space, *tokens[:length]) in self.states)
        )

    def longest(self, space, tokens, limit: int, start_after: int, whole: Callable[[int], int]) -> int:
        lengths = [n for n in range(min(limit, len(tokens)), 0, -1) if whole(n) == n]
        return next((n for n in lengths if self.restorable(space, tokens, n, start_after)), 0)


def random_blocks(rng: random.Random, num_tokens: int) -> Prompt:
    """Where a prefix may not end: anywhere, or nowhere."""
    cuts = sorted(rng.sample(range(num_tokens + 1), min(rng.choice([0, 2, 6]), num_tokens + 1) // 2 * 2))
    return Prompt((0,) * num_tokens, blocks=tuple(zip(cuts[::2], cuts[1::2], strict=True)))


KINDS = {
    "plain": {},
    "windows": {"window": 5},
    "states": {"has_state": True},
    "quantized": {"start_after": 6},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_found_is_what_a_dict_of_all_prefixes_says(kind, seed):
    rng = random.Random(f"{kind} {seed}")
    options = dict(KINDS[kind])
    start_after = options.pop("start_after", 0)
    tree, oracle = PrefixTree(**options), Oracle(options.get("window", 0), kind == "states")
    spaces, earlier, hits = [SPACE, SPACE._replace(tenant="b")], [], 0
    for _ in range(200):
        tokens, space = random_tokens(rng, earlier), rng.choice(spaces)
        limit = rng.randint(0, len(tokens) + 1)
        whole = random_blocks(rng, len(tokens)).whole
        wanted = oracle.longest(space, tokens, limit, start_after, whole)
        assert found(tree, tokens, limit, space=space, start_after=start_after, whole=whole) == wanted
        hits += wanted > 0
        known = tree.known(space, tokens, start_after)
        if rng.random() < 0.7:
            start = known if rng.random() < 0.7 else rng.randint(0, min(known, len(tokens) - 1))
            if start == len(tokens):
                continue
            payload = kept(
                tokens,
                start,
                has_state=kind != "states" or rng.random() < 0.5,
                num_window_tokens=None if rng.random() < 0.6 else rng.randint(0, 8),
                precision=EIGHT_BITS if kind == "quantized" and rng.random() < 0.5 else PLAIN,
            )
            tree.insert(space, tokens, start, payload)
            oracle.insert(space, tokens, start, payload)
            earlier.append(tokens)
            tree.check_integrity()
    assert hits > 4
    for space in spaces:
        tree.clear(space)
    assert tree.tiers[MEMORY].num_bytes == tree.tiers[MEMORY].num_nodes == 0
    assert not tree.spaces


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_captured_from_where_it_is_not_known_makes_all_of_a_text_restorable(kind, seed):
    rng = random.Random(f"{kind} {seed}")
    options = dict(KINDS[kind])
    start_after = options.pop("start_after", 0)
    tree, earlier, skipped = PrefixTree(**options), [], 0
    for number in range(200):
        tokens = random_tokens(rng, earlier)
        known = tree.known(SPACE, tokens, start_after)
        is_found = found(tree, tokens, start_after=start_after) == len(tokens)
        assert is_found == (known == len(tokens))
        skipped += known
        if known < len(tokens):
            is_good = number % 3 > 0
            payload = kept(
                tokens,
                known,
                has_state=is_good,
                num_window_tokens=None if is_good else number % 5,
                precision=PLAIN if is_good or len(tokens) <= start_after else EIGHT_BITS,
            )
            tree.insert(SPACE, tokens, known, payload)
            tree.check_integrity()
            if is_good:
                assert found(tree, tokens, start_after=start_after) == len(tokens)
                assert tree.known(SPACE, tokens, start_after) == len(tokens)
        earlier.append(tokens)
    assert skipped > 200


def test_a_prefix_ends_only_where_a_state_was_kept_and_a_better_capture_adds_one():
    tree = PrefixTree(has_state=True)
    tokens = list(range(20))
    add(tree, tokens)
    assert found(tree, tokens) == 20
    assert found(tree, tokens, 19) == 0
    assert tree.known(SPACE, tokens[:8]) == 7
    add(tree, tokens[:8], 7)
    assert found(tree, tokens, 19) == found(tree, [*tokens[:10], 99]) == 8
    add(tree, [*tokens[:10], 99], 8)
    assert found(tree, tokens) == 20
    assert found(tree, [*tokens[:10], 99]) == 11


def test_windows_are_asked_for_as_far_as_they_reach():
    tree = PrefixTree(window=4)
    tokens = list(range(30))
    add(tree, tokens[:10])
    add(tree, tokens[:20], 10, num_window_tokens=0)
    add(tree, tokens, 20)
    assert found(tree, tokens) == 30
    assert found(tree, tokens, 24) == 24
    assert found(tree, tokens, 23) == 10, "position 19 is in the window of a prefix of 23, and has none"
    assert found(tree, tokens, 7) == 7
    add(tree, [*tokens[:7], *range(40, 60)], 7, num_window_tokens=4)
    assert found(tree, [*tokens[:7], *range(40, 61)]) == 27
    assert found(tree, [*tokens[:7], *range(40, 60)], 26) == 7


def test_a_quantized_prefix_serves_no_row_that_would_still_be_plain():
    tree = PrefixTree()
    tokens = list(range(30))
    add(tree, tokens[:20], precision=EIGHT_BITS)
    assert found(tree, tokens, start_after=8) == 20
    assert found(tree, tokens, 8, start_after=8) == 0
    add(tree, tokens[:8])
    assert found(tree, tokens, 8, start_after=8) == 8
    assert found(tree, tokens, 8, start_after=16) == 8
    assert found(tree, tokens, 9, start_after=16) == 8


def test_pieces_of_no_known_beginning_are_refused():
    tree = PrefixTree()
    tokens = list(range(10))
    assert add(tree, tokens, 5) == []
    add(tree, tokens[:4])
    assert add(tree, tokens, 5) == []
    assert len(add(tree, tokens, 4)) == 1
    assert found(tree, tokens) == 10


def test_the_least_recently_used_ends_go_first_and_their_beginnings_after_them():
    tree = PrefixTree()
    texts = [[1, 2, 3, number] for number in range(4)]
    for text in texts:
        add(tree, text)
    match = tree.find(SPACE, texts[0], 4)
    tree.touch(match.path[-1])
    gone = []
    while tree.evict(MEMORY) is not None:
        tree.check_integrity()
        gone.append([found(tree, text) for text in texts])
    assert gone == [[4, 3, 4, 4], [4, 3, 3, 4], [4, 3, 3, 3], [3, 3, 3, 3], [0, 0, 0, 0]]


def test_what_is_pinned_stays_also_in_halves_and_after_its_space_was_cleared():
    tree = PrefixTree()
    tokens = list(range(10))
    add(tree, tokens)
    node = tree.find(SPACE, tokens, 10).path[-1]
    tree.pin(node)
    add(tree, [*tokens[:5], 99])
    add(tree, [*tokens[:7], 99])
    while tree.evict(MEMORY) is not None:
        tree.check_integrity()
    assert found(tree, tokens) == 10
    assert tree.tiers[MEMORY].num_bytes == 40
    tree.clear(SPACE)
    tree.check_integrity()
    assert found(tree, tokens) == 0
    assert tree.tiers[MEMORY].num_bytes == 40, "its bytes are held until it is released"
    tree.unpin(node)
    assert tree.tiers[MEMORY].num_bytes == 0
    tree.check_integrity()


def test_a_node_leaves_when_neither_tier_keeps_it_and_takes_along_what_is_behind_it():
    dropped = []
    tree = PrefixTree(is_dropped=dropped.append)
    tokens = list(range(12))
    add(tree, tokens[:6])
    add(tree, tokens[:6], tier=DISK)
    add(tree, tokens, 6, tier=DISK)
    tree.evict(MEMORY)
    assert found(tree, tokens) == 12
    assert not dropped
    first = tree.find(SPACE, tokens, 6).path[0]
    tree.forget(first, DISK)
    assert found(tree, tokens) == 0
    assert sum(one.num_tokens for one in dropped) == 12
    assert not tree.spaces
    tree.check_integrity()


@pytest.mark.parametrize("seed", range(6))
def test_accounts_hold_whatever_happens_in_whatever_order(seed):
    rng = random.Random(seed)
    is_stateful = seed % 2 == 1
    dropped: list[Kept] = []
    tree = PrefixTree(window=3 * (seed % 3), has_state=is_stateful, is_dropped=dropped.append)
    spaces = [SPACE._replace(tenant=str(number)) for number in range(3)]
    earlier, pins, num_hits = [], [], 0
    for _ in range(600):
        tokens, space = random_tokens(rng, earlier), rng.choice(spaces)
        action = rng.random()
        if action < 0.5:
            start = rng.randint(0, min(tree.known(space, tokens), len(tokens) - 1))
            payload = kept(
                tokens, start, has_state=rng.random() < 0.8, num_window_tokens=rng.choice([None, 0, 2])
            )
            tree.insert(space, tokens, start, payload, rng.choice([MEMORY, DISK]))
            earlier.append(tokens)
        elif action < 0.7:
            match = tree.find(space, tokens, len(tokens))
            if match is not None:
                num_hits += 1
                found(tree, tokens, space=space)
                tree.pin(match.path[-1])
                pins.append(match.path[-1])
        elif action < 0.85 and pins:
            tree.unpin(pins.pop(rng.randrange(len(pins))))
        elif action < 0.98:
            tree.evict(rng.choice([MEMORY, DISK]))
        else:
            tree.clear(space)
        tree.check_integrity()
    assert num_hits > 5
    for node in pins:
        tree.unpin(node)
    for tier in (MEMORY, DISK):
        while tree.evict(tier) is not None:
            tree.check_integrity()
        assert tree.tiers[tier].num_bytes == tree.tiers[tier].num_nodes == 0
    assert not tree.spaces


def test_a_hundred_thousand_tokens_may_be_one_chain():
    tree = PrefixTree()
    tokens = array("i", [random.randrange(100_000) for _ in range(100_000)])
    values = np.zeros(len(tokens), np.uint32)
    for start in range(0, len(tokens), 250):
        tree.insert(SPACE, tokens[: start + 250], start, Kept(values[start : start + 250]))
    assert tree.find(SPACE, tokens, len(tokens)).num_tokens == len(tokens)
    assert tree.known(SPACE, tokens) == len(tokens)
    while tree.evict(MEMORY) is not None:
        pass
    assert not tree.spaces


def test_ten_thousand_inserts_leave_right_accounts():
    rng = random.Random(0)
    tree = PrefixTree()
    head = [rng.randrange(1000) for _ in range(60)]
    for _ in range(10_000):
        tokens = [*head[: rng.randrange(60)], *(rng.randrange(1000) for _ in range(20))]
        known = tree.known(SPACE, tokens)
        if known < len(tokens):
            tree.insert(SPACE, tokens, known, Kept(np.zeros(len(tokens) - known, np.uint32)))
        while tree.tiers[MEMORY].num_bytes > 100_000:
            tree.evict(MEMORY)
    tree.check_integrity()
    assert tree.tiers[MEMORY].num_nodes > 1000
