"""What versions hold, wherever it is now: in host memory, in a file of the server's own, or where it came from.

Content is known by its effect: versions that do the same share it, and each one's source can give it to all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Literal

import mlx.core as mx

from serve.adapters.fitting.update import LowRank
from serve.adapters.residency.shelf import Shelf, as_banked
from serve.adapters.versions.source import Fitting, Source
from serve.adapters.versions.version import AdapterVersion
from serve.errors import AdapterGoneError, LatheError

Tier = Literal["host", "file", "source", "gone"]


class Contents:
    """Of every version that is known. Safe to call from any thread; what reads, blocks."""

    def __init__(self, fitting: Fitting, dtype: mx.Dtype, *, max_file_bytes: int) -> None:
        self.shelf = Shelf(max_file_bytes, self._can_be_read_again)
        self._fitting = fitting
        self._dtype = dtype
        self._lock = threading.Lock()
        self._sources: dict[str, dict[str, Source]] = {}  # by effect hash and version id
        self._held: dict[str, int] = {}  # by effect hash: requests that need it, wherever it came from

    @property
    def keys(self) -> frozenset[str]:
        """Effect hashes of what is known."""
        with self._lock:
            return frozenset(self._sources)

    def add(self, version: AdapterVersion, source: Source) -> None:
        """A version is known, and may be read from `source`."""
        with self._lock:
            self._sources.setdefault(version.effect_hash, {})[version.id] = source

    def drop(self, version: AdapterVersion) -> None:
        """It is known no more. What nobody else has is forgotten."""
        key = version.effect_hash
        with self._lock:
            left = self._sources.get(key, {})
            left.pop(version.id, None)
            if left:
                return
            self._sources.pop(key, None)
        self.shelf.forget(key)

    def sweep(self, version: AdapterVersion) -> None:
        """Something may have been put on the shelf for a version that was dropped meanwhile."""
        with self._lock:
            is_known = version.effect_hash in self._sources
        if not is_known:
            self.shelf.forget(version.effect_hash)

    def hold(self, version: AdapterVersion) -> None:
        """A request needs it from now on: it must not be lost, even if its source is intact for now."""
        with self._lock:
            self._held[version.effect_hash] = self._held.get(version.effect_hash, 0) + 1

    def let_go(self, version: AdapterVersion) -> None:
        """That request has ended."""
        with self._lock:
            self._held[version.effect_hash] -= 1
            if not self._held[version.effect_hash]:
                del self._held[version.effect_hash]

    def tier(self, version: AdapterVersion) -> Tier:
        """Where it would be read from. "source" as far as can be told without reading."""
        found = self.shelf.tier(version.effect_hash)
        if found is not None:
            return "host" if found == "host" else "file"
        return "source" if any(each.is_intact for each in self._sources_of(version)) else "gone"

    def read(self, version: AdapterVersion) -> dict[str, LowRank]:
        """Its updates, as the bank holds them, from a file or from a source.

        AdapterGoneError says where they were looked for, and what was there.
        """
        kept = self.shelf.get(version.effect_hash)
        if kept is not None:
            return kept
        reasons = []
        for source in self._sources_of(version):
            try:
                content = source.read(version.name, self._fitting)
            except LatheError as error:
                reasons.append(f"{source.path}: {error}")
                continue
            if content.effect_hash == version.effect_hash:
                return as_banked(content.updates, self._dtype)
            reasons.append(
                f"{source.path} holds another one now (content hash {content.content_hash[:19]}…, it was "
                f"{version.content_hash[:19]}…)"
            )
        told = "\n  ".join(reasons) or "nothing is known of where it came from"
        raise AdapterGoneError(
            f"adapter {version.id!r} is gone: it has left memory, and cannot be read again: {told}"
        )

    def prepared(self, updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """What was just read, as the bank holds it."""
        return as_banked(updates, self._dtype)

    def num_bytes(self, num_values: int) -> int:
        """Of the updates that are made of so many values."""
        return num_values * self._dtype.size

    def check_integrity(self) -> None:
        """Nothing is kept of what nobody knows."""
        self.shelf.check_integrity()
        with self._lock:
            assert all(self._sources.values()), "content that no version has"
            known = frozenset(self._sources)
        assert self.shelf.keys <= known, "updates are kept of a version that is known no more"

    def _sources_of(self, version: AdapterVersion) -> list[Source]:
        with self._lock:
            return list(self._sources.get(version.effect_hash, {}).values())

    def _can_be_read_again(self, key: str) -> bool:
        with self._lock:
            if self._held.get(key):
                return False
            sources = list(self._sources.get(key, {}).values())
        return any(source.is_intact for source in sources)
