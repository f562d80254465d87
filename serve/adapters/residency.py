"""Which versions have a slot on the device, who waits for one, and how a version comes to one. Knows no names.

A version that is asked for and has no slot is brought in by a loader, between two steps of whatever runs, in parts;
only its own requests wait. The slot that was not used longest gives way, if nobody has a row on it. Where rows are on
all of them, the one that serves fewest takes no new rows until it is free: so whoever waits, waits for rows that
already run, and for nobody who comes later.

The engine's thread asks `hold` and `let_go`; everything else may be called from any thread.

    version     known ──hold──▶ wanted ──a slot is free──▶ seated, not ready ──installed──▶ ready
                  ▲                                             │ fails: its requests end with the reason
                  └──────────────── least recently used ◀───────┴──────────────────────────────┘
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, WeakSet

from serve.adapters.bank import Bank
from serve.adapters.contents import Contents
from serve.adapters.fit import LowRank, Size
from serve.adapters.shelf import num_bytes_of
from serve.adapters.version import AdapterVersion
from serve.errors import AdapterGoneError, AdapterMemoryError, LatheError, StoppedError

if TYPE_CHECKING:
    from serve.engine.plan import SequenceState

logger = logging.getLogger(__name__)

BYTES_A_VALUE_READ = 8
"""Of an adapter that is read: its tensors as stored, in float32 at most, and the updates made of them."""
CLOSING_SHARE = 4
"""One slot in so many may be kept free of new rows at a time, for others that wait."""

Run = Callable[[Callable[[], None]], None]


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


@dataclass(frozen=True)
class ResidencyStats:
    """Counters since the start, and what there is now."""

    num_slots: int = 0
    num_seated: int = 0
    num_wanted: int = 0
    num_hits: int = 0
    num_misses: int = 0
    num_loads: int = 0
    num_evicted: int = 0
    num_failed: int = 0
    host_bytes: int = 0
    file_bytes: int = 0


class NoRoomError(Exception):
    """There is none now, and there will be when rows have ended. Never leaves this file."""


class Residency:
    """Slots, and the bytes that adapters take with them.

    max_slots   versions on the device; those that were replaced and are still in use are not counted
    max_bytes   of the bank, of what is copied while it grows, and of adapters being read
    host_bytes  of adapters in host memory; None: as much as those leave of `max_bytes`
    run         executes a function on the thread that owns the arrays, and waits
    post        has it executed there soon, and does not wait
    """

    def __init__(
        self,
        bank: Bank,
        empty: Bank,
        contents: Contents,
        *,
        max_slots: int,
        max_bytes: int,
        host_bytes: int | None,
        run: Run,
        post: Run,
    ) -> None:
        """`empty`: a bank that nothing is ever installed in; it tells what a version takes alone."""
        self.max_slots = max_slots
        self.max_bytes = max_bytes
        self.wake: Callable[[], None] = _nothing
        """Whoever waits for a slot is to ask again."""
        self.lose: Callable[[AdapterVersion], None] = _nothing_of
        """A version's content is nowhere any more."""
        self.start: Callable[[Callable[[], None]], object] = self._later
        """Has work done on another thread; by whoever steps the engine, where there is none."""
        self._host_bytes = host_bytes
        self._bank = bank
        self._empty = empty
        self._contents = contents
        self._run, self._post = run, post
        self._pending: list[Callable[[], None]] = []
        self._installing = (
            threading.Lock()
        )  # one install at a time; held while parts wait for the engine's thread
        self._lock = threading.Lock()  # guards everything below; held for dictionary work alone
        self._has_changed = threading.Condition(self._lock)
        self._reserved = 0  # bytes that reads under way may take
        self._seats: dict[str, Seat] = {}  # by version id
        self._wants: dict[str, Want] = {}  # by version id, the oldest first
        self._pinned: set[str] = set()  # version ids
        self._errors: WeakKeyDictionary[SequenceState, LatheError] = WeakKeyDictionary()
        self._records: dict[str, Record] = {}  # by version id, of what is known
        self._slots = itertools.count(1)
        self._uses = itertools.count(1)
        self._totals = Record()
        self._is_short = False  # somebody wants a slot, and none is closed for it
        self._num_evicted = self._num_failed = 0

    # What the scheduler asks, on the engine's thread

    def hold(self, sequence: SequenceState) -> bool:
        """As `Adapters.hold` of the scheduler: whether there is a slot. LatheError where it cannot come."""
        version = sequence.request.adapter
        if version is None:
            sequence.slot = 0
            return True
        with self._lock:
            error = self._errors.pop(sequence, None)
            if error is not None:
                raise error
            seat = self._seats.get(version.id)
            has_slot = seat is not None and seat.is_ready and not seat.is_closing
            if has_slot:
                assert seat is not None
                self._take_row(seat, sequence)
                is_due = self._is_short
            else:
                is_due = self._ask_for(version, sequence)
        if is_due:
            self._assign()
        return has_slot

    def _take_row(self, seat: Seat, sequence: SequenceState) -> None:
        seat.rows.add(sequence)
        seat.used = next(self._uses)
        sequence.slot = seat.slot
        want = self._wants.get(seat.version.id)
        has_waited = want is not None and sequence in want.sequences
        for each in (self._record(seat.version), self._totals):
            each.num_hits += not has_waited
        if want is not None:
            want.sequences.discard(sequence)
            if not want.sequences:
                del self._wants[seat.version.id]

    def _ask_for(self, version: AdapterVersion, sequence: SequenceState) -> bool:
        """Put a row's version among those that are wanted; whether it was not."""
        want = self._wants.get(version.id)
        is_new = want is None
        if want is None:
            want = self._wants[version.id] = Want(version)
        for each in (self._record(version), self._totals):
            each.num_misses += sequence not in want.sequences
        want.sequences.add(sequence)
        return is_new

    def _record(self, version: AdapterVersion) -> Record:
        return self._records.setdefault(version.id, Record())

    def let_go(self, sequence: SequenceState) -> None:
        """As `Adapters.let_go`: it has no row now."""
        version = sequence.request.adapter
        if version is None:
            return
        with self._lock:
            seat = self._seats[version.id]
            seat.rows.remove(sequence)
            is_wanted = not seat.rows and bool(self._wants)
        if is_wanted:
            self._assign()

    def use_loaders(self, start: Callable[[Callable[[], None]], object], wake: Callable[[], None]) -> None:
        """From here on `start` has work done on another thread, and the engine's thread is woken by `wake`."""
        self.start, self.wake = start, wake
        pending, self._pending = self._pending, []
        for work in pending:
            start(work)

    def catch_up(self) -> None:
        """Do the work that waits for whoever steps the engine, where no thread is there for it."""
        while self._pending:
            self._pending.pop(0)()  # which may add to them

    # What the registry asks

    def check_alone(self, name: str, sizes: Mapping[str, Size], num_values: int) -> None:
        """AdapterMemoryError if it could not be brought in even if nothing else were there."""
        num_bytes = self._contents.num_bytes(num_values)
        kept = num_bytes if self._host_bytes is None else 0
        needed = kept + max(num_values * BYTES_A_VALUE_READ, self._empty.peak_bytes(sizes) + num_bytes)
        if needed > self.max_bytes:
            raise self._memory_error(name, sizes, needed)

    @contextmanager
    def reading(self, name: str, sizes: Mapping[str, Size], num_values: int) -> Iterator[None]:
        """Inside, an adapter of so many values may be read, and put on the shelf. Blocks while others are.

        Slots that nobody uses give way. AdapterMemoryError where that is not enough.
        """
        with self._reserved_for(name, sizes, num_values, is_patient=False):
            yield

    def put(self, version: AdapterVersion, updates: Mapping[str, LowRank]) -> None:
        """Keep a version's content on the shelf. Room for it is part of what was reserved for reading it."""
        shelf, num_bytes = self._contents.shelf, num_bytes_of(updates)
        shelf.make_room(self._shelf_bound() - num_bytes)
        # Where rows share this memory, what is left to them is found anew right after.
        self._run(lambda: shelf.put(version.effect_hash, updates))

    @contextmanager
    def at_hand(self, version: AdapterVersion) -> Iterator[None]:
        """Inside, its content does not leave the shelf, once it is there."""
        shelf = self._contents.shelf
        shelf.hold(version.effect_hash)
        try:
            yield
        finally:
            shelf.release(version.effect_hash)
            self._contents.sweep(version)
            shelf.make_room(self._shelf_bound())

    def fetch(self, version: AdapterVersion, *, is_patient: bool = False) -> None:
        """Put its content on the shelf, wherever it is now. Inside `at_hand`.

        AdapterGoneError, AdapterMemoryError; `is_patient`: NoRoomError where rows that run are in the way.
        """
        if self._contents.shelf.tier(version.effect_hash) == "host":
            return
        with self._reserved_for(version.name, version.sizes, version.num_values, is_patient=is_patient):
            self.put(version, self._contents.read(version))

    def place(self, version: AdapterVersion, *, instead_of: AdapterVersion | None = None) -> bool:
        """Give it a slot at once, if one is free without anybody giving way. Blocks while it is installed.

        Its content is on the shelf. `instead_of`: whose slot is not counted, since it is about to be retired.
        Raises AdapterMemoryError where MLX has no memory; then nothing has changed.
        """
        with self._lock:
            replaced = self._seats.get(instead_of.id) if instead_of is not None else None
            count = self._num_counted() - (replaced is not None and not replaced.is_retired)
            if version.id in self._seats:
                return True
            if count >= self.max_slots:
                return False
            seat = self._seat(version)
            seat.is_retired = replaced is not None  # until that one is
        try:
            self._install(seat, may_evict=False)
        except NoRoomError:
            self._unseat(seat)
            return False
        except BaseException:
            self._unseat(seat)
            raise
        self._settle(seat)
        return True

    def retire(self, version: AdapterVersion) -> None:
        """Its name has another version now. Its slot serves who holds it."""
        with self._lock:
            self._pinned.discard(version.id)
            seat = self._seats.get(version.id)
            if seat is not None:
                seat.is_retired = True
        self._assign()

    def revive(self, version: AdapterVersion) -> None:
        """It is its name's version again."""
        with self._lock:
            seat = self._seats.get(version.id)
            if seat is not None:
                seat.is_retired = False

    def leave(self, version: AdapterVersion) -> None:
        """No request holds it, and its name does not stand for it: its slot is free."""
        with self._lock:
            self._pinned.discard(version.id)
            self._wants.pop(version.id, None)
            seat = self._seats.get(version.id)
            is_there = seat is not None and seat.is_ready
            if seat is not None:
                assert not seat.rows, f"{version.id} leaves while rows are on it"
                seat.is_left = True
                if is_there:
                    self._take_seat(seat)
        if is_there:
            self._post(self.tidy)
            self._assign()

    def forget(self, version: AdapterVersion) -> None:
        """It is known no more; as `leave`."""
        self.leave(version)
        with self._lock:
            self._records.pop(version.id, None)

    def release(self) -> None:
        """Some request has ended: where it waited, others may have its turn."""
        if self._wants:
            self._assign()

    def pin(self, version: AdapterVersion) -> None:
        """Never evict it; bring it in, if it is not there. AdapterMemoryError if it would leave no slot to others."""
        with self._lock:
            if version.id in self._pinned:
                return
            if len(self._pinned) + 1 >= self.max_slots:
                raise AdapterMemoryError(
                    f"adapter {version.name!r} cannot be pinned: {len(self._pinned)} of {self.max_slots} slots are, "
                    f"and one is left to the others; unpin one, or raise max_adapters"
                )
            self._pinned.add(version.id)
            if version.id not in self._seats:
                self._wants.setdefault(version.id, Want(version))
        self._assign()

    def unpin(self, version: AdapterVersion) -> None:
        """It may be evicted again."""
        with self._lock:
            self._pinned.discard(version.id)
            want = self._wants.get(version.id)
            if want is not None and not want.sequences:
                del self._wants[version.id]
        self._assign()

    def move_pin(self, old: AdapterVersion, new: AdapterVersion) -> None:
        """A pinned name stands for another version now."""
        with self._lock:
            if old.id not in self._pinned:
                return
            self._pinned.discard(old.id)
            self._pinned.add(new.id)
            if new.id not in self._seats:
                self._wants.setdefault(new.id, Want(new))
        self._assign()

    def slot_of(self, version: AdapterVersion) -> int | None:
        """Its number in the bank; None while it has none."""
        with self._lock:
            seat = self._seats.get(version.id)
            return seat.slot if seat is not None and seat.is_ready else None

    def device_bytes(self, version: AdapterVersion) -> int:
        """What its slot takes; 0 without one."""
        slot = self.slot_of(version)
        return self._bank.slot_bytes(slot) if slot is not None else 0

    def standing(self, version: AdapterVersion) -> Standing:
        """How it stands."""
        with self._lock:
            seat, want = self._seats.get(version.id), self._wants.get(version.id)
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

    def stats(self) -> ResidencyStats:
        """A snapshot."""
        shelf = self._contents.shelf
        with self._lock:
            return ResidencyStats(
                num_slots=self.max_slots,
                num_seated=len(self._seats),
                num_wanted=sum(version_id not in self._seats for version_id in self._wants),
                num_hits=self._totals.num_hits,
                num_misses=self._totals.num_misses,
                num_loads=self._totals.num_loads,
                num_evicted=self._num_evicted,
                num_failed=self._num_failed,
                host_bytes=shelf.num_bytes,
                file_bytes=shelf.num_file_bytes,
            )

    def check_integrity(self, allowed: Iterable[str]) -> None:
        """Between two loads. `allowed`: ids of versions that are current, or held by requests."""
        allowed = set(allowed)
        with self._lock:
            slots = [seat.slot for seat in self._seats.values()]
            assert len({0, *slots}) == 1 + len(slots), "two versions share a slot, or the base's"
            assert self._bank.slots == set(slots), f"the bank holds {self._bank.slots}, seated are {slots}"
            assert self._seats.keys() <= allowed, f"seated are {[*self._seats]}, and may be {allowed}"
            assert self._pinned <= allowed, "a version is pinned that is neither current nor held"
            assert self._wants.keys() <= allowed, "a version is wanted that is neither current nor held"
            assert self._num_counted() <= self.max_slots, f"more than {self.max_slots} slots are taken"
            assert not self._pinned or len(self._pinned) < self.max_slots, "no slot is left to others"
            assert self._reserved == 0, "bytes are reserved for what nobody reads"
            for seat in self._seats.values():
                assert seat.is_ready, f"{seat.version.id} is still on its way"
                assert not seat.is_closing or self._wants, "nobody waits for a slot that takes no rows"
                assert all(row.slot == seat.slot for row in seat.rows), "a row is on another slot"
            taken = self._bank.num_bytes + (self._contents.shelf.num_bytes if self._host_bytes is None else 0)
            assert taken <= max(self.max_bytes, self._bank.num_bytes), "adapters take more than they may"
        self._contents.check_integrity()

    # Who gets a slot

    def _assign(self) -> None:
        """Free slots to whoever waits longest, and those in use closed for as many as may be."""
        given: list[Seat] = []
        with self._lock:
            for version_id in [id for id, want in self._wants.items() if self._is_over(want)]:
                del self._wants[version_id]
            max_closing = max(1, self.max_slots // CLOSING_SHARE)
            closing: list[Seat] = []
            has_left = self._is_short = False
            for want in [each for id, each in self._wants.items() if id not in self._seats]:
                seat, has_evicted = self._find_seat(want)
                has_left |= has_evicted
                if seat is not None:
                    given.append(seat)
                elif len(closing) < max_closing:
                    closed = self._to_close(closing)
                    closing += closed
                    self._is_short |= not closed
                elif self._num_counted() >= self.max_slots:
                    break
            reopened = [seat for seat in self._seats.values() if seat.is_closing and seat not in closing]
            for seat in reopened:
                seat.is_closing = False
            for seat in closing:
                seat.is_closing = True
        if has_left:
            self._post(self.tidy)
        for seat in given:
            self.start(lambda seat=seat: self._bring(seat))  # type: ignore[misc]
        if reopened:
            self.wake()

    def _find_seat(self, want: Want) -> tuple[Seat | None, bool]:
        """A seat for it, and whether somebody had to leave for it."""
        has_evicted = False
        if want.lacks_bytes or self._num_counted() >= self.max_slots:
            has_evicted = self._evict()
            if not has_evicted:
                return None, False
        if self._num_counted() >= self.max_slots:
            return None, has_evicted
        want.lacks_bytes = False
        return self._seat(want.version), has_evicted

    def _is_over(self, want: Want) -> bool:
        """Nobody waits for it any more."""
        return not want.sequences and want.version.id not in self._pinned

    def _to_close(self, taken: Collection[Seat]) -> list[Seat]:
        """Who is to get no new rows, beside those `taken`: rather who is closed already, else who serves fewest."""
        busy = [
            seat
            for seat in self._seats.values()
            if seat.is_ready and seat.rows and seat not in taken and seat.version.id not in self._pinned
        ]
        return sorted(busy, key=lambda seat: (not seat.is_closing, len(seat.rows), seat.used))[:1]

    def _evict(self) -> bool:
        """Take the slot that was not used longest from its version, if there is one that nobody uses."""
        idle = [seat for seat in self._seats.values() if self._is_idle(seat)]
        if not idle:
            return False
        self._take_seat(min(idle, key=lambda seat: (not seat.is_closing, seat.used)))
        self._num_evicted += 1
        return True

    def _is_idle(self, seat: Seat) -> bool:
        """Nobody uses it. Whoever has waited for it, and may have it, does."""
        want = self._wants.get(seat.version.id)
        is_awaited = want is not None and bool(want.sequences) and not seat.is_closing
        return seat.is_ready and not seat.rows and not is_awaited and seat.version.id not in self._pinned

    def _seat(self, version: AdapterVersion) -> Seat:
        seat = self._seats[version.id] = Seat(version, next(self._slots), next(self._uses))
        return seat

    def _take_seat(self, seat: Seat) -> None:
        del self._seats[seat.version.id]
        self._bank.leave(seat.slot)
        self._has_changed.notify_all()

    def _num_counted(self) -> int:
        return sum(not seat.is_retired for seat in self._seats.values())

    # How a version comes to its slot

    def _bring(self, seat: Seat) -> None:
        """On a loader: read what has a seat, and install it. Never raises."""
        version = seat.version
        try:
            with self.at_hand(version):
                self.fetch(version, is_patient=True)
                self._install(seat, may_evict=True)
        except NoRoomError:
            self._ask_again(seat)
        except StoppedError:
            self._unseat(seat)  # whoever stopped tells its requests
        except LatheError as error:
            self._fail(seat, error)
        except Exception as error:  # whatever it is, its requests must hear of it
            logger.exception("adapter %s cannot be brought in", version.id)
            self._fail(seat, LatheError(f"adapter {version.id!r} cannot be brought in: {error!r}"))
        else:
            self._settle(seat)

    def _install(self, seat: Seat, *, may_evict: bool) -> None:
        """From the shelf into the bank, in parts. NoRoomError, AdapterMemoryError."""
        version = seat.version
        with self._installing:
            updates = self._contents.read(version)
            self._make_room(seat, num_bytes_of(updates), may_evict)
            try:
                for part in self._bank.parts(updates):
                    self._run(lambda part=part: self._bank.install(seat.slot, part))  # type: ignore[misc]
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, LatheError):
                    raise
                raise AdapterMemoryError(
                    f"adapter {version.name!r} could not be installed: {error}"
                ) from error

    def _make_room(self, seat: Seat, staged: int, may_evict: bool) -> None:
        """For its bytes, `staged` of which are copies on their way. NoRoomError, AdapterMemoryError."""
        self._tidy_all()
        while True:
            with self._lock:
                needed = self._bank.peak_bytes(seat.version.sizes) + staged + self._reserved
                if self._host_bytes is None:
                    needed += self._contents.shelf.num_held_bytes
                if needed <= self.max_bytes:
                    break
                if not may_evict:
                    raise NoRoomError
                has_evicted = self._evict()
                if not has_evicted and self._reserved:
                    self._has_changed.wait()
                    continue
                may_come = self._may_have_room(seat)
            if has_evicted:
                self._tidy_all()
            elif may_come:
                raise NoRoomError
            else:
                raise self._memory_error(seat.version.name, seat.version.sizes, needed)
        if self._host_bytes is None:
            self._contents.shelf.make_room(self.max_bytes - needed + self._contents.shelf.num_held_bytes)

    def _may_have_room(self, seat: Seat) -> bool:
        """Whether somebody may leave yet."""
        others = (each for each in self._seats.values() if each is not seat)
        return any(each.version.id not in self._pinned for each in others)

    def _settle(self, seat: Seat) -> None:
        """It is all there: whoever waits for it may have it."""
        with self._lock:
            seat.is_ready = True
            self._totals.num_loads += 1
            if not seat.is_left:
                record = self._record(seat.version)
                record.problem = None
                record.num_loads += 1
            want = self._wants.get(seat.version.id)
            if want is not None and not want.sequences:
                del self._wants[seat.version.id]
            if seat.is_left:
                self._take_seat(seat)
            is_wanted = bool(self._wants)
        if seat.is_left:
            self._post(self.tidy)
        if is_wanted:
            self._assign()
        self.wake()

    def _ask_again(self, seat: Seat) -> None:
        """Its bytes have no room: it waits until somebody has left."""
        with self._lock:
            want = self._wants.get(seat.version.id)
            if want is not None:
                want.lacks_bytes = True
        self._unseat(seat)
        self._assign()

    def _fail(self, seat: Seat, error: LatheError) -> None:
        with self._lock:
            self._num_failed += 1
            if not seat.is_left:
                self._record(seat.version).problem = str(error)
            want = self._wants.pop(seat.version.id, None)
            for sequence in want.sequences if want else ():
                self._errors[sequence] = error
        logger.warning("%s", error)
        self._unseat(seat)
        if isinstance(error, AdapterGoneError):
            self.lose(seat.version)
        self._assign()
        self.wake()

    def _unseat(self, seat: Seat) -> None:
        with self._lock:
            if self._seats.get(seat.version.id) is seat:
                self._take_seat(seat)
        self._post(self.tidy)

    # Bytes

    @contextmanager
    def _reserved_for(
        self, name: str, sizes: Mapping[str, Size], num_values: int, *, is_patient: bool
    ) -> Iterator[None]:
        """Room for a read. Waits for other reads; `is_patient`: NoRoomError where rows that run are in the way."""
        num_bytes = num_values * BYTES_A_VALUE_READ
        if self._host_bytes is None:
            num_bytes += self._contents.num_bytes(num_values)
        self._reserve(name, sizes, num_bytes, is_patient)
        try:
            if self._host_bytes is None:
                self._contents.shelf.make_room(self._shelf_bound())
            yield
        finally:
            with self._lock:
                self._reserved -= num_bytes
                self._has_changed.notify_all()

    def _reserve(self, name: str, sizes: Mapping[str, Size], num_bytes: int, is_patient: bool) -> None:
        while True:
            with self._lock:
                needed = self._bank.num_bytes + num_bytes
                if self._host_bytes is None:
                    needed += self._contents.shelf.num_held_bytes
                if needed + self._reserved <= self.max_bytes:
                    self._reserved += num_bytes
                    return
                has_evicted = self._evict()
                if not has_evicted and self._reserved:
                    self._has_changed.wait()
                    continue
                may_come = is_patient and any(
                    seat.version.id not in self._pinned for seat in self._seats.values() if seat.is_ready
                )
            if has_evicted:
                self._tidy_all()
            elif may_come:
                raise NoRoomError
            else:
                raise self._memory_error(name, sizes, needed)

    def _shelf_bound(self) -> int:
        if self._host_bytes is not None:
            return self._host_bytes
        return self.max_bytes - self._bank.num_bytes - self._reserved

    def _memory_error(self, name: str, sizes: Mapping[str, Size], needed: int) -> AdapterMemoryError:
        with self._lock:
            retired = sum(seat.is_retired for seat in self._seats.values())
            pinned = len(self._pinned)
            count = len(self._seats)
            taken = self._bank.num_bytes
        rank = max((size.rank for size in sizes.values()), default=0)
        waiting = f", wait for the requests that still hold {retired} replaced versions" if retired else ""
        unpin = f", unpin one of {pinned}" if pinned else ""
        return AdapterMemoryError(
            f"adapter {name!r} of rank {rank} needs {_mib(needed)} of memory for adapters while it is loaded; "
            f"adapter_budget_gib allows {_mib(self.max_bytes)}, and {count} versions take {_mib(taken)} now. "
            f" Unload one{waiting}{unpin}, load one of a lower rank, or raise adapter_budget_gib"
        )

    def tidy(self) -> None:
        """Between two steps: give back what has left, about as much as may be copied there; the rest soon."""
        if self._bank.tidy():
            self._post(self.tidy)

    def _tidy_all(self) -> None:
        """As much at a time as a running stream may be held up."""
        is_more = [True]
        while is_more[0]:
            self._run(lambda: is_more.__setitem__(0, self._bank.tidy()))

    def _later(self, work: Callable[[], None]) -> None:
        self._pending.append(work)


def _nothing() -> None:
    """Nobody waits."""


def _nothing_of(_version: AdapterVersion) -> None:
    """Nobody knows of versions."""


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
