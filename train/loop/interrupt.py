"""SIGINT and SIGTERM as a question asked between steps. Signals in, numbers out; knows no trainer."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Signals caught so far; the first asks the run to end, a second SIGINT breaks it off at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    earlier: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, earlier[number])

    handler: Callable[[int, Any], None] = note
    for number in (signal.SIGINT, signal.SIGTERM):
        earlier[number] = signal.signal(number, handler)
    try:
        yield caught
    finally:
        for restored, before in earlier.items():
            signal.signal(restored, before)
