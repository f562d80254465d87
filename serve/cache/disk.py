"""Segments on disk: one safetensors file each, found through a small SQLite index; whole after any crash.

A file is named by its content: base, space, all tokens up to the segment's end. A thread of its own writes, and no
step waits for it; what it cannot write, or not fast enough, is lost to the disk and to nothing else. The index is
loaded when the folder is opened; files that it does not know, and records whose file is not whole, are removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import queue
import re
import sqlite3
import threading
import time
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np

from serve.cache.disk_index import FORMAT, Index, Record
from serve.cache.precision import KvPrecision
from serve.cache.segment_file import HostArray, from_bytes, read_whole, to_bytes
from serve.cache.tree import TOKEN_BYTES, Space
from serve.errors import ConfigError

logger = logging.getLogger(__name__)

NAME = re.compile(r"kv-[0-9a-f]{40}\.safetensors(\.new)?")
INDEX, LOCK = "index.sqlite", "lock"
MAX_PENDING_BYTES = 256 << 20
MAX_PENDING = 256
CLOSE_TIMEOUT_S = 30.0
HEADER_BYTES = 16 << 10
"""More than a file has beside its arrays; what it really has is counted when it is written."""


class Codec(Protocol):
    """Segments as bytes and back, bit for bit."""

    def dump(self, segment: Any) -> tuple[dict[str, HostArray], dict[str, str]]:
        """Arrays by name, and what they do not tell. Runs on the disk's thread, over arrays that are evaluated."""

    def load(self, arrays: Mapping[str, HostArray], meta: Mapping[str, str]) -> Any:
        """The segment. ValueError or LookupError for what never was one."""


class StoredFile:
    """One segment's file, written or about to be. The thread that steps the engine owns all but `checksum`."""

    def __init__(
        self,
        key: str,
        start: int,
        num_tokens: int,
        num_window_tokens: int,
        has_state: bool,
        precision: KvPrecision,
        num_bytes: int,
        checksum: int = 0,
        used_at: float = 0.0,
    ) -> None:
        self.key = key
        self.start = start
        self.num_tokens = num_tokens
        self.num_window_tokens = num_window_tokens
        self.has_state = has_state
        self.precision = precision
        self.num_bytes = num_bytes
        self.checksum = checksum
        self.used_at = used_at
        self.payload: Any = None
        """The segment, until it is written."""
        self.payload_bytes = 0
        """Memory that it holds."""
        self.num_parts = 0
        """Stretches of it in the tree."""
        self.node: Any = None
        """The tree's node where it ends; its other parts are before that."""

    @property
    def name(self) -> str:
        """Of the file."""
        return f"kv-{self.key}.safetensors"

    def stored(self) -> Stored:
        """All of it, for the tree."""
        self.num_parts += 1
        return Stored(self, 0, self.num_tokens)


class Stored:
    """Tokens [start, start + num_tokens) of a file's segment: a payload of the tree's second tier."""

    __slots__ = ("file", "num_tokens", "start")

    def __init__(self, file: StoredFile, start: int, num_tokens: int) -> None:
        self.file = file
        self.start = start
        self.num_tokens = num_tokens

    @property
    def num_bytes(self) -> int:
        """Its tokens alone: what the disk holds is counted by files."""
        return self.num_tokens

    @property
    def precision(self) -> KvPrecision:
        """Of the segment."""
        return self.file.precision

    @property
    def num_window_tokens(self) -> int:
        """Of its last tokens."""
        behind = self.file.num_tokens - self.start - self.num_tokens
        return min(max(self.file.num_window_tokens - behind, 0), self.num_tokens)

    @property
    def has_state(self) -> bool:
        """The file's state is behind its last token."""
        return self.file.has_state and self.start + self.num_tokens == self.file.num_tokens

    def cut(self, at: int) -> tuple[Stored, Stored]:
        """The same file, twice."""
        self.file.num_parts += 1
        first = Stored(self.file, self.start, at)
        return first, Stored(self.file, self.start + at, self.num_tokens - at)

    def part_of(self, segment: Any) -> Any:
        """These tokens of the file's segment."""
        if self.start + self.num_tokens < segment.num_tokens:
            segment = segment.cut(self.start + self.num_tokens)[0]
        return segment if self.start == 0 else segment.cut(self.start)[1]


