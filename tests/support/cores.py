"""Which cores a process may run on: of several that test, each keeps to one, and what they start has them all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

ALL = "TEST_CORES"
"""The variable in which the cores that there were stand, for `tests/children`."""


def keep_to_one() -> None:
    """One of several processes that test, of which there are more than cores: it keeps to one, with all its threads.

    MLX hands each operation to a thread of its own, and between cores that takes longer than a tiny operation. Nor
    does that thread take the core at once each time, but once what hands over waits: a fifth less of all time.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    cores = sorted(os.sched_getaffinity(0))
    if int(os.environ["PYTEST_XDIST_WORKER_COUNT"]) > len(cores):
        os.environ[ALL] = ",".join(map(str, cores))
        worker = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        os.sched_setaffinity(0, {cores[worker % len(cores)]})


@contextmanager
def all_of_them() -> Iterator[None]:
    """What this thread starts inside has every core."""
    if ALL not in os.environ:
        yield
        return
    kept = os.sched_getaffinity(0)
    os.sched_setaffinity(0, map(int, os.environ[ALL].split(",")))
    try:
        yield
    finally:
        os.sched_setaffinity(0, kept)
