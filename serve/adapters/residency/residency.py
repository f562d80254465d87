"""How a version comes to its slot on the device, and leaves it, within the bytes that there are. Knows no names.

A version that is asked for and has no slot (`Seats` has who gets one) is brought in by a loader, between two steps of
whatever runs, in parts; only its own requests wait. What is read, copied and kept meanwhile is part of one budget:
slots that nobody uses give way for it, and then what is kept in host memory.

The engine's thread asks `hold` and `let_go`; everything else may be called from any thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from serve.adapters.bank.bank import Bank
from serve.adapters.fitting.update import LowRank, Size
from serve.adapters.residency.contents import Contents
from serve.adapters.residency.seats import Seat, Seats, Standing
from serve.adapters.residency.shelf import num_bytes_of, packed_of
from serve.adapters.versions.version import AdapterVersion
from serve.errors import AdapterGoneError, AdapterMemoryError, LatheError, StoppedError

if TYPE_CHECKING:
    from serve.engine.plan import SequenceState

logger = logging.getLogger(__name__)

BYTES_A_VALUE_READ = 8
"""Of an adapter that is read: its tensors as stored, in float32 at most, and the updates made of them."""

Run = Callable[[Callable[[], None]], None]


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
        self._tidying = threading.Lock()  # likewise; never taken by the engine's thread
        self._lock = threading.Lock()  # guards everything below; held for dictionary work alone
        self._is_tidy_due = False
        self._has_changed = threading.Condition(self._lock)
        self._reserved = 0  # bytes that reads under way may take
        self._seats = Seats(max_slots, self._freed)
        self._errors: WeakKeyDictionary[SequenceState, LatheError] = WeakKeyDictionary()

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
            has_slot = self._seats.take_row(sequence, version)
            is_due = self._seats.is_short if has_slot else self._seats.ask_for(sequence, version)
        if is_due:
            self._assign()
        return has_slot

    def let_go(self, sequence: SequenceState) -> None:
        """As `Adapters.let_go`: it has no row now."""
        version = sequence.request.adapter
        if version is None:
            return
        with self._lock:
            is_due = self._seats.let_go(sequence, version)
        if is_due:
            self._assign()

    def use_loaders(self, start: Callable[[Callable[[], None]], object], wake: Callable[[], None]) -> None:
        """From here on `start` has work done on another thread, and the engine's thread is woken by `wake`."""
        self.start, self.wake = start, wake
        with self._lock:
            self._is_tidy_due = False  # until now nobody was there to do it
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
        packed = packed_of(updates)
        # Where rows share this memory, what is left to them is found anew right after.
        self._run(lambda: shelf.put(version.effect_hash, packed))

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
            replaced = self._seats.get(instead_of) if instead_of is not None else None
            count = self._seats.num_counted - (replaced is not None and not replaced.is_retired)
            if self._seats.get(version) is not None:
                return True
            if count >= self._seats.max_slots:
                return False
            # It is counted when that one is not any more.
            seat = self._seats.seat(version, is_retired=replaced is not None)
        is_there = False
        try:
            self._install(seat, may_evict=False)
            is_there = True
        except NoRoomError:
            pass
        finally:
            if not is_there:
                self._unseat(seat)
        if is_there:
            self._settle(seat)
        return is_there

    def hand_over(self, old: AdapterVersion, new: AdapterVersion) -> None:
        """A name stands for `new` now, and no longer for `old`, whose slot serves who holds it. A pin goes along."""
        with self._lock:
            self._seats.hand_over(old, new)
        self._assign()

    def leave(self, version: AdapterVersion) -> None:
        """No request holds it, and its name does not stand for it: its slot is free."""
        with self._lock:
            was_there = self._seats.leave(version)
        if was_there:
            self._tidy_soon()
            self._assign()

    def forget(self, version: AdapterVersion) -> None:
        """It is known no more; as `leave`."""
        self.leave(version)
        with self._lock:
            self._seats.forget(version)

    def release(self) -> None:
        """Some request has ended: where it waited, others may have its turn."""
        if self._seats.is_wanted:
            self._assign()

    def pin(self, version: AdapterVersion) -> None:
        """Never evict it; bring it in, if it is not there. AdapterMemoryError if it would leave no slot to others."""
        with self._lock:
            if self._seats.is_pinned(version):
                return
            count, most = self._seats.num_pinned, self._seats.max_slots
            if count + 1 >= most:
                raise AdapterMemoryError(
                    f"adapter {version.name!r} cannot be pinned: {count} of {most} slots are, and one is left to the "
                    f"others; unpin one, or raise max_adapters"
                )
            self._seats.pin(version)
        self._assign()

    def unpin(self, version: AdapterVersion) -> None:
        """It may be evicted again."""
        with self._lock:
            self._seats.unpin(version)
        self._assign()

    def slot_of(self, version: AdapterVersion) -> int | None:
        """Its number in the bank; None while it has none."""
        with self._lock:
            seat = self._seats.get(version)
            return seat.slot if seat is not None and seat.is_ready else None

    def device_bytes(self, version: AdapterVersion) -> int:
        """What its slot takes; 0 without one."""
        slot = self.slot_of(version)
        return self._bank.slot_bytes(slot) if slot is not None else 0

    def standing(self, version: AdapterVersion) -> Standing:
        """How it stands."""
        with self._lock:
            return self._seats.standing(version)

    def stats(self) -> ResidencyStats:
        """A snapshot."""
        shelf = self._contents.shelf
        with self._lock:
            seats = self._seats
            return ResidencyStats(
                num_slots=seats.max_slots,
                num_seated=len(seats),
                num_wanted=seats.num_wanted,
                num_hits=seats.totals.num_hits,
                num_misses=seats.totals.num_misses,
                num_loads=seats.totals.num_loads,
                num_evicted=seats.num_evicted,
                num_failed=seats.num_failed,
                host_bytes=shelf.num_bytes,
                file_bytes=shelf.num_file_bytes,
            )

    def check_integrity(self, allowed: Collection[str]) -> None:
        """Between two loads. `allowed`: ids of versions that are current, or held by requests."""
        with self._lock:
            self._seats.check_integrity(allowed)
            slots = {seat.slot for seat in self._seats}
            assert self._bank.slots == slots, f"the bank holds {self._bank.slots}, seated are {slots}"
            assert self._reserved == 0, "bytes are reserved for what nobody reads"
            taken = self._bank.num_bytes + (self._contents.shelf.num_bytes if self._host_bytes is None else 0)
            assert taken <= max(self.max_bytes, self._bank.num_bytes), "adapters take more than they may"
        self._contents.check_integrity()

    def _assign(self) -> None:
        """Slots to whoever waits for one, as far as they go."""
        with self._lock:
            made = self._seats.assign()
        if made.has_left:
            self._tidy_soon()
        for seat in made.given:
            self.start(lambda seat=seat: self._bring(seat))  # type: ignore[misc]
        if made.has_reopened:
            self.wake()

    def _freed(self, slot: int) -> None:
        """Under the lock: nobody has this slot any more."""
        self._bank.leave(slot)
        self._has_changed.notify_all()

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
                has_evicted = self._seats.evict()
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
        others = (each for each in self._seats if each is not seat)
        return any(not self._seats.is_pinned(each.version) for each in others)

    def _settle(self, seat: Seat) -> None:
        """It is all there: whoever waits for it may have it."""
        with self._lock:
            self._seats.settle(seat)
            is_wanted = self._seats.is_wanted
        if seat.is_left:
            self._tidy_soon()
        if is_wanted:
            self._assign()
        self.wake()

    def _ask_again(self, seat: Seat) -> None:
        """Its bytes have no room."""
        with self._lock:
            self._seats.lack_bytes(seat)
        self._tidy_soon()
        self._assign()

    def _fail(self, seat: Seat, error: LatheError) -> None:
        logger.warning("%s", error)
        with self._lock:
            for sequence in self._seats.fail(seat, str(error)):
                self._errors[sequence] = error
        self._tidy_soon()
        if isinstance(error, AdapterGoneError):
            self.lose(seat.version)
        self._assign()
        self.wake()

    def _unseat(self, seat: Seat) -> None:
        with self._lock:
            self._seats.unseat(seat)
        self._tidy_soon()

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
                has_evicted = self._seats.evict()
                if not has_evicted and self._reserved:
                    self._has_changed.wait()
                    continue
                may_come = is_patient and any(
                    not self._seats.is_pinned(seat.version) for seat in self._seats if seat.is_ready
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
            retired = sum(seat.is_retired for seat in self._seats)
            pinned = self._seats.num_pinned
            count = len(self._seats)
            taken = self._bank.num_bytes
        rank = max((size.rank for size in sizes.values()), default=0)
        waiting = f", wait for the requests that still hold {retired} replaced versions" if retired else ""
        unpin = f", unpin one of {pinned}" if pinned else ""
        return AdapterMemoryError(
            f"adapter {name!r} of rank {rank} needs {_mib(needed)} of memory for adapters while it is loaded; "
            f"adapter_budget_gib allows {_mib(self.max_bytes)}, and {count} versions take {_mib(taken)} now."
            f" Unload one{waiting}{unpin}, load one of a lower rank, or raise adapter_budget_gib"
        )

    def tidy(self) -> None:
        """Between two steps: give back what has left, about as much as may be copied there; the rest soon."""
        with self._lock:
            self._is_tidy_due = False
        if self._bank.tidy():
            self._tidy_soon()

    def _tidy_soon(self) -> None:
        """Once before the next step, however many versions leave until then."""
        with self._lock:
            if self._is_tidy_due:
                return
            self._is_tidy_due = True
        self._post(self.tidy)

    def _tidy_all(self) -> None:
        """As much at a time as a running stream may be held up, whoever else needs it too."""
        is_more = [True]
        with self._tidying:
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
