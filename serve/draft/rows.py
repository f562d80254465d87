"""Which sequences a draft model follows: who has a row, where it stands, what is written in it.

A row is given to whoever is asked for, as long as there is room; rows of others, those asked for longest ago first,
give way to it. Positions of a row:

    [0, num_known)                      the sequence's own tokens
    [num_known, num_known + guesses)    what was guessed behind them, true or not
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from serve.cache.capacity import Bucket, Place, positions_capacity, rows_capacity
from serve.cache.precision import PLAIN
from serve.cache.rows import BatchRows
from serve.cache.spans import Span, span_parts
from serve.engine.placement import Tenant, arrange
from serve.engine.plan import SequenceState


@dataclass(eq=False)
class Followed:
    """A sequence, and its row."""

    sequence: SequenceState
    slot: int
    """Of the adapter that guesses for it; 0 is the draft model alone."""
    adapter: str
    """Its effect hash; "" for none."""
    asked_at: int = 0
    """The last round in which guesses were asked for."""
    served_at: int = 0
    """The last round in which it caught up with more than a few tokens."""
    place: Place | None = None
    num_known: int = 0
    guesses: Sequence[int] = ()
    first: tuple[int, int, int] | None = None
    """Of the last guesses the first: its position, the token if drawn, and the likeliest."""
    is_kept: bool = False
    """The prefix cache was given what the row held when it had first caught up."""
    num_positions: int = 0
    """That it must have room for, now and from now on."""

    @property
    def num_missing(self) -> int:
        """Tokens that are to run before the next can be guessed."""
        return self.sequence.num_tokens - self.num_known

    def settle(self) -> None:
        """What was guessed and came is known; the rest is no more. The last token is left to run."""
        came = self.sequence.tokens(self.num_known, self.num_known + len(self.guesses))
        for guess, token in zip(self.guesses, came, strict=False):
            if guess != token:
                break
            self.num_known += 1
        self.guesses = ()
        self.num_known = min(self.num_known, self.sequence.num_tokens - 1)


@dataclass
class DraftRows:
    """Rows of a draft network, at most `max_rows` of them, in at most `max_bytes`."""

    rows: BatchRows
    max_rows: int
    max_bytes: int
    num_bytes: int = 0
    """Of all rows as they are."""
    _followed: dict[SequenceState, Followed] = field(default_factory=dict)
    _capacities: Mapping[Bucket, int] = field(default_factory=dict)

    def find(self, sequence: SequenceState) -> Followed | None:
        """Its row, if it has one."""
        return self._followed.get(sequence)

    def seat(self, asked: Sequence[Followed]) -> list[Followed]:
        """Give rows to those that are asked for, those that have one first. Returns them, by bucket and row."""
        if any(not self._fits(one) for one in asked):
            self._arrange(self._chosen(asked))
        return sorted((one for one in asked if one.place is not None), key=_order)

    def release(self, sequence: SequenceState) -> None:
        """Its row is free."""
        one = self._followed.pop(sequence, None)
        if one is not None:
            one.place = None
        if not self._followed:
            self.clear()

    def clear(self) -> None:
        """Nobody is followed; all memory is given back."""
        for one in self._followed.values():
            one.place = None
        self._followed.clear()
        self.rows.clear()
        self._capacities, self.num_bytes = {}, 0

    def check_integrity(self) -> None:
        """AssertionError if two sequences share a row, or one is outside its buffer, or there are too many."""
        places = [one.place for one in self._followed.values()]
        assert len(set(places)) == len(places) <= self.max_rows
        for one in self._followed.values():
            assert one.place is not None, "who has no row is not followed"
            assert one.place.row < self._capacities[one.place.bucket]
            assert one.num_known + len(one.guesses) <= one.place.bucket.num_positions
        assert self.num_bytes == self.rows.num_bytes <= max(self.max_bytes, 0)

    def _fits(self, one: Followed) -> bool:
        return one.place is not None and one.num_positions <= one.place.bucket.num_positions

    def _chosen(self, asked: Sequence[Followed]) -> list[Followed]:
        """Who is to have a row: whoever has one and is asked for, then whoever is asked for, then the others."""
        others = (one for one in self._followed.values() if one not in set(asked))
        order = chain(
            sorted(asked, key=lambda one: one.place is None), sorted(others, key=lambda one: -one.asked_at)
        )
        chosen: list[Followed] = []
        counts: Counter[Bucket] = Counter()
        num_bytes = 0
        for one in order:
            bucket = _bucket(one)
            added = rows_capacity(counts[bucket] + 1) - rows_capacity(counts[bucket])
            more = added * self.rows.cost.row_bytes(bucket)
            if len(chosen) < self.max_rows and num_bytes + more <= self.max_bytes:
                chosen.append(one)
                counts[bucket] += 1
                num_bytes += more
        return chosen

    def _arrange(self, chosen: Sequence[Followed]) -> None:
        """Rows for these and nobody else. A row that has none yet holds nothing."""
        before = self._capacities
        kept = set(chosen)
        for one in self._followed.values():
            if one not in kept:
                one.place = None
        if not chosen:
            self.clear()
            return
        tenants = [Tenant(one, _bucket(one), True, one.num_known, one.place) for one in chosen]
        arrangement = arrange(tenants, before, self.max_bytes, self.rows.cost)
        after = arrangement.capacities
        wide = {bucket: max(before.get(bucket, 0), after.get(bucket, 0)) for bucket in {**before, **after}}
        self.rows.resize(wide)
        if arrangement.moves:
            self.rows.move(arrangement.moves)
        self.rows.resize(after)
        self._capacities, self.num_bytes = after, arrangement.num_bytes
        for one, place in arrangement.places.items():
            if one.place is None:
                one.num_known, one.guesses = 0, ()
            one.place = place
        self._followed = {one.sequence: one for one in chosen}


def span_of(followed: Sequence[Followed], starts: Sequence[int], num_tokens: int) -> Span:
    """A forward of `num_tokens` tokens of each of these rows, from `starts` on; rows as `seat` has them in order."""
    parts = span_parts([_place(one) for one in followed], starts, [start == 0 for start in starts])
    return Span(parts, num_tokens)


def _place(one: Followed) -> Place:
    assert one.place is not None, "it has no row"
    return one.place


def _bucket(one: Followed) -> Bucket:
    """A row never goes back to a smaller one: that would be copied to and fro."""
    held = one.place.bucket.num_positions if one.place is not None else 0
    return Bucket(PLAIN, max(positions_capacity(one.num_positions), held))


def _order(one: Followed) -> tuple[int, int]:
    place = _place(one)
    return place.bucket.num_positions, place.row


def order_of(followed: Iterable[Followed]) -> list[Followed]:
    """By bucket and row, as a forward runs them."""
    return sorted(followed, key=_order)
