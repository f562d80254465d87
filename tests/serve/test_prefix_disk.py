"""Prefixes on disk: they survive restarts and kill -9, stay within their bound, and never cost a step an error."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from serve.cache.disk import INDEX, MAX_PENDING, NAME, Disk
from serve.cache.precision import KvPrecision
from serve.cache.prefix import PrefixCache, Space
from serve.errors import ConfigError
from tests.children import prefix_writer
from tests.children.kept import KeptCodec, kept, values_of

SPACE = Space("base", "sha256:1", "plain", "tenant", "salt", "picture")
ROOMY = 10 << 20


@contextmanager
def opened(folder: Path, *, max_bytes: int = ROOMY, disk_bytes: int = ROOMY, base: str = "base", **options):
    """A cache over a folder; all is written when it is left."""
    cache = PrefixCache(max_bytes=max_bytes, disk=Disk(folder, disk_bytes, base, KeptCodec()), **options)
    try:
        yield cache
    finally:
        cache.close()


def restored(cache: PrefixCache, tokens, limit: int | None = None, space: Space = SPACE) -> tuple[int, int]:
    """How many tokens a row would be given, and how many of them from disk; its numbers are those of these tokens."""
    match = cache.match(space, tokens, len(tokens) if limit is None else limit)
    if match is None:
        return 0, 0
    joined = np.concatenate([segment.values for segment in match.segments])[: match.num_tokens]
    assert np.array_equal(joined, values_of(tokens[: match.num_tokens]))
    cache.release(match)
    return match.num_tokens, match.num_disk_tokens


def add(cache: PrefixCache, tokens, space: Space = SPACE, **options) -> None:
    known = cache.known(space, tokens)
    if known < len(tokens):
        cache.insert(space, tokens, known, kept(tokens, known, **options))


def settled(cache: PrefixCache) -> None:
    """All that waits is written or deleted, and the cache knows."""
    assert cache._disk.flush()
    cache.shrink(ROOMY)
    assert cache._disk.flush()


def files(folder: Path) -> dict[str, int]:
    """Sizes of the segments' files."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if NAME.fullmatch(path.name)}


def index(folder: Path) -> dict[str, int]:
    with sqlite3.connect(folder / INDEX) as connection:
        rows = connection.execute("SELECT key, num_bytes FROM segments").fetchall()
    connection.close()
    return {f"kv-{key}.safetensors": num_bytes for key, num_bytes in rows}


def test_what_is_written_and_leaves_memory_is_nowhere_in_it(tmp_path):
    """Not with the thread that wrote it, either, while that waits for more."""
    with opened(tmp_path) as cache:
        segment = kept([1, 2, 3, 4], 0)
        gone = weakref.ref(segment)
        cache.insert(SPACE, [1, 2, 3, 4], 0, segment)
        del segment
        settled(cache)
        assert gone() is not None
        cache.shrink(0)
        gc.collect()
        assert cache.num_bytes == 0
        assert gone() is None


def test_prefixes_are_there_after_a_restart_wherever_texts_part(tmp_path):
    texts = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8], [1, 2, 3, 7, 8, 9, 10], [5, 5], [1, 9]]
    with opened(tmp_path) as cache:
        for tokens in texts:
            add(cache, tokens)
        add(cache, texts[0], SPACE._replace(tenant="other"))
    with opened(tmp_path) as cache:
        assert cache.num_bytes == 0
        for tokens in texts:
            assert restored(cache, [*tokens, 77])[0] == len(tokens)
        assert restored(cache, texts[0], space=SPACE._replace(tenant="other")) == (6, 6)
        for other in ("base", "adapter", "precision", "salt"):
            space = SPACE._replace(**{other: "affine:8:8:64:0:0" if other == "precision" else "other"})
            assert restored(cache, texts[0], space=space) == (0, 0)
        assert restored(cache, texts[0]) == (6, 0), "what was read is in memory"
        cache.check_integrity()
        add(cache, [1, 2, 3, 4, 5, 6, 7])
    with opened(tmp_path) as cache:
        assert restored(cache, [1, 2, 3, 4, 5, 6, 7]) == (7, 7)
        assert cache.stats().num_disk_hit_tokens == 7


