"""Waiting for what other threads do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


def until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    """What it waits for comes, or the test fails."""
    waited, end_s = threading.Event(), time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "it never came"
        waited.wait(0.01)
