"""Names → versions: which one new requests get, which are known beside it, who holds what until when. No arrays.

A load makes `name@N`. New requests get the newest version at once; those that run end with the one they began with.
What was replaced stays known, a bounded number of versions a name: it can be asked for as `name@N`, and the name can
be rolled back to it. Where a version is (device, host memory, disk), and how it gets to the device, is `residency`'s.
Safe to call from any thread.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from serve.adapters.bank.bank import Bank
from serve.adapters.fitting.update import LowRank
from serve.adapters.registry.admission import Admission, Admitted
from serve.adapters.registry.known import Known, Name, ShownName, ShownVersion
from serve.adapters.residency.contents import Contents
from serve.adapters.residency.residency import Residency, Run
from serve.adapters.residency.shelf import num_bytes_of
from serve.adapters.versions.names import new_name_problem
from serve.adapters.versions.source import Content, Fitting, FolderSource, Outline, Source
from serve.adapters.versions.version import AdapterVersion
from serve.errors import AdapterError, NotFoundError
from serve.model.loading import LoadedModel
from serve.model.template_rules import TemplateRules

MAX_NAMES = 1 << 14
"""A name costs little, and not nothing."""
FILE_BYTES = 4 << 30


def run_here(function: Callable[[], None]) -> None:
    """Run on the calling thread: right where no worker thread owns the arrays."""
    function()


def do_later(_function: Callable[[], None]) -> None:
    """Leave it: the next load or unload tidies first."""


class Registry:
    """The adapters a server knows.

    run   executes a function on the thread that owns the arrays, and waits
    post  has it executed there soon, and does not wait
    max_bytes   of all adapters on the device, and what is copied while one is loaded
    host_bytes  of those in host memory; None: as much as the device's leave of `max_bytes`
    max_slots   versions on the device; names there may be many more
    max_others  versions of a name that are known beside the current one and those that requests hold
    max_found   names that were looked up for requests and are not forgotten
    max_combined  of those, combinations
    rules       of the base's chat template; an adapter's own template, and its variables, take their place in them
    """

    def __init__(
        self,
        model: LoadedModel,
        bank: Bank,
        *,
        max_bytes: int,
        host_bytes: int | None = None,
        file_bytes: int = FILE_BYTES,
        max_slots: int = 64,
        max_others: int = 8,
        max_found: int = 4096,
        max_combined: int = 256,
        max_rank: int = 256,
        allow_other_base: bool = False,
        rules: TemplateRules = TemplateRules(),
    ) -> None:
        self.run: Run = run_here
        self.post: Run = do_later
        self._model = model
        self._fitting = Fitting(model.network, max_rank)
        self._admission = Admission(model, rules, allow_other_base=allow_other_base)
        self.contents = Contents(self._fitting, model.network.parameters_dtype(), max_file_bytes=file_bytes)
        self.residency = Residency(
            bank,
            Bank(model.network),
            self.contents,
            max_slots=max_slots,
            max_bytes=max_bytes,
            host_bytes=host_bytes,
            run=lambda function: self.run(function),
            post=lambda function: self.post(function),
        )
        self.residency.lose = self._lose
        self._max_others = max_others
        self._max_found = max_found
        self._max_combined = max_combined
        self._lock = threading.Lock()  # guards everything below; held for dictionary work alone
        self._names: dict[str, Name] = {}
        self._known: dict[str, Known] = {}  # by id; of a name, or still held by requests
        self._found: OrderedDict[str, None] = (
            OrderedDict()
        )  # names that were looked up, the one used last at the end
        self._last_number: dict[str, int] = {}
        self._recalled: dict[str, dict[str, int]] = {}  # numbers of contents, by name
        self._busy: dict[str, _Turn] = {}  # names of which a version is made or changed

    @property
    def max_bytes(self) -> int:
        """What adapters may take on the device, copies while one is loaded included."""
        return self.residency.max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        self.residency.max_bytes = value

    @property
    def host_bytes(self) -> int:
        """What they take in host memory."""
        return self.contents.shelf.num_bytes

    # Versions come and go

    def load(self, name: str, path: str | Path, *, replace: bool = False) -> AdapterVersion:
        """As `add`, from an adapter folder."""
        return self.add(name, FolderSource(path), replace=replace)

    def add(
        self,
        name: str,
        source: Source,
        *,
        replace: bool = False,
        is_found: bool = False,
        is_combined: bool = False,
    ) -> AdapterVersion:
        """Read and check an adapter; new requests for `name` use it from here on.

        is_found     it was looked up for a request: what the name stands for already will do, and it may be forgotten
        is_combined  it is other versions, added: named by them, listed apart, and the only one of its name

        Blocks while it is read; running streams go on. It gets a slot at once where one is free, or its name's
        earlier version has one; else when it is asked for. Nothing changes when it raises: NotFoundError,
        AdapterError (unreadable, does not fit, name taken), AdapterMemoryError (never enough, or not now).
        """
        with self._turn(name):
            known = self._current(name) if is_found else None
            if known is not None:
                return known
            if not is_combined:
                self._check_name(name, replace)
            outline = source.look(name, self._fitting)
            admitted = self._admission.check(name, outline)
            self.residency.check_alone(name, outline.sizes, outline.num_values)
            before = self._current(name)
            with ExitStack() as stack:
                with self.residency.reading(name, outline.sizes, outline.num_values):
                    content = source.read(name, self._fitting)
                    number = 0 if is_combined else self._number(name, content.content_hash)
                    updates = self.contents.prepared(content.updates)
                    version = self._make(
                        name, number, source, outline, content, admitted, num_bytes_of(updates)
                    )
                    del content
                    self.contents.add(version, source)
                    stack.callback(self._drop_unless_known, version)
                    stack.enter_context(self.residency.at_hand(version))
                    self.residency.put(version, updates)
                    del updates
                self.residency.place(version, instead_of=before)
                self._publish(Known(version, source), before, is_found=is_found)
            return version

    def unload(self, name: str) -> None:
        """New requests for `name` are refused at once; running ones end with the version they hold."""
        with self._lock:
            if name not in self._names:
                raise NotFoundError(f"no adapter {name!r} is loaded")
            left = self._forget_name(name)
        self._leave(left)

    def rollback(self, name: str, number: int | None = None) -> AdapterVersion:
        """New requests for `name` get an earlier version again; the one before the current one, if none is named.

        NotFoundError where it is not known, AdapterGoneError where it is known and its content is nowhere any more.
        """
        with self._turn(name), self._held(lambda: self._earlier(name, number)) as known:
            version, before = known.version, self._current(name)
            if version == before:
                return version
            with self.residency.at_hand(version):
                if self.residency.slot_of(version) is None:
                    self.residency.fetch(version)
                    self.residency.place(version, instead_of=before)
                self._publish(known, before)
            return version

    def pin(self, name: str) -> AdapterVersion:
        """Keep a slot for whatever `name` stands for. NotFoundError; AdapterMemoryError if no slot would be left."""
        with self._turn(name), self._held(lambda: self._entry(name).current) as known:
            self.residency.pin(known.version)
            with self._lock:
                self._entry(name).is_pinned = True
            return known.version

    def unpin(self, name: str) -> AdapterVersion:
        """It may be evicted again. NotFoundError."""
        with self._turn(name):
            with self._lock:
                entry = self._entry(name)
                entry.is_pinned = False
                version = entry.current.version
            self.residency.unpin(version)
            return version

    def earlier(self, name: str) -> list[tuple[AdapterVersion, Source]]:
        """Versions beside the one that a name stands for, and where they can be read again as they were."""
        with self._lock:
            others = list(self._entry(name).others.values())
        return [(each.version, each.source) for each in others if each.source.is_intact]

    def remember(self, name: str, earlier: Iterable[tuple[AdapterVersion, Source]]) -> None:
        """What `earlier` gave of another registry of this base. Nothing is read before it is asked for."""
        with self._turn(name):
            for version, source in earlier:
                template = self._admission.own_template(name, version.lineage)
                known = Known(replace(version, template=template), source)
                with self._lock:
                    entry = self._entry(name)
                    if known.version.id in self._known:
                        continue
                    self.contents.add(known.version, source)
                    entry.others[version.number] = known
                    self._known[known.version.id] = known
                    left = self._drop_old(name)
                self._leave(left)

    def last_number(self, name: str) -> int:
        """Of the versions of a name that were ever made; 0: none was."""
        with self._lock:
            return self._last_number.get(name, 0)

    def recall(self, name: str, last_number: int, numbers: Mapping[str, int]) -> None:
        """Before a name's first version is made: another registry of this base had made so many, and of what its next
        content may be (by hash) that one had this number."""
        with self._lock:
            assert name not in self._names, f"{name} is known"
            self._last_number[name] = last_number
            self._recalled[name] = dict(numbers)

    # Requests hold versions

    def acquire(self, name: str) -> AdapterVersion:
        """The version a new request for `name` or `name@N` uses, held until `release`. It need not have a slot."""
        with self._lock:
            known = self._find(name)
            if name in self._found:
                self._found.move_to_end(name)
            self._hold(known)
            return known.version

    def release(self, version: AdapterVersion) -> None:
        """The request that held `version` has ended."""
        left: list[Known] = []
        with self._lock:
            for known in self._with_parts(self._known[version.id]):
                assert known.num_requests > 0, f"{known.version.id} released more often than acquired"
                known.num_requests -= 1
                self.contents.let_go(known.version)
                if not known.num_requests and not self._is_current(known):
                    left.append(known)
                    left += self._drop_old(known.version.name)
        self._leave(left)
        self.residency.release()

    def read(self, version: AdapterVersion) -> Mapping[str, LowRank]:
        """Its updates by module path, as the bank computes with them; whoever asks holds it. Blocks.

        AdapterGoneError, AdapterMemoryError.
        """
        with self.residency.at_hand(version):
            self.residency.fetch(version)
            return self.contents.read(version)

    def resolve(self, name: str) -> AdapterVersion:
        """The version `name` or `name@N` stands for now, without holding it."""
        with self._lock:
            return self._find(name).version

    def knows(self, name: str) -> bool:
        """Whether `name`, or `name@N`, is an adapter; combinations are none."""
        with self._lock:
            entry = self._names.get(name)
            known = entry.current if entry is not None else self._known.get(name)
            return known is not None and not known.version.is_combined

    # What there is

    def versions(self) -> list[AdapterVersion]:
        """Every version that answers requests: the current one of each name, and others that requests hold."""
        with self._lock:
            return [known.version for known in self._known.values() if self._is_in_use(known)]

    def current(self) -> list[AdapterVersion]:
        """What each name stands for."""
        with self._lock:
            versions = [entry.current.version for entry in self._names.values()]
        return [version for version in versions if not version.is_combined]

    def names(self) -> list[str]:
        """Names that new requests may ask for."""
        return [version.name for version in self.current()]

    def combinations(self) -> list[str]:
        """What requests had added, and is kept."""
        with self._lock:
            return [name for name, entry in self._names.items() if entry.current.version.is_combined]

    def num_pins(self, version: AdapterVersion) -> int:
        """How many requests hold `version`."""
        with self._lock:
            known = self._known.get(version.id)
            return known.num_requests if known else 0

    def slot_of(self, version: AdapterVersion) -> int | None:
        """Its number in the bank; None while it has none."""
        return self.residency.slot_of(version)

    def device_bytes(self, version: AdapterVersion) -> int:
        """What it takes on the device; 0 without a slot."""
        return self.residency.device_bytes(version)

    def show(self, name: str) -> ShownName:
        """A name, and its versions as they are. NotFoundError."""
        found = self.find(name)
        if found is None:
            raise NotFoundError(f"no adapter {name!r} is loaded")
        return found

    def find(self, name: str) -> ShownName | None:
        """As `show`; None where there is none."""
        with self._lock:
            entry = self._names.get(name)
            if entry is None:
                return None
            known = [entry.current, *entry.others.values()]
            counts = [each.num_requests for each in known]
            is_pinned, is_found, current = entry.is_pinned, name in self._found, entry.current.version
        shown = [
            ShownVersion(
                each.version,
                each.version == current,
                count,
                self.contents.tier(each.version),
                self.residency.standing(each.version),
            )
            for each, count in zip(known, counts, strict=True)
        ]
        shown.sort(key=lambda each: -each.version.number)
        return ShownName(name, is_pinned, is_found, tuple(shown))

    def close(self) -> None:
        """Delete the files that were written here. Nothing is loaded afterwards."""
        self.contents.shelf.close()

    def check_integrity(self) -> None:
        """Between two loads: names, versions, slots and bytes agree."""
        with self._lock:
            for name, entry in self._names.items():
                known = {each.version.number: each for each in (entry.current, *entry.others.values())}
                assert len(known) == 1 + len(entry.others), f"a version of {name} is known twice"
                assert all(each.version.name == name for each in known.values()), f"another name's in {name}"
                assert all(self._known.get(each.version.id) is each for each in known.values())
                assert max(known) <= self._last_number[name], f"{name} has a version that was never made"
                idle = [each for each in entry.others.values() if not each.num_requests]
                assert len(idle) <= self._max_others, (
                    f"more than {self._max_others} versions of {name} are kept"
                )
            assert all(known.version.id == id for id, known in self._known.items())
            assert all(known.num_requests >= 0 for known in self._known.values())
            for id, one in self._known.items():
                assert self._is_of_name(one) or one.num_requests, f"nobody holds {id}"
            assert set(self._found) <= self._names.keys(), "a name that was found is known no more"
            assert not self._busy, "a version is being made"
            keys = {known.version.effect_hash for known in self._known.values()}
            in_use = [id for id, known in self._known.items() if self._is_in_use(known)]
        assert self.contents.keys == keys, "content of versions that are not known"
        self.residency.check_integrity(in_use)

    # Under the lock

    def _hold(self, known: Known) -> None:
        for each in self._with_parts(known):
            each.num_requests += 1
            self.contents.hold(each.version)

    def _with_parts(self, known: Known) -> list[Known]:
        """A version, and what it adds: it may be made again of that."""
        return [known, *(self._known[id] for id in known.version.parts if id in self._known)]

    def _entry(self, name: str) -> Name:
        entry = self._names.get(name)
        if entry is None:
            raise NotFoundError(f"no adapter {name!r} is loaded")
        return entry

    def _earlier(self, name: str, number: int | None) -> Known:
        """A version of it by number; None: the one before the current one."""
        entry = self._entry(name)
        current = entry.current.version
        if number == current.number:
            return entry.current
        if number is None:
            number = max((each for each in entry.others if each < current.number), default=0)
            if not number:
                raise NotFoundError(f"adapter {name!r} has no version before {current.id!r}")
        if number not in entry.others:
            raise NotFoundError(self._unknown_number(name, entry, number))
        return entry.others[number]

    def _find(self, name: str) -> Known:
        entry = self._names.get(name)
        known = entry.current if entry is not None else self._known.get(name)
        if known is None:
            base, _, number = name.partition("@")
            entry = self._names.get(base)
            if entry is not None and number.isdecimal():
                raise NotFoundError(self._unknown_number(base, entry, int(number)))
            raise NotFoundError(f"no adapter {name!r} is loaded")
        return known

    def _unknown_number(self, name: str, entry: Name, number: int) -> str:
        numbers = sorted((entry.current.version.number, *entry.others))
        known = ", ".join(map(str, numbers))
        if number > self._last_number[name] or number < 1:
            return f"adapter {name!r} has no version {number}; there are {known}"
        return (
            f"version {number} of adapter {name!r} is known no more; there are {known}, for {self._max_others} are "
            f"kept beside the current one (adapter_versions)"
        )

    def _is_current(self, known: Known) -> bool:
        entry = self._names.get(known.version.name)
        return entry is not None and entry.current is known

    def _is_of_name(self, known: Known) -> bool:
        entry = self._names.get(known.version.name)
        return entry is not None and (
            entry.current is known or entry.others.get(known.version.number) is known
        )

    def _is_in_use(self, known: Known) -> bool:
        return known.num_requests > 0 or self._is_current(known)

    def _forget_name(self, name: str) -> list[Known]:
        """A name is gone; its versions that nobody holds."""
        entry = self._names.pop(name)
        self._found.pop(name, None)
        if entry.current.version.is_combined:
            self._last_number.pop(name, None)
        return [each for each in (entry.current, *entry.others.values()) if not each.num_requests]

    def _forget_sums(self, part: AdapterVersion) -> list[Known]:
        """A version is known no more, and nobody can ask for what it was added to."""
        names = [name for name in self._found if part.id in self._names[name].current.version.parts]
        return [known for name in names for known in self._forget_name(name)]

    def _drop_old(self, name: str) -> list[Known]:
        """The oldest versions of a name beyond those that are kept."""
        entry = self._names.get(name)
        if entry is None:
            return []
        idle = [number for number, each in sorted(entry.others.items()) if not each.num_requests]
        return [entry.others.pop(number) for number in idle[: max(len(idle) - self._max_others, 0)]]

    def _drop_found(self) -> list[Known]:
        """What was not asked for longest, of more names than are kept that were looked up, or added up."""
        left: list[Known] = []
        num_combined = sum(self._names[name].current.version.is_combined for name in self._found)
        for name in list(self._found):
            entry = self._names[name]
            is_combined = entry.current.version.is_combined
            is_over = len(self._found) > self._max_found
            is_over = is_over or (is_combined and num_combined > self._max_combined)
            is_held = any(each.num_requests for each in (entry.current, *entry.others.values()))
            if is_over and not entry.is_pinned and not is_held:
                left += self._forget_name(name)
                num_combined -= is_combined
        return left

    # Making versions

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """One at a time makes or changes versions of a name."""
        with self._lock:
            turn = self._busy.setdefault(name, _Turn())
            turn.num_waiting += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._lock:
                turn.num_waiting -= 1
                if not turn.num_waiting:
                    del self._busy[name]

    def _number(self, name: str, content_hash: str) -> int:
        """Of a version to be made."""
        with self._lock:
            recalled = self._recalled.pop(name, {}).get(content_hash)
            return self._last_number.get(name, 0) + 1 if recalled is None else recalled

    def _current(self, name: str) -> AdapterVersion | None:
        with self._lock:
            entry = self._names.get(name)
            return entry.current.version if entry else None

    @contextmanager
    def _held(self, find: Callable[[], Known]) -> Iterator[Known]:
        """What is found, under the lock, is not forgotten inside: others may leave, and its name may go."""
        with self._lock:
            known = find()
            self._hold(known)
        try:
            yield known
        finally:
            self.release(known.version)

    def _publish(self, known: Known, before: AdapterVersion | None, *, is_found: bool = False) -> None:
        """From here on the name stands for it."""
        version = known.version
        left: list[Known] = []
        with self._lock:
            entry = self._names.get(version.name)
            if entry is None:
                if version.id in self._known:
                    raise NotFoundError(f"adapter {version.name!r} was unloaded meanwhile")
                self._names[version.name] = Name(known)
                if is_found:
                    self._found[version.name] = None
            else:
                self._found.pop(version.name, None)  # somebody has decided what it stands for
                entry.others.pop(version.number, None)
                entry.others[entry.current.version.number] = entry.current
                entry.current = known
            self._known[version.id] = known
            self._last_number[version.name] = max(version.number, self._last_number.get(version.name, 0))
            replaced = self._known.get(before.id) if before is not None else None
            if replaced is not None and not replaced.num_requests:
                left.append(replaced)
            gone = [*self._drop_old(version.name), *self._drop_found()]
        if before is not None:
            self.residency.hand_over(before, version)
        self._leave([*left, *gone])

    def _leave(self, known: list[Known]) -> None:
        """Of versions that nobody uses the slots are free; those that no name has are known no more, nor is what they
        are added to."""
        left = deque(known)
        while left:
            each = left.popleft()
            with self._lock:
                if self._is_in_use(each):
                    continue
                is_gone = not self._is_of_name(each)
                if is_gone:
                    self._known.pop(each.version.id, None)
                    left += self._forget_sums(each.version)
            if is_gone:
                self.residency.forget(each.version)
                self.contents.drop(each.version)
            else:
                self.residency.leave(each.version)

    def _make(
        self,
        name: str,
        number: int,
        source: Source,
        outline: Outline,
        content: Content,
        admitted: Admitted,
        num_bytes: int,
    ) -> AdapterVersion:
        lineage = outline.lineage
        return AdapterVersion(
            name,
            number,
            content.content_hash,
            source.path,
            admitted.notes,
            parts=outline.parts,
            stop_ids=lineage.stop_ids if lineage else (),
            effect_hash=content.effect_hash,
            tower_hash=content.tower_hash,
            template=admitted.template,
            lineage=lineage,
            format=outline.format,
            sizes=outline.sizes,
            num_values=outline.num_values,
            num_bytes=num_bytes,
            created_s=time.time(),
        )

    def _lose(self, version: AdapterVersion) -> None:
        """Its content is nowhere any more. What was found for a request may be found again, as it is now."""
        with self._lock:
            entry = self._names.get(version.name)
            is_over = entry is not None and version.name in self._found and entry.current.version == version
            left = self._forget_name(version.name) if is_over else []
        self._leave(left)

    def _drop_unless_known(self, version: AdapterVersion) -> None:
        with self._lock:
            is_known = version.id in self._known
        if not is_known:
            self.contents.drop(version)

    def _check_name(self, name: str, replace: bool) -> None:
        expected = new_name_problem(name, self._model.name)
        if expected:
            raise AdapterError(f"an adapter cannot be called {name!a:.80}: {expected}")
        with self._lock:
            if name in self._names and not replace:
                raise AdapterError(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
                    f"place, set 'load_inplace' to True."
                )
            if name not in self._names and len(self._names) >= MAX_NAMES:
                raise AdapterError(
                    f"adapter {name!r}: {MAX_NAMES:,} adapters are known, and no more are; unload one"
                )


@dataclass(eq=False)
class _Turn:
    """Whoever makes versions of one name, one after the other."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_waiting: int = 0