def test_a_file_says_what_it_is(tmp_path):
    with opened(tmp_path) as cache:
        add(cache, [1, 2, 3])
        add(cache, [1, 2, 3, 4, 5])
    written = [safe_open(tmp_path / name, framework="numpy").metadata() for name in files(tmp_path)]
    assert {one["tokens"] for one in written} == {"1 2 3", "4 5"}
    assert {one["fingerprint"] for one in written} == {"base"}
    assert [Space(*json.loads(one["space"])) for one in written] == 2 * [SPACE]


def test_windows_states_and_precisions_come_back_as_they_were(tmp_path):
    tokens = list(range(20))
    space = SPACE._replace(precision=KvPrecision("affine", 8, 8, start_after=4).label)
    with opened(tmp_path, window=3, has_state=True) as cache:
        cache.insert(
            space, tokens, 0, kept(tokens[:10], num_window_tokens=2, precision=KvPrecision("affine", 8, 8))
        )
        cache.insert(space, tokens, 10, kept(tokens, 10, num_window_tokens=4))
    with opened(tmp_path, window=3, has_state=True) as cache:
        assert restored(cache, tokens, space=space) == (20, 20)
        assert restored(cache, tokens, 19, space) == (0, 0), "10 lacks a part of its window"
        assert cache.known(space, tokens[:10]) == 0
        match = cache.match(space, tokens, 20)
        assert [segment.num_window_tokens for segment in match.segments] == [2, 4]
        assert [segment.precision.is_plain for segment in match.segments] == [False, True]
        assert match.segments[1].state == values_of(tokens)[-1]
        cache.release(match)


def test_the_middle_of_a_file_has_no_state(tmp_path):
    tokens = list(range(20))
    for length in (20, None):
        with opened(tmp_path, has_state=True) as cache:
            if length:
                add(cache, tokens)
            else:
                add(cache, [*tokens[:10], 99], has_state=False)
                assert cache.known(SPACE, [*tokens[:10], 99]) == 10, "it cuts the file at 10"
                assert restored(cache, tokens, 19) == (0, 0)
                assert restored(cache, tokens) == (20, 20)


def test_a_beginning_that_leaves_the_disk_to_make_room_takes_along_what_stood_on_it(tmp_path):
    tokens = list(range(60))
    with opened(tmp_path, disk_bytes=17_000) as cache:
        add(cache, tokens[:50])
        settled(cache)
        cache.shrink(0)
        cache.shrink(ROOMY)
        assert cache.known(SPACE, tokens) == 50
        add(cache, tokens)  # 17,000 bytes do not hold its reserve beside the first one's file
        cache.check_integrity()
        assert restored(cache, tokens) == (0, 0)
        settled(cache)
        assert files(tmp_path) == {}
        assert cache.num_bytes == 0


def test_what_leaves_memory_is_read_from_disk(tmp_path):
    texts = [[number, *range(30)] for number in range(20)]
    with opened(tmp_path, max_bytes=31 * 4 * 3) as cache:
        for tokens in texts:
            add(cache, tokens)
            settled(cache)
            cache.shrink(31 * 4 * 3)
            cache.check_integrity()
            assert cache.num_bytes <= 31 * 4 * 3
        assert restored(cache, texts[0]) == (31, 31)
        assert restored(cache, texts[0]) == (31, 0)
        assert cache.stats().num_evicted >= 17


