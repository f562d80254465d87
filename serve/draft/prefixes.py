"""What a draft model has computed of texts before: sequences' rows in and out of a prefix cache of its own."""

from __future__ import annotations

import mlx.core as mx

from serve.cache.precision import PLAIN
from serve.cache.prefix import Match, PrefixCache, Space
from serve.cache.rows import BatchRows
from serve.draft.rows import Followed
from serve.engine.prefixes import identity
from serve.model.loading import LoadedModel


class DraftPrefixes:
    """Shared as the target's are: under one adapter of the draft model, one tenant and one salt."""

    def __init__(self, model: LoadedModel, rows: BatchRows, max_bytes: int) -> None:
        self._rows = rows
        self._base = identity(model)
        self._cache = PrefixCache(
            max_bytes=max_bytes, window=max((layer.window or 0 for layer in rows.cost.layers), default=0)
        )

    @property
    def num_bytes(self) -> int:
        """Memory held. From any thread."""
        return self._cache.num_bytes

    def bound(self, max_bytes: int) -> None:
        """From here on no more memory than that."""
        if max_bytes != self._cache.bound:
            self._cache.shrink(max(max_bytes, 0))

    def restore(self, one: Followed) -> None:
        """Fill a row that holds nothing with what is known of its sequence, but for the last token."""
        assert one.place is not None
        assert one.num_known == 0, "the row holds something"
        keys = one.sequence.keys(one.sequence.num_tokens)
        match = self._cache.match(self._space(one), keys, len(keys) - 1)
        if match is None:
            return
        self._put(one, match)

    def keep(self, one: Followed) -> None:
        """A copy of what a row knows and the cache does not."""
        assert one.place is not None
        stop = one.num_known
        if not stop or not self._cache.bound:
            return
        space, keys = self._space(one), one.sequence.keys(stop)
        known = self._cache.known(space, keys)
        if known >= stop:
            return
        segment = self._rows.take(one.place, -1, known, stop)
        mx.eval(list(segment.arrays().values()))
        self._cache.insert(space, keys, known, segment)

    def clear(self, tenant: str | None = None) -> None:
        """Forget a tenant's, or everybody's."""
        self._cache.clear(tenant)

    def _put(self, one: Followed, match: Match) -> None:
        assert one.place is not None
        try:
            self._rows.put(one.place, -1, match.segments, match.num_tokens)
            # Before the cache may let go of the segments, or the row be written behind them.
            mx.eval(self._rows.arrays())
            one.num_known = match.num_tokens
        finally:
            self._cache.release(match)

    def _space(self, one: Followed) -> Space:
        request = one.sequence.request
        return Space(self._base, one.adapter, PLAIN.label, request.tenant, request.cache_salt)
