"""Sequences in, what the prefix cache has of their texts out; rows' copies in, what it keeps. Knows no rows.

What two sequences share, they share in one space alone: base, adapter by content, precision, tenant and salt.
"""

from __future__ import annotations

import hashlib

from serve.cache.disk import Disk
from serve.cache.prefix import Match, PrefixCache, Space
from serve.cache.rows import BatchRows
from serve.cache.segment_bytes import SegmentCodec
from serve.cache.stats import PrefixStats
from serve.engine.limits import EngineLimits
from serve.engine.plan import Found, SequenceState
from serve.engine.runner import Captured
from serve.model.loading import LoadedModel
from serve.model.weights import QUANTIZED

DISK_BYTES = 16 << 30


class SequencePrefixes:
    """The prefix cache as scheduler and engine ask it. Lives on the engine's thread; `stats` may be asked by any."""

    def __init__(self, cache: PrefixCache, base: str, *, has_state: bool = False) -> None:
        """`base` tells bases apart, and how they are computed. `has_state`: layers keep recurrent state."""
        self.cache = cache
        self._has_state = has_state
        self._base = base
        self._bound = cache.max_bytes

    @classmethod
    def make(
        cls, limits: EngineLimits, max_bytes: int, model: LoadedModel, rows: BatchRows
    ) -> SequencePrefixes | None:
        """What the limits ask for; None where they want none. ConfigError where the folder cannot be used."""
        if limits.prefix_cache_bytes == 0:
            return None
        base = identity(model, rows.fingerprint)
        disk = None
        if limits.prefix_cache_dir is not None:
            disk = Disk(
                limits.prefix_cache_dir, limits.prefix_cache_disk_bytes or DISK_BYTES, base, SegmentCodec()
            )
        cache = PrefixCache(
            max_bytes=min(limits.prefix_cache_bytes or max_bytes, max_bytes),
            window=max((layer.window or 0 for layer in rows.cost.layers), default=0),
            has_state=rows.cost.state_bytes > 0,
            disk=disk,
        )
        return cls(cache, base, has_state=rows.cost.state_bytes > 0)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self.cache.num_bytes

    @property
    def stats(self) -> PrefixStats:
        """A snapshot."""
        return self.cache.stats()

    def bytes_of(self, adapter: str) -> int:
        """Memory held for an adapter by its effect hash; the base's is ""."""
        return self.cache.bytes_of(adapter)

    def find(self, sequence: SequenceState) -> Match | None:
        """The longest prefix that the row can be given, but for the last token, which must run to draw the next."""
        is_first = not sequence.has_looked
        sequence.has_looked = True
        keys, space = sequence.keys(sequence.num_tokens), self._space(sequence)
        whole = sequence.request.prompt.whole
        if self._has_state:
            sequence.num_shared_tokens = whole(self.cache.num_shared(space, keys, len(keys) - 1))
        return self.cache.match(space, keys, len(keys) - 1, whole=whole, is_first=is_first)

    def release(self, prefix: Found) -> None:
        """It is in its row, or will not be."""
        assert isinstance(prefix, Match)
        self.cache.release(prefix)

    def num_known(self, sequence: SequenceState, stop: int) -> int:
        """How many of its first `stop` tokens need no capture."""
        return self.cache.known(self._space(sequence), sequence.keys(stop))

    def keep(self, captured: Captured) -> None:
        """A copy of a row belongs to the cache from now on. Its arrays are evaluated."""
        sequence, _, _, start, stop = captured.capture
        self.cache.insert(self._space(sequence), sequence.keys(stop), start, captured.segment)

    def bound(self, max_bytes: int) -> None:
        """From here on no more memory than that."""
        max_bytes = max(max_bytes, 0)
        if max_bytes != self._bound:
            self._bound = max_bytes
            self.cache.shrink(max_bytes)

    def _space(self, sequence: SequenceState) -> Space:
        request = sequence.request
        return Space(
            base=self._base,
            adapter=request.adapter.effect_hash if request.adapter else "",
            precision=sequence.precision.label,
            tenant=request.tenant,
            salt=request.cache_salt,
        )


def identity(model: LoadedModel, stored: str = "") -> str:
    """Weights, what is computed in, and `stored`, what for: another one's numbers are others."""
    is_packed = any(isinstance(layer, QUANTIZED) for _, layer in model.network.module.named_modules())
    words = (
        model.fingerprint,
        str(model.network.parameters_dtype()),
        "packed" if is_packed else "",
        stored,
    )
    return hashlib.sha256("|".join(words).encode()).hexdigest()