def test_the_disk_stays_within_its_bound_and_keeps_what_was_used_last(tmp_path):
    rng = random.Random(0)
    texts = [[number, *(rng.randrange(9) for _ in range(50))] for number in range(60)]
    bound = 30_000
    with opened(tmp_path, disk_bytes=bound) as cache:
        for tokens in texts:
            add(cache, tokens)
            restored(cache, texts[0])
            settled(cache)
            assert sum(files(tmp_path).values()) == cache.stats().disk_bytes <= bound
        assert cache.stats().num_disk_evicted > 10
    assert files(tmp_path) == index(tmp_path)
    with opened(tmp_path, disk_bytes=bound) as cache:
        assert restored(cache, texts[-1]) == restored(cache, texts[0]) == (51, 51)
        assert restored(cache, texts[1]) == (0, 0)
    with opened(tmp_path, disk_bytes=1000) as cache:
        settled(cache)
        assert sum(files(tmp_path).values()) <= 1000, "a smaller bound holds from the start"
        assert restored(cache, texts[0])[0] == 51, "used last, though written first"


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happened_what_is_found_is_right_and_the_accounts_hold(tmp_path, seed):
    rng = random.Random(seed)
    options = [{}, {"window": 4}, {"has_state": True}][seed]
    texts, num_hits, num_disk_tokens = [[1]], 0, 0
    for _ in range(4):
        with opened(tmp_path, max_bytes=2000, disk_bytes=600_000, **options) as cache:
            matches = []
            for _ in range(60):
                head = rng.choice(texts)
                tokens = [
                    *head[: rng.randint(0, len(head))],
                    *(rng.randrange(3) for _ in range(rng.randint(1, 40))),
                ]
                texts = [*texts[-40:], tokens]
                space = SPACE._replace(tenant=str(rng.randrange(2)))
                num_tokens, from_disk = restored(cache, tokens, space=space)
                num_hits += num_tokens > 0
                num_disk_tokens += from_disk
                add(
                    cache,
                    tokens,
                    space,
                    num_window_tokens=rng.choice([None, 4, 0]),
                    has_state=rng.random() < 0.8,
                )
                if (match := cache.match(space, tokens, len(tokens))) is not None:
                    matches.append(match)
                if len(matches) > 4:
                    cache.release(matches.pop(0))
                if rng.random() < 0.2:
                    cache.shrink(rng.randrange(2000))
                if rng.random() < 0.1:
                    settled(cache)
                if rng.random() < 0.02:
                    cache.clear("0")
                cache.check_integrity()
            for match in matches:
                cache.release(match)
            assert cache.stats().num_disk_errors == 0
        assert files(tmp_path) == index(tmp_path)
        assert sum(files(tmp_path).values()) <= 600_000
    assert num_hits > 5
    assert num_disk_tokens > 0
    with opened(tmp_path, **options) as cache:
        cache.clear()
        settled(cache)
        assert cache.num_bytes == cache.stats().disk_bytes == cache.stats().num_segments == 0
    assert files(tmp_path) == index(tmp_path) == {}


def test_kill_9_at_any_file_operation_leaves_what_is_right(tmp_path):
    """Each process goes on where the one before it was killed, and checks all that it finds."""
    rng = random.Random(0)
    found = 0
    for seed in range(10):
        command = [sys.executable, prefix_writer.__file__, str(tmp_path), str(seed), str(rng.randint(1, 120))]
        child = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert child.returncode == -signal.SIGKILL, child.stderr
        with opened(tmp_path, disk_bytes=prefix_writer.MAX_DISK_BYTES) as cache:
            settled(cache)
            assert files(tmp_path) == index(tmp_path)
            assert sum(files(tmp_path).values()) <= prefix_writer.MAX_DISK_BYTES
            found += prefix_writer.check(cache, Space("base", "", "plain"))
            assert cache.stats().num_disk_errors == 0
    assert found > 5000


def test_torn_and_foreign_files_are_skipped_and_removed_while_it_runs(tmp_path, caplog):
    tokens = list(range(30))
    harms = {
        "short": lambda path: os.truncate(path, 100),
        "other": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x99"),
        "gone": lambda path: path.unlink(),
        "swapped": lambda path: shutil.copy(
            next(one for one in path.parent.glob("kv-*") if one != path), path
        ),
    }
    for number, harm in enumerate(harms.values()):
        folder = tmp_path / str(number)
        with opened(folder) as cache:
            add(cache, tokens[:10])
            add(cache, tokens[:20])
            add(cache, tokens)
        with opened(folder) as cache:
            whole = {safe_open(path, "numpy").metadata()["tokens"]: path for path in folder.glob("kv-*")}
            harm(whole[" ".join(map(str, tokens[10:20]))])
            assert restored(cache, tokens) == (10, 10)
            assert restored(cache, tokens) == (10, 0)
            assert cache.stats().num_disk_errors == 1
            cache.check_integrity()
            settled(cache)
            assert len(files(folder)) == 1, "what stood on the torn file has gone with it"
            add(cache, tokens)
        with opened(folder) as cache:
            assert restored(cache, tokens) == (30, 30)
    assert len([record for record in caplog.records if "is computed anew" in record.message]) == len(harms)


