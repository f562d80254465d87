"""Adapters' updates in host memory, by what they do. Those not used longest leave; a file keeps what nobody else has.

Kept is what the bank would hold, in the network's own dtype, bit for bit. Safe to call from any thread; files are
written and read on the caller's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from serve.adapters.fitting.update import LowRank
from serve.beside import evaluate
from serve.own_folder import OwnFolder, clear_abandoned

logger = logging.getLogger(__name__)

FIELDS = tuple(each.name for each in dataclasses.fields(LowRank))
BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
PREFIX = "lathe-adapters-"
"""Of the folder of its files."""
SEPARATOR = "|"
"""In a file's names, between a module's path and a field: no path has it."""


class Kept(NamedTuple):
    """One array outside MLX: its bits, and what they are."""

    bits: np.ndarray
    dtype: mx.Dtype


Packed = dict[str, dict[str, Kept]]
"""By module path and field."""


def as_banked(updates: Mapping[str, LowRank], dtype: mx.Dtype) -> dict[str, LowRank]:
    """The updates as a bank of that dtype holds them. Evaluated."""
    made = {
        path: _of_arrays({name: value.astype(dtype) for name, value in _arrays(update).items()})
        for path, update in updates.items()
    }
    evaluate([_arrays(update) for update in made.values()])
    return made


def num_bytes_of(updates: Mapping[str, LowRank]) -> int:
    """Of all their arrays."""
    return sum(value.nbytes for update in updates.values() for value in _arrays(update).values())


def packed_of(updates: Mapping[str, LowRank]) -> Packed:
    """Copies outside MLX. On the thread that made the arrays: hundreds of megabytes take a while."""
    return {
        path: {name: _kept(value) for name, value in _arrays(update).items()}
        for path, update in updates.items()
    }


class Shelf:
    """Updates by key.

    max_file_bytes  of all files together; the oldest give way
    is_safe         whether what has this key can be had from somewhere else: what leaves memory then needs no file
    """

    def __init__(self, max_file_bytes: int, is_safe: Callable[[str], bool]) -> None:
        self.num_changes = 0
        """Grows whenever `num_bytes` may be another."""
        self.num_dropped = 0
        """Keys that left memory for want of room."""
        self._max_file_bytes = max_file_bytes
        self._is_safe = is_safe
        self._lock = threading.Lock()  # guards what follows
        self._packed: OrderedDict[str, Packed] = OrderedDict()  # the one used last at the end
        self._sizes: dict[str, int] = {}
        self._num_bytes = 0
        self._holds: Counter[str] = Counter()
        self._files: OrderedDict[str, tuple[Path, int]] = OrderedDict()  # the oldest first
        self._own: OwnFolder | None = None

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._num_bytes

    @property
    def num_held_bytes(self) -> int:
        """Of what cannot leave now."""
        with self._lock:
            return sum(self._sizes.get(key, 0) for key in self._holds)

    @property
    def num_file_bytes(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(size for _, size in self._files.values())

    @property
    def keys(self) -> frozenset[str]:
        """Whatever is in memory or in a file."""
        with self._lock:
            return frozenset((*self._packed, *self._files))

    def tier(self, key: str) -> str | None:
        """`host`, `file`, or None where it is in neither."""
        with self._lock:
            return "host" if key in self._packed else "file" if key in self._files else None

    def hold(self, key: str) -> None:
        """What has this key does not leave memory until `release`, whatever the bound."""
        with self._lock:
            self._holds[key] += 1

    def release(self, key: str) -> None:
        """Once for each `hold`."""
        with self._lock:
            self._holds[key] -= 1
            if not self._holds[key]:
                del self._holds[key]

    def put(self, key: str, packed: Packed) -> None:
        """Keep it in memory; whoever is bound makes room before. Nothing is copied any more."""
        with self._lock:
            if key not in self._packed:
                self._packed[key] = packed
                self._sizes[key] = sum(
                    kept.bits.nbytes for parts in packed.values() for kept in parts.values()
                )
                self._num_bytes += self._sizes[key]
                self.num_changes += 1
            self._packed.move_to_end(key)

    def get(self, key: str) -> dict[str, LowRank] | None:
        """Arrays of one's own; None where it is neither in memory nor in a file."""
        with self._lock:
            packed = self._packed.get(key)
            if packed is not None:
                self._packed.move_to_end(key)
            file = self._files.get(key)
        if packed is not None:
            made = {path: _of_arrays(_arrays_of(parts)) for path, parts in packed.items()}
            evaluate([_arrays(update) for update in made.values()])  # on the thread that made them
            return made
        return _read(file[0]) if file is not None else None

    def make_room(self, max_bytes: int) -> None:
        """Let go of what was not used longest, until no more than so many bytes are there, or the rest is held."""
        while self._num_bytes > max(max_bytes, 0):
            with self._lock:
                key = next((key for key in self._packed if key not in self._holds), None)
            if key is None:
                return
            if not self._is_safe(key) and self.tier(key) == "host":
                updates = self.get(key)
                if updates is not None:
                    self._write(key, updates)
            with self._lock:
                if key in self._packed and key not in self._holds:
                    self._drop(key)
                    self.num_dropped += 1

    def forget(self, key: str) -> None:
        """Nobody needs it any more, in memory or on disk."""
        with self._lock:
            if key in self._packed:
                self._drop(key)
            file = self._files.pop(key, None)
        if file is not None:
            file[0].unlink(missing_ok=True)

    def close(self) -> None:
        """Delete all files."""
        with self._lock:
            own, self._own = self._own, None
            self._files.clear()
        if own is not None:
            own.close()

    def check_integrity(self) -> None:
        """The account is what is there."""
        with self._lock:
            assert self._packed.keys() == self._sizes.keys()
            layers = [parts for packed in self._packed.values() for parts in packed.values()]
            held = sum(kept.bits.nbytes for parts in layers for kept in parts.values())
            assert held == self._num_bytes == sum(self._sizes.values()), "bytes are counted wrong"
            assert sum(size for _, size in self._files.values()) <= self._max_file_bytes, (
                "files outgrow their bound"
            )
            assert all(path.exists() for path, _ in self._files.values()), "a file is gone"

    def _drop(self, key: str) -> None:
        del self._packed[key]
        self._num_bytes -= self._sizes.pop(key)
        self.num_changes += 1

    def _write(self, key: str, updates: Mapping[str, LowRank]) -> bool:
        """A file of it, older ones giving way. False where there is no room, or the disk refuses."""
        num_bytes = num_bytes_of(updates)
        if num_bytes > self._max_file_bytes:
            return False
        if self._own is None:
            clear_abandoned(PREFIX)
        with self._lock:
            if key in self._files:
                return True
            try:
                self._own = self._own or OwnFolder(PREFIX)
            except OSError as error:
                logger.warning("no temporary folder for adapters that leave memory: %s", error)
                return False
            path = self._own.path / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        named = {
            f"{module}{SEPARATOR}{name}": value
            for module, update in updates.items()
            for name, value in _arrays(update).items()
        }
        new = path.with_name(f"new-{threading.get_ident()}-{path.name}")
        try:
            mx.save_safetensors(str(new), named)
            os.replace(new, path)
        except (OSError, RuntimeError) as error:
            new.unlink(missing_ok=True)
            logger.warning("an adapter that left memory cannot be kept in a file: %s", error)
            return False
        with self._lock:
            self._files[key] = (path, num_bytes)
            gone = []
            while sum(size for _, size in self._files.values()) > self._max_file_bytes:
                gone.append(self._files.popitem(last=False)[1][0])
        for old in gone:
            old.unlink(missing_ok=True)
        return True


