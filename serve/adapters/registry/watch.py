"""Watched folders → versions: what a training run publishes, and what somebody puts there, is loaded as it appears.

A watched folder is a run's or an adapter's, known by its own name, or holds such folders, each known by its name.
They are looked at again and again (`os.scandir`, `os.stat`), since what a system tells of changes reaches across
no network. An adapter is taken when it is whole: a checkpoint is renamed into its place, and the content hash in a
manifest gives half a pair of files away; without one, files must have stayed the same for `STILL_S`. It is copied, so
that a version outlives its checkpoint. The newest wins; an older one never follows a newer one, unless another folder
has taken its place. What cannot be loaded is told once and tried again when it changes. A folder that goes leaves its
name: somebody unloads it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve.adapters.formats.files import AdapterFiles, read_adapter
from serve.adapters.formats.manifest import effect_hash
from serve.adapters.formats.published import Published, Signature, published_in, stands_for_itself
from serve.adapters.registry.copies import Copies
from serve.adapters.versions.names import name_problem
from serve.adapters.versions.version import AdapterVersion
from serve.argument_text import readable
from serve.errors import AdapterError, AdapterMemoryError, ForbiddenError, LatheError

logger = logging.getLogger(__name__)

STILL_S = 2.0
"""So long must the files of an adapter have stayed the same whose manifest holds no content hash."""
SLICE_S = 0.002
"""Of processor time, after which the thread rests: a folder of thousands must not hold streams up."""
REST = 9
"""Times as long as it worked."""
FIRST_AGAIN_S, LAST_AGAIN_S = 10.0, 600.0
"""When what may pass by itself (no memory, no room on disk) is tried again: twice as late each time."""

Load = Callable[[str, Path], AdapterVersion]


@dataclass
class _Followed:
    """A folder that stands for an adapter, and how far it has been followed."""

    top: Path
    """The watched folder that it is, or is in."""
    folder: Path
    place: str
    """Where it is, links followed."""
    seen: Signature | None = None
    """Of its files at the last look; they are so since `since_s`."""
    since_s: float = 0.0
    last: Published | None = None
    """The newest that was loaded or refused."""
    content: str = ""
    """Of what was loaded last."""
    copy: Path | None = None
    """The last one that was made."""
    version: str = ""
    problem: str = ""
    has_rival: bool = False
    """It is not loaded because another one is called so."""
    again_s: float | None = None
    """When it is tried again although it has not changed."""
    wait_s: float = FIRST_AGAIN_S
    is_there: bool = True
    look: int = 0
    """The number of the last look at which it was there."""

    @property
    def name(self) -> str:
        return self.folder.name


@dataclass(frozen=True)
class Watched:
    """What is known of one of them, to be shown."""

    name: str
    folder: str
    version: str
    """The last one that was loaded; "" if none."""
    problem: str
    """Why what stands there now is not loaded; "" if it is."""
    is_there: bool


class AdapterWatch:
    """Follows folders from a thread of its own, between `start` and `close`.

    load       loads a folder as a name's new version, as Registry.load does with `replace`; called on that thread
    roots      where files may be, links followed; None: anywhere
    max_bytes  of a file of tensors; a larger one is refused before it is copied
    clock      seconds, of any origin
    """

    def __init__(
        self,
        folders: Sequence[Path],
        load: Load,
        copies: Copies,
        *,
        roots: Sequence[Path] | None = None,
        interval_s: float = 1.0,
        max_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folders = tuple(folder.expanduser().absolute() for folder in folders)
        self._load = load
        self._copies = copies
        self._roots = None if roots is None else [root.expanduser().resolve() for root in roots]
        self._interval_s = interval_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._number = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lathe-watch", daemon=True)
        self._lock = threading.Lock()  # guards what follows, which the watching thread alone changes
        self._followed: dict[Path, _Followed] = {}
        self._loaded: dict[str, list[_Followed]] = {}
        """By name, those of which something was loaded: one, unless another has gone and left its name."""
        self._troubles: dict[Path, str] = {}

    def start(self) -> None:
        """Begin to look. Once."""
        self._thread.start()

    def close(self) -> None:
        """End after the load under way, and remove the copies. What runs the registry still runs."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self._copies.close()

    def look(self) -> None:
        """Look at everything once, without a rest: for whoever does not `start`."""
        for _ in self._looked():
            pass

    def watched(self) -> list[Watched]:
        """Every folder that stands, or stood, for an adapter."""
        with self._lock:
            return [
                Watched(each.name, str(each.folder), each.version, each.problem, each.is_there)
                for each in self._followed.values()
            ]

    def troubles(self) -> dict[str, str]:
        """Watched folders that cannot be looked into now, and why."""
        with self._lock:
            return {str(folder): trouble for folder, trouble in self._troubles.items()}

    def _run(self) -> None:
        while not self._stopping.is_set():
            begun_s = time.thread_time()
            for _ in self._looked():
                spent_s = time.thread_time() - begun_s
                if spent_s >= SLICE_S:
                    self._stopping.wait(REST * spent_s)
                    begun_s = time.thread_time()
                if self._stopping.is_set():
                    return
            self._stopping.wait(self._interval_s)

    def _looked(self) -> Iterator[None]:
        """Everything once; the caller may rest at each turn."""
        self._number += 1
        for top in self.folders:
            trouble = ""
            try:
                yield from self._look_into(top)
            except FileNotFoundError:
                trouble = "is not there"
            except OSError as error:
                trouble = f"cannot be looked into: {error}"
            self._note_trouble(top, trouble)
            if trouble in ("", "is not there"):
                self._note_gone(top)
        yield from self._copies.sweep()

    def _look_into(self, top: Path) -> Iterator[None]:
        if stands_for_itself(top):
            self._follow(top, top)
            yield
            return
        with os.scandir(top) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and _is_folder(entry):
                    self._follow(top, Path(entry.path))
                yield

    def _follow(self, top: Path, folder: Path) -> None:
        """Load what the folder stands for now, if it is new. Whatever is wrong with it is its own."""
        found, trouble = None, None
        try:
            found = published_in(folder)
        except OSError as error:
            trouble = error
        if found is None and trouble is None:
            return
        followed = self._of(top, folder)
        if found is None:
            self._refuse(followed, None, trouble)
            return
        now_s = self._clock()
        if found.signature != followed.seen:
            followed.seen, followed.since_s = found.signature, now_s
        is_still = now_s - followed.since_s >= STILL_S
        is_due = followed.again_s is not None and now_s >= followed.again_s
        is_due |= followed.has_rival and self._rival_of(followed) is None
        if not is_due and not found.is_newer(followed.last):
            return
        try:
            self._take(followed, found, is_still)
        except Exception as error:  # one folder's trouble is that folder's
            if is_still:  # else it may be half written
                self._refuse(followed, found, error)

    def _of(self, top: Path, folder: Path) -> _Followed:
        """How far that folder, which is there, has been followed; another one in its place is followed anew."""
        place = os.path.realpath(folder)
        followed = self._followed.get(folder)
        if followed is None:
            followed = _Followed(top, folder, place)
            with self._lock:
                self._followed[folder] = followed
        elif not followed.is_there or place != followed.place:
            followed.place, followed.last = place, None
            if not self._copies.has_known(followed.name):  # it was unloaded
                followed.content = ""
        followed.look, followed.is_there = self._number, True
        return followed

    def _take(self, followed: _Followed, found: Published, is_still: bool) -> None:
        """Load it, if it is whole. Raises what is wrong with it."""
        self._check_name(followed)
        self._check_place(found)
        if not is_still and not _written_hash(read_adapter(found.folder)):
            return
        copy = self._copies.take(followed.name, found)
        if copy is None:
            return
        followed.copy, version = copy, None
        try:
            content = content_of(copy)
            if content != followed.content:
                version = self._load(followed.name, copy)
        finally:
            if version is None:
                self._copies.drop(followed.name, copy)
        with self._lock:
            followed.last, followed.content, followed.problem = found, content, ""
            followed.again_s, followed.wait_s = None, FIRST_AGAIN_S
            if version is not None:
                if not followed.version:
                    self._loaded.setdefault(followed.name, []).append(followed)
                followed.version = version.id
        if version is not None:
            self._copies.trim(followed.name)
            logger.info("loaded %s from %s", version.id, readable(str(found.folder)))

    def _check_name(self, followed: _Followed) -> None:
        expected = name_problem(followed.name)
        if expected:
            raise AdapterError(f"an adapter cannot be called {followed.name!a:.80}: {expected}")
        rival = self._rival_of(followed)
        followed.has_rival = rival is not None
        if rival is not None:
            raise AdapterError(f"{rival.folder} is watched under that name too; rename one of them")

    def _rival_of(self, followed: _Followed) -> _Followed | None:
        """Another folder of that name, which was loaded and is there."""
        for other in self._loaded.get(followed.name, ()):
            if other is not followed and other.is_there:
                return other
        return None

    def _check_place(self, found: Published) -> None:
        """Before its files are read. ForbiddenError, AdapterMemoryError."""
        for file, num_bytes, *_ in found.signature:
            place = (found.folder / file).resolve()
            if self._roots is not None and not any(place.is_relative_to(root) for root in self._roots):
                raise ForbiddenError(f"{place} is under none of the folders that this server may read")
            if self._max_bytes is not None and num_bytes > self._max_bytes:
                raise AdapterMemoryError(
                    f"{place} has {num_bytes:,} bytes; adapter_budget_gib allows {self._max_bytes:,}"
                )

    def _refuse(self, followed: _Followed, found: Published | None, error: Exception | None) -> None:
        """Tell it once, and leave it until it changes; what may pass by itself is tried again later."""
        message = readable(str(error) or repr(error))
        if followed.copy is not None and found is not None:
            message = message.replace(str(followed.copy), readable(str(found.folder)))
        if message != followed.problem:
            is_ours = isinstance(error, LatheError | OSError)
            logger.warning(
                "watched adapter %r, %s, is not loaded: %s",
                readable(followed.name),
                readable(str(found.folder if found else followed.folder)),
                message,
                exc_info=None if is_ours else error,
            )
        with self._lock:
            followed.problem = message
            followed.last = found or followed.last
            followed.again_s = None
            if not isinstance(error, AdapterError | ForbiddenError):
                followed.again_s = self._clock() + followed.wait_s
                followed.wait_s = min(2 * followed.wait_s, LAST_AGAIN_S)

    def _note_trouble(self, top: Path, trouble: str) -> None:
        if trouble and self._troubles.get(top) != trouble:
            logger.warning("watched folder %s %s", readable(str(top)), readable(trouble))
        with self._lock:
            self._troubles.pop(top, None)
            if trouble:
                self._troubles[top] = trouble

    def _note_gone(self, top: Path) -> None:
        """Folders that went: of what was loaded the name stays, the rest is forgotten."""
        gone = [
            each
            for each in self._followed.values()
            if each.top == top and each.is_there and each.look != self._number
        ]
        with self._lock:
            for followed in gone:
                followed.is_there = False
                if not followed.version:
                    del self._followed[followed.folder]
        loaded = [followed for followed in gone if followed.version]
        if loaded:
            logger.warning(
                "%d watched adapters are gone from %s, %s first; what was loaded stays until it is unloaded",
                len(loaded),
                readable(str(top)),
                loaded[0].name,
            )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in a circle, or where nobody may look
        return False


def content_of(folder: Path) -> str:
    """A hash of what an adapter does, not of where it came from. OSError, AdapterError as they come."""
    files = read_adapter(folder)
    tensors_hash = _written_hash(files)
    if not tensors_hash:
        with files.tensors_path.open("rb") as stream:
            tensors_hash = hashlib.file_digest(stream, "sha256").hexdigest()
    return effect_hash(tensors_hash, files.config)


def _written_hash(files: AdapterFiles) -> str:
    """The content hash in the manifest; "" where there is none."""
    return files.config.lineage.content_hash if files.config.lineage else ""