def test_what_does_not_belong_is_removed_at_the_start_and_other_files_stay(tmp_path):
    tokens = list(range(30))
    with opened(tmp_path) as cache:
        add(cache, tokens[:10])
        add(cache, tokens)
        add(cache, [7, 7])
    first = min(files(tmp_path))
    (tmp_path / f"kv-{'0' * 40}.safetensors").write_bytes(b"nobody's")
    (tmp_path / f"{first}.new").write_bytes(b"half of")
    (tmp_path / "notes.txt").write_text("mine")
    os.truncate(tmp_path / first, 50)
    with opened(tmp_path) as cache:
        settled(cache)
        assert files(tmp_path) == index(tmp_path)
        assert first not in files(tmp_path)
        assert restored(cache, tokens)[0] in (0, 10, 30)
        assert cache.stats().num_disk_errors == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("harm", ["base", "format", "garbage", "cut", "gone"])
def test_another_bases_index_and_one_that_is_not_whole_begin_anew(tmp_path, harm):
    with opened(tmp_path) as cache:
        for number in range(50):
            add(cache, [number, 1, 2])
    if harm == "format":
        with sqlite3.connect(tmp_path / INDEX) as connection:
            connection.execute("UPDATE facts SET value = '0' WHERE name = 'format'")
        connection.close()
    elif harm == "garbage":
        (tmp_path / INDEX).write_bytes(b"no database, but long enough to look like one" * 100)
    elif harm == "cut":
        os.truncate(tmp_path / INDEX, 5000)
    elif harm == "gone":
        (tmp_path / INDEX).unlink()
    with opened(tmp_path, base="other" if harm == "base" else "base") as cache:
        assert restored(cache, [1, 1, 2]) == (0, 0)
        assert files(tmp_path) == {}
        add(cache, [1, 1, 2])
    with opened(tmp_path, base="other" if harm == "base" else "base") as cache:
        assert restored(cache, [1, 1, 2]) == (3, 3)


def test_a_folder_that_cannot_be_written_costs_no_step_an_error(tmp_path, caplog):
    folder = tmp_path / "cache"
    with opened(folder) as cache:
        add(cache, [1, 2, 3])
        settled(cache)
        shutil.rmtree(folder)
        folder.write_text("in its place")
        for number in range(5):
            add(cache, [number, 5, 6])
            settled(cache)
            assert restored(cache, [number, 5, 6]) == (3, 0)
            cache.check_integrity()
        cache.shrink(0)
        assert restored(cache, [1, 2, 3]) == (0, 0)
        assert cache.stats().num_disk_errors > 5
        assert cache.num_bytes == 0
    assert len([record for record in caplog.records if "cannot be kept" in record.message]) <= 2


def test_a_disk_that_is_full_loses_segments_and_nothing_else(tmp_path):
    """The limit on a file's size stands for the full disk: a write ends in an OSError half way."""
    code = f"""
import resource, sys
from pathlib import Path
import numpy as np
from serve.cache.disk import Disk
from serve.cache.prefix import PrefixCache, Space
from tests.children.kept import Kept, KeptCodec
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
cache = PrefixCache(max_bytes=1 << 30, disk=Disk(Path({str(tmp_path)!r}), 1 << 30, "base", KeptCodec()))
space = Space("base", "", "plain")
for size in (1000, 100_000, 1000):
    cache.insert(space, [size, *range(size)], 0, Kept(np.zeros(size + 1, np.uint32)))
    cache._disk.flush()
stats = cache.stats()
assert cache.match(space, [100_000, *range(100_000)], 100_001).num_tokens == 100_001
print(stats.num_disk_errors, cache.stats().num_segments)
cache.close()
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert child.stdout.split() == ["1", "3"], child.stderr
    assert len(files(tmp_path)) == 1
    assert files(tmp_path) == index(tmp_path)


def test_two_servers_do_not_share_a_folder(tmp_path):
    with opened(tmp_path) as cache:
        add(cache, [1, 2, 3])
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"), opened(tmp_path):
            pass
        assert restored(cache, [1, 2, 3])[0] == 3
    with opened(tmp_path) as cache:
        assert restored(cache, [1, 2, 3]) == (3, 3)


def test_a_folder_that_cannot_be_one_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="file cannot be used"),
        opened(tmp_path / "file"),
    ):
        pass


class SlowCodec(KeptCodec):
    """Begins to write when it is allowed to."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.has_begun = threading.Event()

    def dump(self, segment):
        self.has_begun.set()
        assert self.gate.wait(60)
        return super().dump(segment)


