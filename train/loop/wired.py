"""The wired limit on a Mac: how much of the memory arrays stand in may not be paged out while a run trains.

macOS pages GPU memory out when other programs want room, and a step then waits for the disk. mlx-lm raises the limit
in generation; a training run wants it from its first step to its last. Elsewhere there is no such limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


def recommended_bytes() -> int | None:
    """What the system recommends to keep in memory at most; None where there is no Metal."""
    if not mx.metal.is_available() or mx.default_device() == mx.Device(mx.cpu):
        return None
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return int(recommended) if recommended else None


@contextmanager
def wired() -> Iterator[int | None]:
    """Raise the limit to the recommended size inside, and put it back. Yields the limit, None without one."""
    recommended = recommended_bytes()
    if recommended is None:
        yield None
        return
    before = mx.set_wired_limit(recommended)
    try:
        yield recommended
    finally:
        mx.synchronize()  # the limit must not change under a computation that runs
        mx.set_wired_limit(before)
