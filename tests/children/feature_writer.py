"""A process that keeps features on disk and is killed while it does: folder and seed in, a SIGKILL out."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from serve.cache.disk import Disk
from serve.cache.features import FeatureCache, FeatureKey, KeptFeatures
from serve.cache.segment_file import HostArray

NUM_PICTURES = 40


@dataclass(frozen=True, eq=False)
class Numbers:
    """What `Features` is to the cache, with a picture's own numbers."""

    values: np.ndarray

    @property
    def num_bytes(self) -> int:
        return int(self.values.nbytes)


class NumbersCodec:
    """Its bytes."""

    def dump(self, segment: KeptFeatures) -> tuple[dict[str, HostArray], dict[str, str]]:
        values = segment.features.values
        return {"values": HostArray("uint32", values.shape, values.tobytes())}, {}

    def load(self, arrays: Mapping[str, HostArray], meta: Mapping[str, str]) -> KeptFeatures:
        return KeptFeatures(Numbers(np.frombuffer(arrays["values"].data, np.uint32)))


def key_of(number: int, **others: str) -> FeatureKey:
    return FeatureKey(f"picture {number}", **others)


def numbers_of(number: int) -> Numbers:
    return Numbers(np.arange(number, number + 50 + number % 7, dtype=np.uint32))


def opened(
    folder: Path, *, max_bytes: int = 1 << 20, disk_bytes: int = 1 << 20, base: str = "base"
) -> FeatureCache:
    return FeatureCache(base, max_bytes, Disk(folder, disk_bytes, base, NumbersCodec(), "feature_cache_dir"))


def main(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    cache = opened(folder)
    delay_s = rng.uniform(0.0, 0.15)
    threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
    while True:
        number = rng.randrange(NUM_PICTURES)
        match = cache.find(key_of(number))
        if match is None:
            cache.keep(key_of(number), numbers_of(number))
        else:
            cache.release(match)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
