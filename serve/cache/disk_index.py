"""The index of segments on disk, in SQLite: which files there are, and of which tokens."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

FORMAT = "2"
"""Another one's files are removed. Changes with what is in a file, or what it means."""


class Record(NamedTuple):
    """One segment's file, as the index tells it."""

    key: str
    space: str
    digest: bytes
    start: int
    tokens: bytes
    num_window_tokens: int
    has_state: int
    precision: str
    num_bytes: int
    checksum: int
    used_at: float


class Index:
    """What is in the folder. One that cannot be read, or is another format's or base's, begins anew."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        try:
            self._open()
            said = dict(self._connection.execute("SELECT name, value FROM facts"))
            problems = self._connection.execute("PRAGMA quick_check").fetchall()
        except sqlite3.DatabaseError as error:
            said, problems = {}, [error]
        facts = {"format": FORMAT, "fingerprint": fingerprint}
        if said != facts:
            if said or problems not in ([], [("ok",)]):
                logger.warning("%s is another base's or not whole; its prefixes are removed", path)
            self._start_anew(facts)

    def records(self) -> list[Record]:
        """All that can be read."""
        return [Record(*values) for values in self._connection.execute("SELECT * FROM segments")]

    def add(self, record: Record) -> None:
        """A file is there."""
        marks = ", ".join("?" * len(record))
        with self._connection:
            self._connection.execute(f"INSERT OR REPLACE INTO segments VALUES ({marks})", record)

    def delete(self, keys: list[str]) -> None:
        """Files that are to go."""
        if keys:
            with self._connection:
                self._connection.executemany("DELETE FROM segments WHERE key = ?", [(key,) for key in keys])

    def touch(self, uses: Mapping[str, float]) -> None:
        """Times of last uses, by key."""
        if uses:
            values = [(used_at, key) for key, used_at in uses.items()]
            with self._connection:
                self._connection.executemany("UPDATE segments SET used_at = ? WHERE key = ?", values)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def _open(self) -> None:
        self._connection = sqlite3.connect(self._path, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        self._connection.execute("PRAGMA journal_size_limit = 1048576")
        with self._connection:
            self._connection.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT)")

    def _start_anew(self, facts: Mapping[str, str]) -> None:
        self._connection.close()
        for suffix in ("", "-wal", "-shm"):
            self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
        self._open()
        with self._connection:
            self._connection.execute(
                "CREATE TABLE segments (key TEXT PRIMARY KEY, space TEXT, digest BLOB, start INTEGER, tokens BLOB, "
                "num_window_tokens INTEGER, has_state INTEGER, precision TEXT, num_bytes INTEGER, checksum INTEGER, "
                "used_at REAL)"
            )
            self._connection.executemany("INSERT INTO facts VALUES (?, ?)", list(facts.items()))
