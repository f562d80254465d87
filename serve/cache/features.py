"""What towers have made of pictures: found by content, kept in memory and perhaps on disk, forgotten when not used.

A picture is kept as a text of one token is (`PrefixCache`), in a space of its own, so it leaves, survives restarts
and is told in the same way. No arrays. The thread that steps the engine alone calls it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from serve.cache.disk import Disk
from serve.cache.precision import PLAIN, KvPrecision
from serve.cache.prefix import Match, PrefixCache, Space
from serve.cache.stats import PrefixStats

WHOLE = (0,)
"""The one token of a picture's text."""


class FeatureKey(NamedTuple):
    """What two prompts must share to share a picture's features."""

    media: str
    """`Media.key`: decoded content, and how it was processed."""
    tower: str = ""
    """Content hash of what an adapter changes in tower and projector; "" where it leaves them alone."""
    tenant: str = ""
    salt: str = ""


@dataclass(frozen=True, eq=False)
class KeptFeatures:
    """Features as the cache holds them: whole or not at all."""

    features: Any
    """With `num_bytes`."""
    num_tokens: int = 1
    num_window_tokens: int = 1
    precision: KvPrecision = PLAIN
    has_state: bool = True

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return int(self.features.num_bytes)

    def cut(self, at: int) -> tuple[KeptFeatures, KeptFeatures]:
        """A text of one token has no parts."""
        raise AssertionError(f"a cut at {at} of one token")


class FeatureCache:
    """Features of all bases' pictures there are, the least recently used ones leaving first.

    base       tells bases apart, and how their towers compute
    max_bytes  in memory; on disk they have the disk's own bound
    """

    def __init__(self, base: str, max_bytes: int, disk: Disk | None = None) -> None:
        self._base = base
        self._cache = PrefixCache(max_bytes=max_bytes, disk=disk)

    @property
    def num_bytes(self) -> int:
        """Memory held. Any thread may ask."""
        return self._cache.num_bytes

    @property
    def bound(self) -> int:
        """In bytes, at present."""
        return self._cache.bound

    def find(self, key: FeatureKey) -> Match | None:
        """The features under this key, kept until `release`; None if there are none. Read from disk, if need be."""
        return self._cache.match(self._space(key), WHOLE, 1, is_first=False)

    def is_in_memory(self, key: FeatureKey) -> bool:
        """Whether `find` would find them without the disk."""
        return self._cache.is_in_memory(self._space(key), WHOLE)

    def release(self, match: Match) -> None:
        """They are not needed now."""
        self._cache.release(match)

    def keep(self, key: FeatureKey, features: Any) -> None:
        """Evaluated ones. Nothing is kept of what is there already, nor of what is larger than all the memory."""
        self._cache.insert(self._space(key), WHOLE, 0, KeptFeatures(features))

    def shrink(self, max_bytes: int) -> None:
        """From here on no more than so many bytes of memory, and no more than its own bound."""
        self._cache.shrink(max_bytes)

    def clear(self, tenant: str | None = None) -> None:
        """Forget a tenant's, in memory and on disk; everybody's, where none is named."""
        self._cache.clear(tenant)

    def close(self) -> None:
        """Write what waits for the disk, and let go of its folder."""
        self._cache.close()

    def stats(self) -> PrefixStats:
        """A snapshot, of what is held and what has left; any thread may ask."""
        return self._cache.stats()

    def check_integrity(self) -> None:
        """AssertionError if the accounts are wrong."""
        self._cache.check_integrity()

    def _space(self, key: FeatureKey) -> Space:
        return Space(self._base, key.tower, PLAIN.label, key.tenant, key.salt, key.media)


def features_of(match: Match) -> Any:
    """What `keep` was given."""
    (kept,) = match.segments
    return kept.features
