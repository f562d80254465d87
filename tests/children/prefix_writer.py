"""A process that fills a prefix cache on disk and is killed at its n-th file operation: FOLDER SEED N."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import numpy as np

from serve.cache.disk import Disk
from serve.cache.prefix import PrefixCache, Space
from tests.children.kept import KeptCodec, kept, values_of

OPERATIONS = {"open", "os.rename", "os.remove", "os.scandir", "sqlite3.connect"}
MAX_DISK_BYTES = 400_000


def text_of(number: int) -> list[int]:
    """One of 40 texts, which share beginnings."""
    rng = random.Random(number)
    return [*range(20 * (number % 3)), *(rng.randrange(100) for _ in range(30))]


def check(cache: PrefixCache, space: Space) -> int:
    """Tokens found of all texts; what is found is right."""
    total = 0
    for number in range(40):
        tokens = text_of(number)
        match = cache.match(space, tokens, len(tokens))
        if match is not None:
            values = np.concatenate([segment.values for segment in match.segments])[: match.num_tokens]
            assert np.array_equal(values, values_of(tokens[: match.num_tokens])), "wrong numbers"
            total += match.num_tokens
            cache.release(match)
    return total


def work(folder: Path, seed: int, num_operations: int) -> None:
    left = num_operations
    # Every second process dies where a file that is written has no name yet.
    operations = OPERATIONS if seed % 2 else {"os.rename"}

    def count(event: str, args: tuple[object, ...]) -> None:
        nonlocal left
        is_read = event == "open" and args[1] == "rb"
        if event in operations and not is_read and str(folder) in str(args[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    rng = random.Random(seed)
    disk = Disk(folder, MAX_DISK_BYTES, "base", KeptCodec())
    cache = PrefixCache(max_bytes=4000, disk=disk)
    space = Space("base", "", "plain")
    check(cache, space)
    while True:
        tokens = text_of(rng.randrange(40))
        known = cache.known(space, tokens)
        if known < len(tokens):
            cache.insert(space, tokens, known, kept(tokens, known))
        if rng.random() < 0.2:
            cache.shrink(rng.randrange(4000))
        if rng.random() < 0.5:
            # On a fast machine nothing would ever be written before it is cleared.
            disk.flush()
        if rng.random() < 0.01:
            cache.clear()
        check(cache, space)


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
