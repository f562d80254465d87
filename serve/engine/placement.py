"""Which row each running sequence has: buckets in; rows, moves and buffers' sizes out. Integers only, no mlx.

In a bucket, the rows that run one token come first: [0, n) of them, and behind them those that hold or await a
prompt. A row that stands in the right part of its bucket stays, so the moves are as few as can be.
State rows are compact over all buckets, in the same order: first the one-token rows, by bucket and row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from serve.cache.capacity import Bucket, Move, Place, RowCost, rows_capacity

SHRINK_AT = 3
"""A bucket with so many times the rows that are in use, or more, gives rows back."""

K = TypeVar("K")


class Tenant(NamedTuple, Generic[K]):
    """One that is to have a row."""

    key: K
    bucket: Bucket
    """Where its row must be."""
    is_single: bool
    """It runs one token."""
    num_positions: int
    """What its row holds, and takes along when it moves."""
    place: Place | None = None
    """Where it stands; None if nowhere."""
    state_row: int = -1


@dataclass(frozen=True)
class Arrangement(Generic[K]):
    """Where everybody is, and how it comes about. All sources of moves are read before any target is written."""

    places: Mapping[K, Place]
    """First the one-token rows, then the others, each by bucket and row: a key's number here is its state row."""
    num_single: int
    moves: tuple[Move, ...]
    state_moves: tuple[tuple[int, int], ...]
    capacities: Mapping[Bucket, int]
    num_bytes: int


def num_bytes(capacities: Mapping[Bucket, int], num_rows: int, cost: RowCost) -> int:
    """Memory of buckets with so many rows each. States have no spare rows."""
    held = sum(rows * cost.row_bytes(bucket) for bucket, rows in capacities.items())
    return held + num_rows * cost.state_bytes


def least_bytes(buckets: Iterable[Bucket], cost: RowCost) -> int:
    """Memory of rows in these buckets, one each, with no more room than their counts need."""
    counts = Counter(buckets)
    tight = {bucket: rows_capacity(count) for bucket, count in counts.items()}
    return num_bytes(tight, counts.total(), cost)


def arrange(
    tenants: Sequence[Tenant[K]], capacities: Mapping[Bucket, int], max_bytes: int, cost: RowCost
) -> Arrangement[K]:
    """Rows for everybody. `capacities`: those of the last arrangement.

    A bucket keeps rows that it does not need, so that the next one who comes copies nothing, as long as all of it
    is within `max_bytes`.
    """
    by_bucket: dict[Bucket, list[Tenant[K]]] = {}
    for tenant in tenants:
        by_bucket.setdefault(tenant.bucket, []).append(tenant)
    singles: dict[K, Place] = {}
    others: dict[K, Place] = {}
    for bucket in sorted(by_bucket, key=_order):
        inside = by_bucket[bucket]
        first = [tenant for tenant in inside if tenant.is_single]
        rest = [tenant for tenant in inside if not tenant.is_single]
        singles |= _rows(bucket, first, 0)
        others |= _rows(bucket, rest, len(first))
    places = singles | others
    state_rows = {key: row for row, key in enumerate(places)}
    holding = [tenant for tenant in tenants if tenant.place is not None and tenant.num_positions]
    has_state = cost.state_bytes > 0
    wide = {bucket: _capacity(len(rows), capacities.get(bucket, 0)) for bucket, rows in by_bucket.items()}
    total = num_bytes(wide, len(tenants), cost)
    if total > max_bytes:
        wide = {bucket: rows_capacity(len(rows)) for bucket, rows in by_bucket.items()}
        total = num_bytes(wide, len(tenants), cost)
    return Arrangement(
        places=places,
        num_single=len(singles),
        moves=tuple(
            Move(tenant.place, places[tenant.key], tenant.num_positions)
            for tenant in holding
            if tenant.place is not None and tenant.place != places[tenant.key]
        ),
        state_moves=tuple(
            (tenant.state_row, state_rows[tenant.key])
            for tenant in holding
            if has_state and tenant.state_row != state_rows[tenant.key]
        ),
        capacities=wide,
        num_bytes=total,
    )


def _rows(bucket: Bucket, part: Sequence[Tenant[K]], low: int) -> dict[K, Place]:
    """Rows [low, low + len(part)) of a bucket, in row order; who stands in there stays."""
    rows = range(low, low + len(part))
    taken = {t.place.row: t.key for t in part if t.place and t.place.bucket == bucket and t.place.row in rows}
    stays = set(taken.values())
    free = (row for row in rows if row not in taken)
    taken |= {next(free): tenant.key for tenant in part if tenant.key not in stays}
    return {taken[row]: Place(bucket, row) for row in rows}


def _capacity(count: int, before: int) -> int:
    if count <= before < SHRINK_AT * count:
        return before
    return rows_capacity(count)


def _order(bucket: Bucket) -> tuple[int, str]:
    return bucket.num_positions, bucket.precision.label
