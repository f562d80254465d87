"""Rows for everybody: whatever comes, goes and grows, rows are compact, moves are right, bytes are exact."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from serve.cache.capacity import Bucket, Place, rows_capacity
from serve.cache.precision import PLAIN, KvPrecision
from serve.engine.placement import Arrangement, Tenant, arrange, least_bytes

BUCKETS = [
    Bucket(PLAIN, 256),
    Bucket(PLAIN, 512),
    Bucket(KvPrecision("affine", 8, 8), 256),
    Bucket(KvPrecision("affine", 4, 4), 2560),
]


class Cost:
    """A position is a byte; half of one where it is quantized."""

    state_bytes = 100

    def row_bytes(self, bucket: Bucket) -> int:
        return bucket.num_positions // (1 if bucket.precision.is_plain else 2)


@dataclass
class Rows:
    """Buffers as dicts: what stands where."""

    capacities: dict[Bucket, int] = field(default_factory=dict)
    rows: dict[Place, str] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)

    def follow(self, arrangement: Arrangement[str]) -> None:
        """Grow, copy, shrink."""
        copies = {move.target: self.rows[move.source] for move in arrangement.moves}
        assert len(copies) == len(arrangement.moves), "two moves have one target"
        self.rows |= copies
        states = {target: self.states[source] for source, target in arrangement.state_moves}
        assert len(states) == len(arrangement.state_moves), "two states have one target"
        self.states |= states
        self.capacities = dict(arrangement.capacities)
        self.rows = {p: key for p, key in self.rows.items() if p.row < self.capacities.get(p.bucket, 0)}

    @property
    def num_bytes(self) -> int:
        return sum(count * Cost().row_bytes(bucket) for bucket, count in self.capacities.items())


steps = st.lists(
    st.dictionaries(
        st.sampled_from("abcdefghijklmnopqrst"),
        st.tuples(st.sampled_from(BUCKETS), st.booleans(), st.sampled_from([0, 7])),
        max_size=20,
    ),
    max_size=8,
)


@given(steps, st.sampled_from([0, 4000, 10**9]))
@settings(deadline=None, max_examples=300)
def test_rows_are_compact_and_nobodys_are_lost_whatever_comes_and_goes(wanted, max_bytes):
    cost, rows = Cost(), Rows()
    places: dict[str, Place] = {}
    state_rows: dict[str, int] = {}
    for everybody in wanted:
        # A row that held something holds it still; one that comes anew holds nothing.
        tenants = [
            Tenant(
                key, bucket, is_single, held if key in places else 0, places.get(key), state_rows.get(key, -1)
            )
            for key, (bucket, is_single, held) in everybody.items()
        ]
        before = dict(places)
        arrangement = arrange(tenants, rows.capacities, max_bytes, cost)
        rows.follow(arrangement)
        places = dict(arrangement.places)
        state_rows = {key: row for row, key in enumerate(places)}
        assert places.keys() == everybody.keys()
        assert len(set(places.values())) == len(places), "two share a row"
        singles = list(places)[: arrangement.num_single]
        assert set(singles) == {tenant.key for tenant in tenants if tenant.is_single}
        for tenant in tenants:
            place = places[tenant.key]
            assert place.bucket == tenant.bucket
            assert place.row < rows.capacities[place.bucket]
            if tenant.num_positions:
                assert rows.rows[place] == tenant.key, "a row lost its keys and values"
                assert rows.states[state_rows[tenant.key]] == tenant.key, "a row lost its state"
            rows.rows[place] = rows.states[state_rows[tenant.key]] = tenant.key
        for bucket, capacity in rows.capacities.items():
            inside = [key for key, place in places.items() if place.bucket == bucket]
            assert [places[key].row for key in inside] == list(range(len(inside))), (
                "rows are compact, singles first"
            )
            assert len(inside) <= capacity <= max(3 * len(inside), rows_capacity(len(inside)))
        assert set(rows.capacities) == {tenant.bucket for tenant in tenants}
        assert arrangement.num_bytes == rows.num_bytes + len(tenants) * cost.state_bytes
        least = least_bytes([tenant.bucket for tenant in tenants], cost)
        assert least <= arrangement.num_bytes <= max(least, max_bytes)
        must = [t for t in tenants if t.num_positions and _must_move(t, before[t.key], tenants)]
        assert len(arrangement.moves) == len(must), "a row moves that might have stayed"


def _must_move(tenant: Tenant[str], place: Place, tenants: list[Tenant[str]]) -> bool:
    num_single = sum(one.is_single and one.bucket == tenant.bucket for one in tenants)
    num_rows = sum(one.bucket == tenant.bucket for one in tenants)
    low, high = (0, num_single) if tenant.is_single else (num_single, num_rows)
    return place.bucket != tenant.bucket or not low <= place.row < high


def test_a_bucket_grows_by_quarters_and_keeps_its_rows_until_a_third_is_in_use():
    cost, capacities = Cost(), {}

    def capacity_for(count: int) -> int:
        nonlocal capacities
        tenants = [Tenant(key, BUCKETS[0], True, 0) for key in range(count)]
        capacities = arrange(tenants, capacities, 10**9, cost).capacities
        return capacities[BUCKETS[0]]

    assert [capacity_for(count) for count in range(1, 21)] == [rows_capacity(count) for count in range(1, 21)]
    most = rows_capacity(20)
    assert [capacity_for(count) for count in range(19, 0, -1) if 3 * count > most] == [most] * (
        19 - most // 3
    )
    assert capacity_for(most // 3) == rows_capacity(most // 3)
