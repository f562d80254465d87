"""Features of pictures, kept by content: within their bytes, for whoever holds them, across restarts and kill -9.

Without a model: a picture's features are numbers that say whose they are."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest

from serve.cache.features import FeatureCache, FeatureKey, features_of
from serve.engine.features import SequenceFeatures
from serve.engine.plan import Encode, SequenceState
from serve.engine.request import Request, Sampling
from serve.errors import ConfigError
from serve.model.prompt import Media, Prompt
from tests.children import feature_writer
from tests.children.feature_writer import Numbers, key_of, numbers_of, opened


def found(cache: FeatureCache, key: FeatureKey) -> np.ndarray | None:
    match = cache.find(key)
    if match is None:
        return None
    values = features_of(match).values
    cache.release(match)
    cache.check_integrity()
    return values


def sequence(name: str, *keys: str, size: int = 4) -> SequenceState:
    """Pictures of so many placeholders each, one behind the other."""
    pieces = tuple(
        Media("image", key, np.arange(number * size, number * size + size), {"pixels": np.zeros(9)}, 1)
        for number, key in enumerate(keys)
    )
    tokens = tuple(range(len(keys) * size + 3))
    return SequenceState(Request(name, Prompt(tokens, pieces), Sampling(max_tokens=9)))


def test_the_cache_and_its_disk_import_no_mlx():
    code = "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None; import serve.cache.features"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_picture_is_found_under_its_own_key_alone():
    cache = FeatureCache("base", 1 << 20)
    key = FeatureKey("a", "tower", "tenant", "salt")
    cache.keep(key, numbers_of(1))
    assert np.array_equal(found(cache, key), numbers_of(1).values)
    for field in FeatureKey._fields:
        assert found(cache, key._replace(**{field: "other"})) is None
    cache.clear("tenant")
    assert found(cache, key) is None
    assert cache.num_bytes == 0


def test_memory_stays_within_its_bytes_and_what_is_used_or_held_stays():
    size = numbers_of(0).num_bytes
    cache = FeatureCache("base", 4 * size)
    cache.keep(key_of(0), numbers_of(0))
    cache.keep(key_of(70), numbers_of(70))
    held = cache.find(key_of(70))
    for number in range(7, 70, 7):
        cache.keep(key_of(number), numbers_of(number))
        assert found(cache, key_of(0)) is not None
        assert cache.num_bytes <= 4 * size
    assert found(cache, key_of(7)) is None
    cache.shrink(0)
    assert cache.num_bytes == size, "what is held stays"
    assert np.array_equal(features_of(held).values, numbers_of(70).values)
    cache.release(held)
    assert cache.num_bytes == 0
    cache.keep(key_of(1), Numbers(np.zeros(10_000, np.uint32)))
    assert found(cache, key_of(1)) is None, "larger than all the memory"


def test_pictures_are_there_after_a_restart_in_their_own_folder_of_their_own_base(tmp_path):
    cache = opened(tmp_path)
    for number in range(5):
        cache.keep(key_of(number), numbers_of(number))
    with pytest.raises(ConfigError, match=f"feature_cache_dir .* in use by process {os.getpid()}"):
        opened(tmp_path)
    cache.close()
    cache = opened(tmp_path)
    assert cache.num_bytes == 0
    for number in range(5):
        assert np.array_equal(found(cache, key_of(number)), numbers_of(number).values)
    assert cache.num_bytes > 0, "what was read is in memory"
    cache.close()
    torn = max(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-1] + b"\x99")
    cache = opened(tmp_path)
    values = [found(cache, key_of(number)) for number in range(5)]
    assert sum(one is None for one in values) == 1
    assert cache.stats().num_disk_errors == 1
    cache.close()
    cache = opened(tmp_path, base="other")
    assert found(cache, key_of(1)) is None
    cache.close()
    assert not list(tmp_path.glob("*.safetensors")), "another base's are removed"


def test_the_disk_stays_within_its_bytes(tmp_path):
    cache = opened(tmp_path, disk_bytes=40_000, max_bytes=400)
    for number in range(60):
        cache.keep(key_of(number), numbers_of(number))
        cache._cache._disk.flush()
        assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= 40_000
    assert found(cache, key_of(59)) is not None
    assert found(cache, key_of(0)) is None
    cache.close()


def test_after_kill_9_what_is_found_is_right(tmp_path):
    num_found = 0
    for seed in range(6):
        command = [sys.executable, feature_writer.__file__, str(tmp_path), str(seed)]
        child = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert child.returncode == -signal.SIGKILL, child.stderr
        cache = opened(tmp_path)
        for number in range(feature_writer.NUM_PICTURES):
            values = found(cache, key_of(number))
            assert values is None or np.array_equal(values, numbers_of(number).values)
            num_found += values is not None
        assert cache.stats().num_disk_errors == 0
        cache.close()
    assert num_found > 6


def test_features_are_held_from_their_encoding_until_their_sequence_ends():
    """And are the cache's from when they have been computed."""
    features = SequenceFeatures(FeatureCache("base", 1 << 20))
    one, other = sequence("one", "a", "b"), sequence("other", "a")
    assert not features.hold(one, 0)
    features.begin(Encode(one, 0), numbers_of(1))
    assert features.hold(other, 0), "a neighbour's, on their way"
    features.finish(one.feature_key(0), numbers_of(1))
    assert features.of(one, 0) is features.of(other, 0)
    features.release(one)
    features.bound(0)
    assert features.num_bytes == numbers_of(1).num_bytes, "the other one needs them"
    features.release(other)
    assert features.num_bytes == 0
    assert (features.stats.num_queries, features.stats.num_hits, features.stats.num_encoded) == (2, 1, 1)


