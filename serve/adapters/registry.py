"""Names → versions → slots. Who holds which version, and when its memory is free again. No arrays of its own.

A load makes `name@N`. New requests get the newest version at once; a version that was replaced or unloaded stays in
memory until the last request that holds it has ended. `max_adapters` counts names, so a version can always be
replaced; bytes are bounded by `max_bytes`, whoever holds them. Safe to call from any thread.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import mlx.core as mx

from serve.adapters import manifest
from serve.adapters.bank import Bank
from serve.adapters.fit import LowRank, Size, check_fit, fit
from serve.adapters.names import name_problem
from serve.adapters.paths import with_own_names
from serve.adapters.version import AdapterVersion
from serve.errors import AdapterError, AdapterMemoryError, ConfigError, LatheError, NotFoundError
from serve.model.loading import LoadedModel
from serve.model.quantization import Quantization
from serve.model.template import ChatTemplate
from serve.model.template_rules import TemplateRules, make_template
from serve.model.vocabulary import vocabulary_hash

logger = logging.getLogger(__name__)

BYTES_A_VALUE_READ = 8
"""Of an adapter that is loaded: its tensors as stored, in float32 at most, and the updates made of them."""

Run = Callable[[Callable[[], None]], None]


def run_here(function: Callable[[], None]) -> None:
    """Run on the calling thread: right where no worker thread owns the arrays."""
    function()


def do_later(_function: Callable[[], None]) -> None:
    """Leave it: the next load or unload tidies first."""


class Registry:
    """The adapters a server knows.

    run   executes a function on the thread that owns the arrays, and waits
    post  has it executed there soon, and does not wait
    max_bytes  of all adapters, and what is copied while one is loaded; a load that needs more is refused
    rules      of the base's chat template; an adapter's own template, and its variables, take their place in them
    """

    def __init__(
        self,
        model: LoadedModel,
        bank: Bank,
        *,
        max_bytes: int,
        max_adapters: int = 64,
        max_rank: int = 256,
        allow_other_base: bool = False,
        rules: TemplateRules = TemplateRules(),
    ) -> None:
        self.run: Run = run_here
        self.post: Run = do_later
        self._model = model
        self._bank = bank
        self.max_bytes = max_bytes
        self._max_adapters = max_adapters
        self._max_rank = max_rank
        self._allow_other_base = allow_other_base
        self._rules = rules
        self._loading = threading.Lock()  # one load at a time; held while files are read
        self._squared_norms: dict[str, mx.array] = {}  # of the base's rows; under _loading
        self._slots = itertools.count(1)  # under _loading
        self._lock = threading.Lock()  # guards everything below; held for dictionary work alone
        self._current: dict[str, AdapterVersion] = {}
        self._live: dict[str, AdapterVersion] = {}  # by id; current, or still held by requests
        self._pins: dict[str, int] = {}
        self._last_number: dict[str, int] = {}

    def load(self, name: str, path: str | Path, *, replace: bool = False) -> AdapterVersion:
        """Read, check and install an adapter; new requests for `name` use it from here on.

        Blocks while the files are read; running streams go on. Nothing changes when it raises:
        NotFoundError, AdapterError (unreadable, does not fit, name taken, as many names as there may be),
        AdapterMemoryError.
        """
        with self._loading:
            self._check_name(name, replace)
            folder = _folder(path)
            config = manifest.read_config(folder)
            specs = manifest.read_specs(folder / manifest.TENSORS_FILE)
            notes = self._check_lineage(name, config)
            template = self._own_template(name, config.lineage)
            sizes = check_fit(name, specs, config, self._model.network, max_rank=self._max_rank)
            self._tidy_all()
            self._check_memory(name, sizes, sum(spec.num_values for spec in specs.values()))
            content_hash, tower_hash, updates = self._read(name, folder, config)
            version = AdapterVersion(
                name,
                self._last_number.get(name, 0) + 1,
                content_hash,
                next(self._slots),
                str(folder),
                notes,
                stop_ids=config.lineage.stop_ids if config.lineage else (),
                effect_hash=manifest.effect_hash(content_hash, config),
                tower_hash=tower_hash and manifest.effect_hash(tower_hash, config),
                template=template,
            )
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
        """Between two loads: what is live is current or held, and the bank holds exactly that."""
        with self._lock:
            live = self._live.values()
            assert self._pins.keys() == self._live.keys(), "every live version has a count of its requests"
            assert all(version.id == id for id, version in self._live.items())
            for name, version in self._current.items():
                assert version.name == name, f"{version.id} is current as {name}"
                assert self._live.get(version.id) == version, f"{version.id} is not live"
                assert version.number == self._last_number[name], f"{version.id} is not the newest"
            for version in live:
                is_current = self._current.get(version.name) == version
                assert self._pins[version.id] >= (0 if is_current else 1), f"nobody holds {version.id}"
            slots = [version.slot for version in live]
            assert len({0, *slots}) == 1 + len(slots), f"two versions share a slot, or the base's: {live}"
            assert self._bank.slots == set(slots), f"the bank holds {self._bank.slots}, live are {slots}"
            assert len(self._current) <= self._max_adapters, f"more than {self._max_adapters} names"

    def _find(self, name: str) -> AdapterVersion:
        version = self._current.get(name) or self._live.get(name)
        if version is None:
            raise NotFoundError(f"no adapter {name!r} is loaded")
        return version

    def _check_name(self, name: str, replace: bool) -> None:
        expected = name_problem(name) or ("a name is not the base's" if name == self._model.name else None)
        if expected:
            raise AdapterError(f"an adapter cannot be called {name!a:.80}: {expected}")
        with self._lock:
            if name in self._current and not replace:
                raise AdapterError(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in "
                    f"place, set 'load_inplace' to True."
                )
            if name not in self._current and len(self._current) >= self._max_adapters:
                raise AdapterError(
                    f"adapter {name!r}: {self._max_adapters} adapters are loaded, which is max_adapters; unload or "
                    f"replace one, or raise max_adapters"
                )

    def _check_lineage(self, name: str, config: manifest.AdapterConfig) -> tuple[str, ...]:
        """AdapterError where the adapter was made for other weights or token ids. Returns what is to be said of the
        rest: a template matters to chats alone, and a fixed one is a fair reason for another."""
        lineage = config.lineage
        if lineage is None:
            return ()
        problems: list[str] = []
        if lineage.base_fingerprint not in ("", self._model.fingerprint):
            problems.append(
                f"was trained on other weights than these: its manifest names {lineage.base_model} "
                f"({lineage.base_fingerprint[:19]}…){_packed(lineage)}, this server runs {self._model.name} "
                f"({self._model.fingerprint[:19]}…)"
            )
        if lineage.vocabulary_hash not in ("", self._vocabulary_hash):
            problems.append(
                f"was trained with another tokenizer: the vocabulary in its manifest is "
                f"{lineage.vocabulary_hash[:19]}…, the one of {self._model.name} {self._vocabulary_hash[:19]}…"
            )
        if problems and not self._allow_other_base:
            lines = "\n  ".join([f"adapter {name!r}:", *problems] if len(problems) > 1 else [])
            raise AdapterError(
                f"{lines or f'adapter {name!r} {problems[0]}'}; start the server with allow_other_base to load it "
                f"all the same"
            )
        notes = [f"adapter {name!r} {problem}" for problem in problems]
        if not lineage.chat_template and lineage.template_hash not in ("", self._template_hash):
            notes.append(
                f"adapter {name!r} was trained with another chat template ({lineage.template_hash[:19]}…) than the "
                f"one here ({self._template_hash[:19]}…): its chats may look otherwise than those it learned from"
            )
        for note in notes:
            logger.warning("%s", note)
        return tuple(notes)

    @cached_property
    def _vocabulary_hash(self) -> str:
        return vocabulary_hash(self._model.tokenizer)

    @cached_property
    def _template_hash(self) -> str:
        return make_template(self._model.tokenizer).hash

    def _own_template(self, name: str, lineage: manifest.Lineage | None) -> ChatTemplate | None:
        """What its manifest says of chats. AdapterError for a template that is none, or was changed since."""
        if lineage is None or not (lineage.chat_template or lineage.chat_template_kwargs):
            return None
        rules = dataclasses.replace(
            self._rules,
            source=lineage.chat_template or self._rules.source,
            variables={**self._rules.variables, **lineage.chat_template_kwargs},
        )
        try:
            template = make_template(self._model.tokenizer, rules)
        except ConfigError as error:
            raise AdapterError(f"adapter {name!r}: lineage.{error}") from error
        if lineage.chat_template and template.hash != lineage.template_hash:
            raise AdapterError(
                f"adapter {name!r}: its chat template is not the one it was trained with: the text in its manifest "
                f"is {template.hash[:19]}…, template_hash {lineage.template_hash[:19]}…"
            )
        return template

    def _check_memory(self, name: str, sizes: Mapping[str, Size], num_values: int) -> None:
        """AdapterMemoryError unless the adapter fits beside the others, with all that is copied meanwhile."""
        now = self._bank.num_bytes
        read = num_values * BYTES_A_VALUE_READ
        needed = max(now + read, self._bank.peak_bytes(sizes) + read // 2)
        if needed <= self.max_bytes:
            return
        with self._lock:
            held = sum(self._current.get(version.name) != version for version in self._live.values())
            count = len(self._live)
        rank = max(size.rank for size in sizes.values())
        waiting = f", wait for the requests that still hold {held} replaced versions" if held else ""
        raise AdapterMemoryError(
            f"adapter {name!r} of rank {rank} needs {_mib(needed)} of memory for adapters while it is loaded, the "
            f"others in its layers padded to its rank; adapter_budget_gib allows {_mib(self.max_bytes)}, and "
            f"{count} versions take {_mib(now)} now. Unload one{waiting}, load one of a lower rank, or raise "
            f"adapter_budget_gib"
        )

    def _read(
        self, name: str, folder: Path, config: manifest.AdapterConfig
    ) -> tuple[str, str, dict[str, LowRank]]:
        """The tensors' hash, that of those outside the language part ("": none), and the updates made of all; the
        tensors themselves are let go."""
        tensors = manifest.read_tensors(folder, config)
        network, norms = self._model.network, self._squared_norms
        # Of what was read, not of the header looked at before: the file may have been replaced meanwhile.
        check_fit(name, manifest.specs_of(tensors), config, network, max_rank=self._max_rank)
        prefix = f"{network.text_path}." if network.text_path else ""
        own = with_own_names(tensors, network)
        outside = {path: tensor for path, tensor in own.items() if not path.startswith(prefix)}
        return (
            manifest.content_hash(tensors),
            manifest.content_hash(outside) if outside else "",
            fit(name, tensors, config, network, squared_norms=norms),
        )

    def _install(self, version: AdapterVersion, updates: Mapping[str, LowRank]) -> None:
        try:
            for part in self._bank.parts(updates):
                self.run(lambda part=part: self._bank.install(version.slot, part))  # type: ignore[misc]
        except BaseException as error:
            self._bank.leave(version.slot)
            self.post(self._tidy)
            if isinstance(error, RuntimeError | MemoryError) and not isinstance(error, LatheError):
                raise AdapterMemoryError(
                    f"adapter {version.name!r} could not be installed: {error}"
                ) from error
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
        self._bank.leave(version.slot)
        self.post(self._tidy)

    def _tidy(self) -> None:
        if self._bank.tidy():
            self.post(self._tidy)

    def _tidy_all(self) -> None:
        """As much at a time as a running stream may be held up."""
        is_more = [True]
        while is_more[0]:
            self.run(lambda: is_more.__setitem__(0, self._bank.tidy()))


def _folder(path: str | Path) -> Path:
    try:
        return Path(path).expanduser().resolve()
    except (RuntimeError, OSError, ValueError) as error:  # ~nobody, too long, a null byte
        raise NotFoundError(f"no adapter folder at {str(path)!a:.200}: {error}") from error


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _packed(lineage: manifest.Lineage) -> str:
    if lineage.quantize is None:
        return ""
    how = Quantization(**lineage.quantize)
    return f", packed to {how} as it was loaded (serve it with the same quantize)"
