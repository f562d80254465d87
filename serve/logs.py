"""What a server writes down: log records in, lines on standard error out, for people or as JSON.

Whoever reads the lines may be slow: a thread of its own writes them, and what it has no room for is dropped and
counted, so that no request waits for a log.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TextIO

OURS = ("serve", "train", "lathe")
"""Loggers whose records are written from the level on that was asked for; others' from warnings on."""
ROOM = 10_000
"""Lines that wait to be written."""
CLOSE_S = 2.0
BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:/+@-#")
"""Of a value that text shows without quotes."""
SHOWN_ALREADY = frozenset(("method", "path", "status"))
"""What the words of a request's line say."""

Format = Literal["text", "json"]


class JsonLines(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        """A line, whatever the record holds."""
        line: dict[str, Any] = {
            "time": _time_of(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **fields_in(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=repr)


class TextLines(logging.Formatter):
    """One line a record for people, and a traceback under it; what is quoted cannot end a line or colour it."""

    def format(self, record: logging.LogRecord) -> str:
        """A line."""
        words = [_time_of(record), f"{record.levelname:<7}", _shown(record.getMessage(), is_prose=True)]
        fields = fields_in(record)
        if "status" in fields:
            fields = {name: value for name, value in fields.items() if name not in SHOWN_ALREADY}
        words += [f"{name}={_shown(value)}" for name, value in fields.items()]
        line = " ".join(words)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Unhurried(logging.Handler):
    """Hands lines to a thread that writes them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.num_dropped = 0
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(ROOM)
        self._thread = threading.Thread(target=self._write, name="lathe-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record's line."""
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self.num_dropped += 1
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Write what waits, as far as that goes quickly."""
        end_s = time.monotonic() + CLOSE_S
        try:
            self._lines.put(None, timeout=CLOSE_S)
        except queue.Full:
            pass  # nobody reads it
        else:
            self._thread.join(max(end_s - time.monotonic(), 0))
        super().close()

    def _write(self) -> None:
        told = 0
        while (line := self._lines.get()) is not None:
            try:
                self._stream.write(line + "\n")
                if (dropped := self.num_dropped) > told:
                    self._stream.write(
                        f"{dropped - told} lines of the log were dropped: it is read too slowly\n"
                    )
                    told = dropped
                self._stream.flush()
            except (OSError, ValueError):
                continue  # nobody reads it; the server serves on


@contextmanager
def logging_to(level: str, format: Format, stream: TextIO | None = None) -> Iterator[logging.Handler]:
    """Inside, records are written to `stream`, standard error if none; then logging is as it was."""
    handler = _Unhurried(stream or sys.stderr)
    handler.setFormatter(JsonLines() if format == "json" else TextLines())
    root = logging.getLogger()
    before = root.level, [*root.handlers], {name: logging.getLogger(name).level for name in OURS}
    root.handlers[:] = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    for name in OURS:
        logging.getLogger(name).setLevel(level.upper())
    try:
        yield handler
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        for name, old in before[2].items():
            logging.getLogger(name).setLevel(old)
        handler.close()


def fields_in(record: logging.LogRecord) -> dict[str, Any]:
    """What a record says beside its words: logger.info(words, extra={"fields": …})."""
    found = getattr(record, "fields", None)
    return dict(found) if isinstance(found, dict) else {}


def _time_of(record: logging.LogRecord) -> str:
    """UTC, to the millisecond."""
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.created % 1 * 1000):03d}Z"


def _shown(value: Any, *, is_prose: bool = False) -> str:
    """A value as text shows it: bare, or in quotes and escaped."""
    if isinstance(value, int | float) or (isinstance(value, str) and value and BARE.issuperset(value)):
        return str(value)
    if isinstance(value, str) and is_prose:
        if value.isprintable():
            return value
        return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in value).replace(
            "\n", "\n  "
        )
    return json.dumps(value, ensure_ascii=True, default=repr)
