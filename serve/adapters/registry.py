"""Names → versions → slots. Who holds which version, and when its slot is free again. No arrays of its own.

A load makes `name@N`. New requests get the newest version at once; a version that was replaced or unloaded keeps
its slot until the last request that holds it has ended. Safe to call from any thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx

from serve.adapters import manifest
from serve.adapters.bank import Bank
from serve.adapters.fit import LowRank, fit
from serve.adapters.version import AdapterVersion
from serve.errors import AdapterError, NotFoundError
from serve.model.loading import LoadedModel
from serve.model.quantization import Quantization

logger = logging.getLogger(__name__)

Run = Callable[[Callable[[], None]], None]


def run_here(install: Callable[[], None]) -> None:
    """Run on the calling thread: right where no worker thread owns the arrays."""
    install()


class Registry:
    """The adapters a server knows. `run` executes a function on the thread that owns the arrays."""

    def __init__(
        self,
        model: LoadedModel,
        bank: Bank,
        *,
        max_adapters: int = 64,
        max_rank: int = 256,
        allow_other_base: bool = False,
    ) -> None:
        self.run: Run = run_here
        self._model = model
        self._bank = bank
        self._max_adapters = max_adapters
        self._max_rank = max_rank
        self._allow_other_base = allow_other_base
        self._loading = threading.Lock()  # one load at a time; held while files are read
        self._squared_norms: dict[str, mx.array] = {}  # of the base's rows; under _loading
        self._lock = threading.Lock()  # guards everything below; held for dictionary work alone
        self._current: dict[str, AdapterVersion] = {}
        self._live: dict[str, AdapterVersion] = {}  # by id; current, or still held by requests
        self._pins: dict[str, int] = {}
        self._last_number: dict[str, int] = {}
        self._free_slots: list[int] = list(range(max_adapters, 0, -1))

    def load(self, name: str, path: str | Path, *, replace: bool = False) -> AdapterVersion:
        """Read, check and install an adapter; new requests for `name` use it from here on.

        Blocks while the files are read; running streams go on. Nothing changes when it raises:
        NotFoundError, AdapterError (unreadable, does not fit, name taken, no free slot).
        """
        with self._loading:
            self._check_name(name, replace)
            folder = Path(path).expanduser().resolve()
            config = manifest.read_config(folder)
            tensors = manifest.read_tensors(folder, config)
            self._check_base(name, config)
            updates = fit(
                name,
                tensors,
                config,
                self._model.network,
                max_rank=self._max_rank,
                squared_norms=self._squared_norms,
            )
            version = self._reserve(name, manifest.content_hash(tensors), folder)
            self._install(version, updates)
            return version

    def unload(self, name: str) -> None:
        """New requests for `name` are refused at once; running ones end with the version they hold."""
        with self._lock:
            if name not in self._current:
                raise NotFoundError(f"no adapter {name!r} is loaded")
            self._retire(self._current.pop(name))

    def acquire(self, name: str) -> AdapterVersion:
        """The version a new request for `name` or `name@N` uses, pinned until `release`."""
        with self._lock:
            version = self._find(name)
            self._pins[version.id] += 1
            return version

    def release(self, version: AdapterVersion) -> None:
        """The request that held `version` has ended."""
        with self._lock:
            self._pins[version.id] -= 1
            assert self._pins[version.id] >= 0, f"{version.id} released more often than acquired"
            if self._pins[version.id] == 0 and self._current.get(version.name) != version:
                self._free(version)

    def resolve(self, name: str) -> AdapterVersion:
        """The version `name` or `name@N` stands for now, without holding it."""
        with self._lock:
            return self._find(name)

    def versions(self) -> list[AdapterVersion]:
        """Every version in memory: the current one of each name, and older ones that requests still hold."""
        with self._lock:
            return list(self._live.values())

    def names(self) -> list[str]:
        """Names that new requests may ask for."""
        with self._lock:
            return list(self._current)

    def num_pins(self, version: AdapterVersion) -> int:
        """How many requests hold `version`."""
        with self._lock:
            return self._pins.get(version.id, 0)

    def check_integrity(self) -> None:
        """Every slot is either free or held by exactly one live version."""
        with self._lock:
            used = [version.slot for version in self._live.values()]
            assert len(set(used)) == len(used), f"two versions share a slot: {self._live}"
            assert sorted(used + self._free_slots) == list(range(1, self._max_adapters + 1)), (
                "a slot was lost"
            )

    def _find(self, name: str) -> AdapterVersion:
        version = self._current.get(name) or self._live.get(name)
        if version is None:
            raise NotFoundError(f"no adapter {name!r} is loaded")
        return version

    def _check_name(self, name: str, replace: bool) -> None:
        if not name or "@" in name or name == self._model.name:
            raise AdapterError(
                f"an adapter cannot be called {name!r}: names are not empty, have no '@' and are not the base's"
            )
        with self._lock:
            if name in self._current and not replace:
                raise AdapterError(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
                    f"place, set 'load_inplace' to True."
                )

    def _check_base(self, name: str, config: manifest.AdapterConfig) -> None:
        lineage = config.lineage
        if lineage is None or lineage.base_fingerprint in ("", self._model.fingerprint):
            return
        message = (
            f"adapter {name!r} was trained on other weights than these: its manifest names {lineage.base_model} "
            f"({lineage.base_fingerprint[:19]}…){_packed(lineage)}, this server runs {self._model.name} "
            f"({self._model.fingerprint[:19]}…)"
        )
        if not self._allow_other_base:
            raise AdapterError(f"{message}; start the server with allow_other_base to load it all the same")
        logger.warning("%s", message)

    def _reserve(self, name: str, content_hash: str, folder: Path) -> AdapterVersion:
        with self._lock:
            if not self._free_slots:
                raise AdapterError(
                    f"adapter {name!r}: all {self._max_adapters} slots are taken; unload one or raise max_adapters"
                )
            number = self._last_number.get(name, 0) + 1
            return AdapterVersion(name, number, content_hash, self._free_slots.pop(), str(folder))

    def _install(self, version: AdapterVersion, updates: Mapping[str, LowRank]) -> None:
        try:
            self.run(lambda: self._bank.install(version.slot, updates))
        except BaseException:
            with self._lock:
                self._free_slots.append(version.slot)
            raise
        with self._lock:
            self._last_number[version.name] = version.number
            self._live[version.id] = version
            self._pins[version.id] = 0
            previous = self._current.get(version.name)
            self._current[version.name] = version
            if previous is not None:
                self._retire(previous)

    def _retire(self, version: AdapterVersion) -> None:
        if self._pins[version.id] == 0:
            self._free(version)

    def _free(self, version: AdapterVersion) -> None:
        del self._live[version.id]
        del self._pins[version.id]
        self._free_slots.append(version.slot)


def _packed(lineage: manifest.Lineage) -> str:
    if lineage.quantize is None:
        return ""
    how = Quantization(**lineage.quantize)
    return f", packed to {how} as it was loaded (serve it with the same quantize)"
