"""Who gets a slot: which versions have one, who waits for one, who gives way. Knows no arrays, bytes or threads.

The slot that was not used longest gives way, if nobody has a row on it. Where rows are on all of them, the one that
serves fewest takes no new rows until it is free: so whoever waits, waits for rows that already run, and for nobody
who comes later. Whoever owns it holds a lock.

    version     known ──ask_for──▶ wanted ──a slot is free──▶ seated, not ready ──settle──▶ ready
                  ▲                                                │ fail                     │
                  └──────────────── least recently used ◀──────────┴──────────────────────────┘
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

from serve.adapters.versions.version import AdapterVersion

if TYPE_CHECKING:
    from serve.engine.plan import SequenceState

CLOSING_SHARE = 4
"""One slot in so many may be kept free of new rows at a time, for others that wait."""


@dataclass(eq=False)
class Seat:
    """A version's slot."""

    version: AdapterVersion
    slot: int
    used: int
    """Grows with every use of any seat."""
    is_ready: bool = False
    """All of it is in the bank."""
    is_closing: bool = False
    """Others wait for it: rows that it has run to their end, and it gets no new ones."""
    is_retired: bool = False
    """Its name has another version now. It is not counted, and leaves when its requests have ended."""
    is_back: bool = False
    """Retired, and its name stands for it again: it is counted when there is room, or leaves with its last row."""
    is_left: bool = False
    """Nobody needs it any more, and it is still on its way."""
    rows: set[SequenceState] = field(default_factory=set)


@dataclass(eq=False)
class Want:
    """A version that is asked for, and has no slot, or none that takes new rows."""

    version: AdapterVersion
    sequences: WeakSet[SequenceState] = field(default_factory=WeakSet)
    lacks_bytes: bool = False
    """It had a slot, and no room for its bytes."""


@dataclass(frozen=True)
class Standing:
    """How a version stands now."""

    slot: int | None = None
    is_ready: bool = False
    request_ids: tuple[str, ...] = ()
    """Of the rows that are on it."""
    num_waiting: int = 0
    num_hits: int = 0
    """Rows that found it on the device."""
    num_misses: int = 0
    """Rows that had to wait for it."""
    num_loads: int = 0
    """Times that it was brought to the device."""
    problem: str | None = None
    """Why it could not be brought in, last time."""


@dataclass
class Record:
    """What happened to a version so far."""

    num_hits: int = 0
    num_misses: int = 0
    num_loads: int = 0
    problem: str | None = None


@dataclass
class Assigned:
    """What `assign` has changed."""

    given: list[Seat] = field(default_factory=list)
    """To be brought in."""
    has_left: bool = False
    """Some version had to leave its slot."""
    has_reopened: bool = False
    """Some slot takes new rows again."""


