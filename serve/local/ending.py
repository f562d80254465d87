"""Threads that have ended in Python, waited for until they have ended in the system too.

MLX keeps things for each thread that used it, and destroys them as the system's thread ends, with the interpreter's
lock. `Thread.join` returns before that (until Python 3.13), and an interpreter that is gone by then aborts the
process: "terminate called without an active exception".
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from pathlib import Path

TASKS = Path("/proc/self/task")
POLL_S = 0.002
TIMEOUT_S = 5.0
BLIND_S = 0.1
"""Where the system does not say which threads there are."""


def wait_for_ended(threads: Collection[threading.Thread]) -> None:
    """Of these, wait for those that run no more. They need the interpreter's lock, which is free meanwhile.

    Not for the caller: as a process ends, its main thread is said to run no more, and it is who waits.
    """
    here = threading.get_native_id()
    ended = [each.native_id for each in threads if not each.is_alive() and each.native_id != here]
    if not ended:
        return
    if not TASKS.exists():
        time.sleep(BLIND_S)
        return
    deadline_s = time.monotonic() + TIMEOUT_S
    while any((TASKS / str(each)).exists() for each in ended) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