def test_a_disk_that_cannot_keep_up_loses_the_oldest_and_is_within_memorys_bound(tmp_path):
    codec = SlowCodec()
    bound = 100 * 4 * 40
    cache = PrefixCache(max_bytes=bound, disk=Disk(tmp_path, ROOMY, "base", codec))
    texts = [[number, *range(39)] for number in range(MAX_PENDING + 50)]
    for tokens in texts:
        add(cache, tokens)
        assert cache.num_bytes <= bound
        cache.check_integrity()
    assert restored(cache, texts[-1]) == (40, 0)
    assert restored(cache, texts[-90])[0] == 40, "it waits for the disk, or is in memory"
    assert cache.stats().num_disk_dropped > 0
    cache.shrink(0)
    assert cache.num_bytes <= 4 * 40, "what is being written cannot leave"
    codec.gate.set()
    settled(cache)
    cache.shrink(0)
    assert cache.num_bytes == 0
    cache.check_integrity()
    assert sum(files(tmp_path).values()) == cache.stats().disk_bytes
    cache.close()
    assert files(tmp_path) == index(tmp_path)


def test_what_the_disk_was_too_slow_for_is_written_when_it_leaves_memory(tmp_path):
    codec = SlowCodec()
    cache = PrefixCache(max_bytes=ROOMY, disk=Disk(tmp_path, ROOMY, "base", codec))
    texts = [[number, *range(39)] for number in range(MAX_PENDING + 50)]
    for tokens in texts:
        add(cache, tokens)
    codec.gate.set()
    settled(cache)
    num_dropped = cache.stats().num_disk_dropped
    assert num_dropped >= 49
    cache.shrink(cache.num_bytes - 8 * 160)
    settled(cache)
    assert len(files(tmp_path)) > len(texts) - num_dropped
    assert restored(cache, texts[1]) == (40, 40)
    cache.close()


def test_a_text_that_is_being_written_is_found_without_a_file(tmp_path):
    codec = SlowCodec()
    cache = PrefixCache(max_bytes=ROOMY, disk=Disk(tmp_path, ROOMY, "base", codec))
    add(cache, list(range(5)))
    assert codec.has_begun.wait(60)
    cache.shrink(0)
    assert cache.stats().num_evicted == 1
    assert restored(cache, list(range(5))) == (5, 5)
    cache.check_integrity()
    codec.gate.set()
    settled(cache)
    cache.shrink(0)
    assert cache.num_bytes == 0
    assert restored(cache, list(range(5))) == (5, 5)
    cache.close()


def test_a_text_is_found_to_the_token_when_its_file_was_cut_by_others(tmp_path):
    """One file, three nodes: each is restored from its part, and the file leaves with the last of them."""
    tokens = list(range(30))
    with opened(tmp_path) as cache:
        add(cache, tokens)
        for at in (10, 20):
            add(cache, [*tokens[:at], 99])
        settled(cache)
        assert len(files(tmp_path)) == 3
    with opened(tmp_path, max_bytes=30 * 4) as cache:
        assert restored(cache, tokens) == (30, 30)
        assert restored(cache, [*tokens[:20], 99]) == (21, 1)
        assert restored(cache, [*tokens[:10], 99, 5])[0] == 11
        assert restored(cache, [*tokens[:15], 55])[0] == 15
        cache.check_integrity()
    torn = max(tmp_path.glob("kv-*"), key=lambda path: path.stat().st_size)
    torn.write_bytes(torn.read_bytes()[:-1] + b"\x99")
    with opened(tmp_path) as cache:
        assert restored(cache, tokens) == (0, 0)
        assert cache.stats().num_disk_errors == 1, "all its nodes go at once"
        settled(cache)
        assert files(tmp_path) == {}