def _read(path: Path) -> dict[str, LowRank] | None:
    try:
        named = cast(dict[str, mx.array], mx.load(str(path)))
        evaluate(named)
    except (OSError, RuntimeError) as error:
        logger.warning("an adapter that was kept in a file cannot be read: %s", error)
        return None
    found: dict[str, dict[str, mx.array]] = {}
    for name, value in named.items():
        module, _, part = name.rpartition(SEPARATOR)
        found.setdefault(module, {})[part] = value
    return {module: _of_arrays(parts) for module, parts in found.items()}


def _arrays(update: LowRank) -> dict[str, mx.array]:
    """By field, those there are."""
    found = {name: getattr(update, name) for name in FIELDS}
    return {name: value for name, value in found.items() if isinstance(value, mx.array)}


def _of_arrays(arrays: Mapping[str, mx.array]) -> LowRank:
    parts: dict[str, Any] = {**dict.fromkeys(FIELDS), **arrays}
    return LowRank(**parts)


def _kept(value: mx.array) -> Kept:
    return Kept(np.array(mx.contiguous(value).view(BITS[value.dtype.size])), value.dtype)


def _arrays_of(parts: Mapping[str, Kept]) -> dict[str, mx.array]:
    return {name: mx.array(kept.bits).view(kept.dtype) for name, kept in parts.items()}