def test_a_prompt_that_shows_one_picture_twice_holds_it_once_and_until_both_are_taken_in():
    features = SequenceFeatures(FeatureCache("base", 1 << 20))
    one = sequence("one", "a", "a")
    features.begin(Encode(one, 0), numbers_of(1))
    assert features.hold(one, 1)
    features.finish(one.feature_key(0), numbers_of(1))
    features.bound(0)
    features.take_in(one, 4)
    assert one.held == {1}, "there is no room to keep it for the first"
    assert features.of(one, 1).values is not None
    features.take_in(one, 8)
    assert (one.held, features.num_bytes) == (set(), 0)
    assert all(piece.inputs for piece in one.request.prompt.media), "the pixels are kept then"


def test_pixels_go_when_their_tokens_are_computed_and_features_stay_for_a_row_that_is_preempted():
    features = SequenceFeatures(FeatureCache("base", 1 << 20))
    one = sequence("one", "a", "b")
    for number in range(2):
        features.begin(Encode(one, number), numbers_of(number))
        features.finish(one.feature_key(number), numbers_of(number))
    keys = one.keys(11)
    features.take_in(one, 4)
    assert [bool(piece.inputs) for piece in one.request.prompt.media] == [False, True]
    assert one.keys(11) == keys
    features.relax(one)
    assert one.held == {0}, "what can be encoded again is not kept for a row that waits"
    features.bound(0)
    assert features.of(one, 0).values is not None
    assert not features.hold(one, 1)
    features.release(one)
    assert features.num_bytes == 0


def test_pixels_go_too_where_a_prefix_had_their_tokens():
    features = SequenceFeatures(FeatureCache("base", 1 << 20))
    first, second = sequence("first", "a"), sequence("second", "a")
    features.begin(Encode(first, 0), numbers_of(1))
    features.finish(first.feature_key(0), numbers_of(1))
    features.release(first)
    features.take_in(second, 4)
    assert second.held == {0}
    assert not second.request.prompt.media[0].inputs
    third = sequence("third", "b")
    features.take_in(third, 4)
    assert third.request.prompt.media[0].inputs, "nothing else could encode it again"


def test_what_is_no_numbers_is_nobodys():
    features = SequenceFeatures(FeatureCache("base", 1 << 20))
    one, other, third = sequence("one", "a"), sequence("other", "b", "a"), sequence("third", "b")
    features.begin(Encode(one, 0), numbers_of(1))
    assert features.hold(other, 1)
    assert features.fail(one.feature_key(0)) == {(one, 0), (other, 1)}
    assert (one.held, other.held) == (set(), set())
    assert not features.hold(third, 0)
    assert not features.hold(sequence("fourth", "a"), 0), "it was kept"
    assert features.num_bytes == 0


def test_what_was_computed_for_somebody_who_has_left_is_kept():
    features = SequenceFeatures(FeatureCache("base", 1 << 20))
    one = sequence("one", "a")
    features.begin(Encode(one, 0), numbers_of(1))
    features.release(one)
    features.finish(one.feature_key(0), numbers_of(1))
    assert features.hold(sequence("other", "a"), 0)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_and_goes_nothing_is_left_and_each_holds_its_own(seed):
    rng = random.Random(seed)
    features = SequenceFeatures(FeatureCache("base", rng.choice([0, 500, 5000])))
    alive: list[SequenceState] = []
    flying: list[tuple[FeatureKey, Numbers, bool]] = []
    for step in range(400):
        deed = rng.random()
        if deed < 0.3:
            alive.append(sequence(f"s{step}", *(str(rng.randrange(8)) for _ in range(rng.randrange(1, 4)))))
        elif deed < 0.6 and alive:
            one = rng.choice(alive)
            number = rng.randrange(len(one.request.prompt.media))
            piece = one.request.prompt.media[number]
            if number not in one.held and piece.inputs and not features.hold(one, number):
                made = numbers_of(int(piece.key))
                features.begin(Encode(one, number), made)
                flying.append((one.feature_key(number), made, rng.random() < 0.8))
        elif deed < 0.75 and flying:
            key, made, is_sound = flying.pop(0)
            if is_sound:
                features.finish(key, made)
            else:
                for one, _ in features.fail(key):
                    features.release(one)
                    alive = [each for each in alive if each is not one]
        elif deed < 0.85 and alive:
            one = rng.choice(alive)
            if not any(one.feature_key(n) == key for n in one.held for key, _, _ in flying):
                features.take_in(one, rng.randrange(13))
        elif deed < 0.9 and alive:
            features.relax(rng.choice(alive))
        elif alive:
            features.release(alive.pop(rng.randrange(len(alive))))
        if rng.random() < 0.1:
            features.bound(rng.choice([0, 300, 5000]))
        for one in alive:
            for number in one.held:
                expected = numbers_of(int(one.request.prompt.media[number].key)).values
                assert np.array_equal(features.of(one, number).values, expected)
        features._cache.check_integrity()
    for one in alive:
        features.release(one)
    features.bound(0)
    assert features.num_bytes == 0