class _Write(NamedTuple):
    file: StoredFile
    space: str
    digest: bytes
    """Of all tokens before it."""
    tokens: bytes
    segment: Any


class Disk:
    """A folder of segments for one base. One process at a time has it; ConfigError names the one that does.

    max_bytes    of files together; the caller makes room before it writes
    fingerprint  of the base's weights: what another base has left in the folder is removed
    setting      by which users name the folder
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        fingerprint: str,
        codec: Codec,
        setting: str = "prefix_cache_dir",
    ) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.num_bytes = 0
        """Of all files, those about to be written included."""
        self.num_errors = self.num_dropped = 0
        self.waiting: dict[StoredFile, None] = {}
        """Files whose outcome is not settled, oldest first; their segments are still held."""
        self._fingerprint = fingerprint
        self._codec = codec
        self._outcomes: queue.SimpleQueue[tuple[StoredFile, int | None]] = queue.SimpleQueue()
        self._condition = threading.Condition()  # guards what follows
        self._queue: OrderedDict[StoredFile, _Write | None] = OrderedDict()
        """What is to be written, oldest first; None where the thread has begun with it."""
        self._removals: list[str] = []
        self._uses: dict[str, float] = {}
        self._is_busy = self._is_closing = False
        self._is_told: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = _lock(folder, setting)
            self._index = Index(folder / INDEX, fingerprint)
            self._found = self._take_stock()
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"{setting} {folder} cannot be used: {error}") from error
        self._thread = threading.Thread(target=self._run, name="lathe-prefix-disk", daemon=True)
        self._thread.start()

    def take_found(self) -> Iterator[tuple[Space, bytes, StoredFile]]:
        """What an earlier process has left: space, tokens up to the segment's end, its file. Beginnings come first.

        Once. A file whose beginning is nowhere is removed.
        """
        found, self._found = self._found, []
        yield from self._texts(found)

    def size_of(self, segment: Any) -> int:
        """At most so many bytes of the disk."""
        return int(segment.num_bytes) + HEADER_BYTES + 8 * int(segment.num_tokens)

    def write(self, space: Space, tokens: bytes, start: int, segment: Any, num_bytes: int) -> StoredFile:
        """Have a segment written that ends these tokens, of `num_bytes` by `size_of`; `settle` tells how it went.

        Where too many wait already, the oldest of them is given up.
        """
        behind = self._digest(space, tokens)
        window = int(segment.num_window_tokens)
        precision = segment.precision
        kind = f"{start} {window} {segment.has_state} {precision.label}".encode()
        file = StoredFile(
            hashlib.blake2b(behind + kind, digest_size=20).hexdigest(),
            start,
            segment.num_tokens,
            window,
            segment.has_state,
            precision,
            num_bytes,
            used_at=time.time(),
        )
        file.payload, file.payload_bytes = segment, segment.num_bytes
        before = self._digest(space, tokens[: start * TOKEN_BYTES])
        write = _Write(file, json.dumps(space), before, tokens[start * TOKEN_BYTES :], segment)
        self.num_bytes += num_bytes
        self.waiting[file] = None
        with self._condition:
            self._queue[file] = write
            self._drop_oldest()
            self._condition.notify_all()
        return file

    def cancel(self, file: StoredFile) -> bool:
        """Give up a file that waits; False if the thread has begun with it. The caller removes it."""
        with self._condition:
            if self._queue.get(file) is None:
                return False
            del self._queue[file]
        self.num_dropped += 1
        return True

    def read(self, file: StoredFile) -> Any | None:
        """The segment; None if its file is gone or not whole, which is told once and counted."""
        if file.payload is not None:
            return file.payload
        try:
            data = read_whole(self.folder / file.name, file.num_bytes)
            if zlib.crc32(data) != file.checksum:
                raise ValueError("its checksum is another")
            return self._codec.load(*from_bytes(data))
        except (OSError, ValueError, LookupError, TypeError) as error:
            self._tell("read", f"{self.folder / file.name} cannot be read, and is computed anew: {error}")
            return None

    def use(self, file: StoredFile, now: float) -> None:
        """It was used: of two files the one used later leaves later, after a restart too."""
        file.used_at = now
        with self._condition:
            self._uses[file.key] = now

    def remove(self, file: StoredFile) -> None:
        """It is not needed: given up if it still waits, deleted if it is there."""
        self.num_bytes -= file.num_bytes
        self.waiting.pop(file, None)
        file.payload = None
        with self._condition:
            if self._queue.pop(file, None) is None:
                self._removals.append(file.key)
            self._uses.pop(file.key, None)
            self._condition.notify_all()

    def settle(self) -> list[tuple[StoredFile, bool]]:
        """Files whose writing has ended since, and whether they are there. The caller removes those that are not."""
        settled = []
        while not self._outcomes.empty():
            file, num_bytes = self._outcomes.get()
            if file not in self.waiting:  # removed meanwhile
                continue
            del self.waiting[file]
            file.payload = None
            if num_bytes is not None:
                self.num_bytes += num_bytes - file.num_bytes
                file.num_bytes = num_bytes
            settled.append((file, num_bytes is not None))
        return settled

    def flush(self, timeout_s: float = CLOSE_TIMEOUT_S) -> bool:
        """Wait until nothing waits to be written or deleted; False if that takes too long."""
        with self._condition:
            return self._condition.wait_for(lambda: not (self._has_work() or self._is_busy), timeout_s)

    def close(self) -> None:
        """Write what waits, and let go of the folder."""
        self.flush()
        with self._condition:
            self._is_closing = True
            self._condition.notify_all()
        self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._index.close()
        self._lock.close()

    # At the start

    def _take_stock(self) -> list[Record]:
        """Records whose files are there; all else of ours is removed."""
        records = {f"kv-{record.key}.safetensors": record for record in self._index.records()}
        there = {entry.name: entry for entry in os.scandir(self.folder) if NAME.fullmatch(entry.name)}
        whole = {
            name
            for name, record in records.items()
            if name in there and there[name].stat().st_size == record.num_bytes
        }
        self._index.delete([record.key for name, record in records.items() if name not in whole])
        for name in there.keys() - whole:
            (self.folder / name).unlink()
        return [records[name] for name in whole]

    def _texts(self, records: list[Record]) -> Iterator[tuple[Space, bytes, StoredFile]]:
        """Records with the tokens before them, which are another's, or the first of them."""
        starts: dict[str, set[int]] = {}
        behind: dict[bytes, list[Record]] = {}
        for record in records:
            starts.setdefault(record.space, set()).add(record.start)
            if record.start > 0:
                behind.setdefault(record.digest, []).append(record)
        ordered = {space: sorted(each) for space, each in starts.items()}
        stack = [(record, b"") for record in records if record.start == 0]
        while stack:
            record, before = stack.pop()
            tokens, space = before + record.tokens, _space(record.space)
            first = bisect_right(ordered[record.space], record.start)
            last = bisect_right(ordered[record.space], len(tokens) // TOKEN_BYTES)
            ends = ordered[record.space][first:last]
            for end, digest in zip(ends, self._digests(space, tokens, ends), strict=True):
                stack += [(child, tokens[: end * TOKEN_BYTES]) for child in behind.pop(digest, ())]
            file = _file(record)
            self.num_bytes += file.num_bytes
            yield space, tokens, file
        with self._condition:
            self._removals += [record.key for orphans in behind.values() for record in orphans]
            self._condition.notify_all()

    def _digest(self, space: Space, tokens: bytes) -> bytes:
        return next(self._digests(space, tokens, [len(tokens) // TOKEN_BYTES]))

    def _digests(self, space: Space, tokens: bytes, ends: Iterable[int]) -> Iterator[bytes]:
        """Names of a space's first tokens up to each of these ends, which ascend."""
        head = json.dumps([FORMAT, self._fingerprint, *space]).encode()
        hashed, position = hashlib.blake2b(head + b"\n", digest_size=20), 0
        for end in ends:
            hashed.update(tokens[position * TOKEN_BYTES : end * TOKEN_BYTES])
            position = end
            yield hashed.copy().digest()

    # The thread that writes

    def _run(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """What there is to do, once there is something; False after the last. What it wrote is let go of at its end:
        a thread that waits holds no segment."""
        with self._condition:
            self._condition.wait_for(lambda: self._has_work() or self._is_closing)
            is_last = not self._has_work()
            removals, self._removals = self._removals, []
            uses, self._uses = self._uses, {}
            write = next((one for one in self._queue.values() if one is not None), None)
            if write is not None:
                self._queue[write.file] = None
            self._is_busy = True
        self._guarded("clean", lambda: self._clean(removals, uses))
        if write is not None:
            self._try_write(write)
        with self._condition:
            self._is_busy = False
            self._condition.notify_all()
        return not is_last

    def _has_work(self) -> bool:
        is_due = self._removals or len(self._uses) > MAX_PENDING
        return bool(is_due or any(write is not None for write in self._queue.values()))

    def _try_write(self, write: _Write) -> None:
        num_bytes = self._guarded("write", lambda: self._write_file(write))
        with self._condition:
            self._queue.pop(write.file, None)
        self._outcomes.put((write.file, num_bytes))

    def _write_file(self, write: _Write) -> int:
        """Bytes written. The file is whole before it has its name, and has its name before the index knows it."""
        file = write.file
        arrays, meta = self._codec.dump(write.segment)
        meta = {
            **meta,
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "key": file.key,
            "space": write.space,
            "tokens": " ".join(
                str(key) if key >= 0 else "*" for key in np.frombuffer(write.tokens, np.int64)
            ),
        }
        data = to_bytes(arrays, meta)
        path = self.folder / file.name
        new = path.with_name(f"{file.name}.new")
        try:
            with new.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(new, path)
            file.checksum = zlib.crc32(data)
            self._index.add(_record(write, len(data)))
        except BaseException:
            for left in (new, path):
                with contextlib.suppress(OSError):
                    left.unlink()
            raise
        return len(data)

    def _clean(self, removals: list[str], uses: Mapping[str, float]) -> None:
        # The record first: a file without one is removed at the next start, and one without a file is found then.
        self._index.touch(uses)
        self._index.delete(removals)
        for key in removals:
            (self.folder / f"kv-{key}.safetensors").unlink(missing_ok=True)

    def _guarded(self, what: str, function: Callable[[], int | None]) -> int | None:
        try:
            return function()
        except Exception as error:  # whatever it is, the engine's steps must not hear of it
            self._tell(what, f"what is for {self.folder} cannot be kept: {error!r}")
            return None

    def _tell(self, what: str, message: str) -> None:
        """Count a failure, and log the first of its kind."""
        self.num_errors += 1
        if what not in self._is_told:
            self._is_told.add(what)
            logger.warning("%s; this is told once, and counted in /metrics", message)

    def _drop_oldest(self) -> None:
        writes = [write for write in self._queue.values() if write is not None]
        num_bytes = sum(write.file.payload_bytes for write in writes)
        while len(writes) > 1 and (len(writes) > MAX_PENDING or num_bytes > MAX_PENDING_BYTES):
            write = writes.pop(0)
            num_bytes -= write.file.payload_bytes
            del self._queue[write.file]
            self.num_dropped += 1
            self._outcomes.put((write.file, None))


def _record(write: _Write, num_bytes: int) -> Record:
    file = write.file
    return Record(
        file.key,
        write.space,
        write.digest,
        file.start,
        write.tokens,
        file.num_window_tokens,
        int(file.has_state),
        json.dumps(asdict(file.precision)),
        num_bytes,
        file.checksum,
        file.used_at,
    )


def _file(record: Record) -> StoredFile:
    """As it is in the folder."""
    return StoredFile(
        record.key,
        record.start,
        len(record.tokens) // TOKEN_BYTES,
        record.num_window_tokens,
        bool(record.has_state),
        KvPrecision(**json.loads(record.precision)),
        record.num_bytes,
        record.checksum,
        record.used_at,
    )


def _lock(folder: Path, setting: str) -> IO[str]:
    """Held as long as the file is open; the system lets go of it whatever ends the process."""
    stream = (folder / LOCK).open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        owner = stream.read().strip()
        stream.close()
        raise ConfigError(
            f"{setting} {folder} is in use by process {owner or '?'}; give each server a folder of its own"
        ) from None
    stream.truncate(0)
    stream.write(f"{os.getpid()}\n")
    stream.flush()
    return stream


def _space(said: str) -> Space:
    return Space._make(json.loads(said))