class Seats:
    """The slots there are, and who is on them.

    max_slots  that are counted: those of versions that were replaced and are still in use are not
    free       told of each slot that is free now
    """

    def __init__(self, max_slots: int, free: Callable[[int], None]) -> None:
        self.max_slots = max_slots
        self.totals = Record()
        """Of all versions together."""
        self.num_evicted = self.num_failed = 0
        self.is_short = False
        """Somebody wants a slot, and none is closed for it."""
        self._free = free
        self._seats: dict[str, Seat] = {}  # by version id
        self._wants: dict[str, Want] = {}  # by version id, the oldest first
        self._pinned: set[str] = set()  # version ids
        self._records: dict[str, Record] = {}  # by version id, of what is known
        self._slots = itertools.count(1)
        self._uses = itertools.count(1)
        self._num_freed = 0

    def __iter__(self) -> Iterator[Seat]:
        return iter(self._seats.values())

    def __len__(self) -> int:
        return len(self._seats)

    @property
    def num_counted(self) -> int:
        """Slots that are taken."""
        return sum(not seat.is_retired for seat in self)

    @property
    def num_pinned(self) -> int:
        """Versions that are never evicted."""
        return len(self._pinned)

    @property
    def num_wanted(self) -> int:
        """Versions that are asked for and have no slot."""
        return sum(version_id not in self._seats for version_id in self._wants)

    @property
    def is_wanted(self) -> bool:
        """Somebody waits."""
        return bool(self._wants)

    def get(self, version: AdapterVersion) -> Seat | None:
        """Its seat, be it on its way."""
        return self._seats.get(version.id)

    def is_pinned(self, version: AdapterVersion) -> bool:
        """Whether it is never evicted."""
        return version.id in self._pinned

    def standing(self, version: AdapterVersion) -> Standing:
        """How it stands."""
        seat, want = self.get(version), self._wants.get(version.id)
        record = self._records.get(version.id, Record())
        return Standing(
            slot=seat.slot if seat else None,
            is_ready=bool(seat and seat.is_ready),
            request_ids=tuple(row.request.id for row in seat.rows) if seat else (),
            num_waiting=len(want.sequences) if want else 0,
            num_hits=record.num_hits,
            num_misses=record.num_misses,
            num_loads=record.num_loads,
            problem=record.problem,
        )

    # Rows

    def take_row(self, sequence: SequenceState, version: AdapterVersion) -> bool:
        """Put a row on its version's slot, if that takes new ones."""
        seat = self.get(version)
        if seat is None or not seat.is_ready or seat.is_closing:
            return False
        seat.rows.add(sequence)
        seat.used = next(self._uses)
        sequence.slot = seat.slot
        want = self._wants.get(version.id)
        has_waited = want is not None and sequence in want.sequences
        for each in (self._record(version), self.totals):
            each.num_hits += not has_waited
        if want is not None:
            want.sequences.discard(sequence)
            self._drop_empty(want)
        return True

    def ask_for(self, sequence: SequenceState, version: AdapterVersion) -> bool:
        """Put a row's version among those that are wanted; whether it was not."""
        is_new = version.id not in self._wants
        want = self._wants.setdefault(version.id, Want(version))
        for each in (self._record(version), self.totals):
            each.num_misses += sequence not in want.sequences
        want.sequences.add(sequence)
        return is_new

    def let_go(self, sequence: SequenceState, version: AdapterVersion) -> bool:
        """It has no row now. Whether others may have its slot."""
        seat = self._seats[version.id]
        seat.rows.remove(sequence)
        return not seat.rows and (self.is_wanted or seat.is_back)

    # Versions

    def seat(self, version: AdapterVersion, *, is_retired: bool = False) -> Seat:
        """Give it a slot. It is on its way there."""
        slot, used = next(self._slots), next(self._uses)
        seat = self._seats[version.id] = Seat(version, slot, used, is_retired=is_retired)
        return seat

    def unseat(self, seat: Seat) -> None:
        """It is not there, and its slot is free."""
        if self.get(seat.version) is seat:
            del self._seats[seat.version.id]
            self._num_freed += 1
            self._free(seat.slot)

    def settle(self, seat: Seat) -> None:
        """It is all there: whoever waits for it may have it."""
        seat.is_ready = True
        self.totals.num_loads += 1
        if seat.is_left:
            self.unseat(seat)
            return
        record = self._record(seat.version)
        record.problem = None
        record.num_loads += 1
        want = self._wants.get(seat.version.id)
        if want is not None:
            self._drop_empty(want)

    def lack_bytes(self, seat: Seat) -> None:
        """There is no room for it now: it waits until somebody has left."""
        want = self._wants.get(seat.version.id)
        if want is not None:
            want.lacks_bytes = True
        self.unseat(seat)

    def fail(self, seat: Seat, problem: str) -> list[SequenceState]:
        """It cannot come. Who has waited for it."""
        self.num_failed += 1
        if not seat.is_left:
            self._record(seat.version).problem = problem
        want = self._wants.pop(seat.version.id, None)
        self.unseat(seat)
        return list(want.sequences) if want else []

    def hand_over(self, old: AdapterVersion, new: AdapterVersion) -> None:
        """A name stands for another version now. The old one's slot serves who holds it, and is not counted."""
        seat = self.get(old)
        if seat is not None:
            seat.is_retired, seat.is_back = True, False
        seat = self.get(new)
        if seat is not None and seat.is_retired:
            seat.is_back = True
            self._count_again(seat)
        if old.id in self._pinned:
            self._pinned.discard(old.id)
            self.pin(new)

    def leave(self, version: AdapterVersion) -> bool:
        """No request holds it, and its name does not stand for it: its slot is free. Whether it had one."""
        self._pinned.discard(version.id)
        self._wants.pop(version.id, None)
        seat = self.get(version)
        if seat is None:
            return False
        assert not seat.rows, f"{version.id} leaves while rows are on it"
        seat.is_left = True
        if seat.is_ready:
            self.unseat(seat)
        return seat.is_ready

    def forget(self, version: AdapterVersion) -> None:
        """It has left, and is known no more."""
        self._records.pop(version.id, None)

    def pin(self, version: AdapterVersion) -> None:
        """Never evict it, and bring it in."""
        self._pinned.add(version.id)
        if version.id not in self._seats:
            self._wants.setdefault(version.id, Want(version))

    def unpin(self, version: AdapterVersion) -> None:
        """It may be evicted again."""
        self._pinned.discard(version.id)
        want = self._wants.get(version.id)
        if want is not None:
            self._drop_empty(want)

    # Who gives way

    def assign(self) -> Assigned:
        """Free slots to whoever waits longest, and those in use closed for as many as may be."""
        made, num_freed = Assigned(), self._num_freed
        for want in list(self._wants.values()):
            self._drop_empty(want)
        for seat in [each for each in self if each.is_back]:
            self._count_again(seat)
        max_closing = max(1, self.max_slots // CLOSING_SHARE)
        closing: list[Seat] = []
        self.is_short = False
        for want in [each for id, each in self._wants.items() if id not in self._seats]:
            given = self._given_to(want)
            if given is not None:
                made.given.append(given)
            elif len(closing) < max_closing:
                closed = self._to_close(closing)
                closing += closed
                self.is_short |= not closed
            elif self.num_counted >= self.max_slots:
                break
        for seat in self:
            made.has_reopened |= seat.is_closing and seat not in closing
            seat.is_closing = seat in closing
        made.has_left = self._num_freed > num_freed
        return made

    def evict(self, *, but: Seat | None = None) -> bool:
        """Take the slot that was not used longest from its version, if there is one that nobody uses."""
        idle = [seat for seat in self if seat is not but and self._is_idle(seat)]
        if not idle:
            return False
        self.unseat(min(idle, key=lambda seat: (not seat.is_closing, seat.used)))
        self.num_evicted += 1
        return True

    def check_integrity(self, allowed: Collection[str]) -> None:
        """Between two loads. `allowed`: ids of versions that are current, or held by requests."""
        slots = [seat.slot for seat in self]
        assert len({0, *slots}) == 1 + len(slots), "two versions share a slot, or the base's"
        assert self._seats.keys() <= {*allowed}, f"seated are {[*self._seats]}, and may be {allowed}"
        assert {*allowed} >= self._pinned, "a version is pinned that is neither current nor held"
        assert self._wants.keys() <= {*allowed}, "a version is wanted that is neither current nor held"
        assert self.num_counted <= self.max_slots, f"more than {self.max_slots} slots are taken"
        assert not self._pinned or len(self._pinned) < self.max_slots, "no slot is left to others"
        for seat in self:
            assert seat.is_ready, f"{seat.version.id} is still on its way"
            assert not seat.is_closing or self._wants, "nobody waits for a slot that takes no rows"
            assert all(row.slot == seat.slot for row in seat.rows), "a row is on another slot"
            assert not seat.is_back or seat.rows or self._wants, "a slot that nobody uses is not counted"

    def _given_to(self, want: Want) -> Seat | None:
        """A seat for it; somebody may have to leave for it."""
        if want.lacks_bytes and not self.evict():
            return None
        if not self._has_room():
            return None
        want.lacks_bytes = False
        return self.seat(want.version)

    def _has_room(self, *, but: Seat | None = None) -> bool:
        """Whether one more may be counted, and be it that others leave. `but` does not."""
        while self.num_counted >= self.max_slots:
            if not self.evict(but=but):
                return False
        return True

    def _count_again(self, seat: Seat) -> None:
        """Of a seat whose name stands for it again."""
        if self._has_room(but=seat):
            seat.is_retired = seat.is_back = False
        elif self._is_idle(seat):
            self.unseat(seat)

    def _drop_empty(self, want: Want) -> None:
        """Nobody waits for it any more, a pin neither."""
        seat = self.get(want.version)
        is_there = seat is not None and seat.is_ready
        if not want.sequences and (is_there or not self.is_pinned(want.version)):
            self._wants.pop(want.version.id, None)

    def _to_close(self, taken: Collection[Seat]) -> list[Seat]:
        """Who is to get no new rows, beside those `taken`: rather who is closed already, else who serves fewest."""
        busy = [
            seat
            for seat in self
            if seat.is_ready and seat.rows and seat not in taken and not self.is_pinned(seat.version)
        ]
        return sorted(busy, key=lambda seat: (not seat.is_closing, len(seat.rows), seat.used))[:1]

    def _is_idle(self, seat: Seat) -> bool:
        """Nobody uses it. Whoever has waited for it, and may have it, does."""
        want = self._wants.get(seat.version.id)
        is_awaited = want is not None and bool(want.sequences) and not seat.is_closing
        return seat.is_ready and not seat.rows and not is_awaited and not self.is_pinned(seat.version)

    def _record(self, version: AdapterVersion) -> Record:
        return self._records.setdefault(version.id, Record())
