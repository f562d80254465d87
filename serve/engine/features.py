"""Which pictures' features are at hand for which sequence: from the tower, from the cache, or from a neighbour.

A sequence holds the features of a piece of its prompt from when they are at hand until its row has taken them in; and
to its end, where there is room for that, for then its pixels need not be kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from serve.cache.disk import Disk
from serve.cache.feature_bytes import FeatureCodec
from serve.cache.features import FeatureCache, FeatureKey, features_of
from serve.cache.prefix import Match
from serve.cache.stats import FeatureStats
from serve.engine.limits import EngineLimits
from serve.engine.plan import Encode, SequenceState
from serve.engine.prefixes import DISK_BYTES, identity
from serve.model.loading import LoadedModel

SHARE = 8
"""Of the rows' and prefixes' memory, one part in so many is for features, unless somebody says otherwise."""


@dataclass(eq=False)
class _Held:
    """Features that some sequence needs."""

    features: Any
    match: Match | None
    """None: the cache has not got them. They are being computed, or too large for it."""
    holders: set[tuple[SequenceState, int]]
    """Each with the number of the piece in its prompt."""


class SequenceFeatures:
    """The feature cache as scheduler and engine ask it. Lives on the engine's thread; `stats` may be asked by any."""

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._held: dict[FeatureKey, _Held] = {}
        self._num_queries = self._num_hits = self._num_disk_hits = self._num_encoded = 0
        self._num_reads = 0  # from disk

    @classmethod
    def make(cls, limits: EngineLimits, max_bytes: int, model: LoadedModel) -> SequenceFeatures:
        """What the limits ask for, of `max_bytes` at most. ConfigError where the folder cannot be used."""
        wanted, base, disk = limits.feature_cache_bytes, identity(model, "features"), None
        if limits.feature_cache_dir is not None:
            disk_bytes = limits.feature_cache_disk_bytes or DISK_BYTES
            disk = Disk(limits.feature_cache_dir, disk_bytes, base, FeatureCodec(), "feature_cache_dir")
        return cls(FeatureCache(base, min(max_bytes // SHARE if wanted is None else wanted, max_bytes), disk))

    @property
    def num_bytes(self) -> int:
        """Memory held. Any thread may ask."""
        loose = [one for one in list(self._held.values()) if one.match is None]
        return self._cache.num_bytes + sum(one.features.num_bytes for one in loose)

    @property
    def stats(self) -> FeatureStats:
        """A snapshot."""
        kept = self._cache.stats()
        return FeatureStats(
            num_queries=self._num_queries,
            num_hits=self._num_hits,
            num_disk_hits=self._num_disk_hits,
            num_encoded=self._num_encoded,
            num_evicted=kept.num_evicted,
            num_disk_evicted=kept.num_disk_evicted,
            num_kept=kept.num_segments,
            disk_bytes=kept.disk_bytes,
            num_disk_dropped=kept.num_disk_dropped,
            num_disk_errors=kept.num_disk_errors,
        )

    def hold(self, sequence: SequenceState, number: int) -> bool:
        """Whether the features are at hand, or being computed; they are kept for it then."""
        num_reads = self._num_reads
        held = self._find(sequence.feature_key(number))
        if held is None:
            return False
        if self._is_first(sequence, number):
            self._num_hits += 1
            self._num_disk_hits += self._num_reads - num_reads
        self._give(held, sequence, number)
        return True

    def relax(self, sequence: SequenceState) -> None:
        """It has no row now. What can be encoded again is not kept for it."""
        for number in [number for number in sequence.held if sequence.request.prompt.media[number].inputs]:
            self._let_go(sequence, number)

    def release(self, sequence: SequenceState) -> None:
        """It has ended."""
        for number in list(sequence.held):
            self._let_go(sequence, number)

    def of(self, sequence: SequenceState, number: int) -> Any:
        """The features of a piece that the sequence holds."""
        assert number in sequence.held, "features that are not held"
        return self._held[sequence.feature_key(number)].features

    def begin(self, encode: Encode, features: Any) -> None:
        """They are being computed."""
        held = self._held[encode.sequence.feature_key(encode.number)] = _Held(features, None, set())
        self._num_encoded += 1
        self._is_first(encode.sequence, encode.number)
        self._give(held, encode.sequence, encode.number)

    def finish(self, key: FeatureKey, features: Any) -> None:
        """They have been computed, and are numbers. They are kept, also where whoever wanted them has left."""
        self._cache.keep(key, features)
        held = self._held.get(key)
        if held is not None and held.match is None:
            held.match = self._cache.find(key)

    def fail(self, key: FeatureKey) -> set[tuple[SequenceState, int]]:
        """They are not numbers: nobody may use them. Returns who would have, each with the number of the piece."""
        held = self._held.pop(key, None)
        if held is None:
            return set()
        for sequence, number in held.holders:
            sequence.held.discard(number)
        return held.holders

    def take_in(self, sequence: SequenceState, stop: int) -> None:
        """The row has the first `stop` tokens: of what lies before, either features or pixels are kept, to resume."""
        prompt = sequence.request.prompt
        media, is_changed = list(prompt.media), False
        for number, piece in enumerate(media):
            if not piece.inputs or piece.stop > stop:
                continue
            key = sequence.feature_key(number)
            if number not in sequence.held and self._cache.is_in_memory(key):  # a prefix had its tokens
                found = self._find(key)
                assert found is not None, "it was in memory"
                self._give(found, sequence, number)
            if number not in sequence.held:
                continue
            if self.num_bytes <= self._cache.bound:
                media[number], is_changed = replace(piece, inputs={}), True
            else:
                self._let_go(sequence, number)
        if is_changed:
            sequence.request = replace(sequence.request, prompt=replace(prompt, media=tuple(media)))

    def bound(self, max_bytes: int) -> None:
        """From here on no more memory than that, but for what is held."""
        self._cache.shrink(max(max_bytes, 0))

    def forget(self, tenant: str | None = None) -> None:
        """A tenant's, in memory and on disk; everybody's, where none is named."""
        self._cache.clear(tenant)

    def close(self) -> None:
        """Write what waits for the disk."""
        self._cache.close()

    def _is_first(self, sequence: SequenceState, number: int) -> bool:
        """The piece had no features yet; counted then."""
        is_first = number not in sequence.sought
        sequence.sought.add(number)
        self._num_queries += is_first
        return is_first

    def _find(self, key: FeatureKey) -> _Held | None:
        held = self._held.get(key)
        if held is None and (match := self._cache.find(key)) is not None:
            held = self._held[key] = _Held(features_of(match), match, set())
            self._num_reads += match.num_disk_tokens
        return held

    def _give(self, held: _Held, sequence: SequenceState, number: int) -> None:
        held.holders.add((sequence, number))
        sequence.held.add(number)

    def _let_go(self, sequence: SequenceState, number: int) -> None:
        sequence.held.discard(number)
        key = sequence.feature_key(number)
        held = self._held.get(key)
        if held is None:
            return
        held.holders.discard((sequence, number))
        if not held.holders:
            del self._held[key]
            if held.match is not None:
                self._cache.release(held.match)
