"""A server's configuration in, its base models out: what they are called, which are loaded, who brings them.

Each base has an engine, adapters and caches of its own, which come and go with it; experiments are the server's. What
was loaded into a base while it served (adapters over HTTP, rollbacks) is there again when it comes back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from huggingface_hub import is_offline_mode

from serve import device
from serve.adapters.registry.resolver import may_find
from serve.adapters.sums.expression import parse_expression
from serve.api.folders import model_in, models_in
from serve.api.kept import KeptAdapter, keep_adapters, restore_adapters
from serve.api.outline import Outline
from serve.api.services import Services
from serve.config import ModelConfig, ServeConfig
from serve.embed.models import load_text_models
from serve.engine.limits import SHARE_OF_FREE_MEMORY
from serve.errors import ConfigError, LatheError, ModelLoadError, NotFoundError, StoppedError
from serve.experiments.served import ServedExperiments
from serve.model.loading import expected_bytes, found_here, read_config
from serve.pool.member import Terms
from serve.pool.pool import Pool
from serve.pool.rule import Bounds
from serve.runtime import Runtime, rows_of_share


@dataclass(frozen=True)
class Base:
    """A base that may be asked for."""

    name: str
    config: ServeConfig
    """As a server of it alone would be told."""
    aliases: tuple[str, ...] = ()
    is_found: bool = False
    """It was looked up in model_dirs for a request, and may be again."""


class Bases:
    """The bases of one server. Made by `start` or `around`; whoever made it closes it."""

    def __init__(self, config: ServeConfig, experiments: ServedExperiments, pool: Pool[Services]) -> None:
        self.config = config
        self.experiments = experiments
        self.pool = pool
        self.text_models = load_text_models(config.embedding_models)
        """What makes vectors of texts, by name; loaded before the bases, which share out what is left."""
        self.created = int(time.time())
        self._adding = threading.Lock()
        self._by_name: dict[str, Base] = {}
        self._aliases: dict[str, str] = {}
        self._kept: dict[str, tuple[KeptAdapter, ...]] = {}
        """By base, the adapters of those that are not loaded."""
        self._outlines: dict[str, Outline] = {}

    @classmethod
    def around(cls, runtime: Runtime) -> Bases:
        """One base that is loaded, and stays its maker's to close."""
        bases = cls(
            runtime.config,
            runtime.served_experiments,
            Pool(_none, _never, _nothing, device.give_back_all_memory),
        )
        bases._add(Base(runtime.model.name, runtime.config, runtime.config.aliases))
        bases._outlines[runtime.model.name] = Outline.of(runtime)
        bases.pool.adopt(runtime.model.name, Services(runtime))
        return bases

    @classmethod
    def start(cls, config: ServeConfig) -> Bases:
        """Load the first, and those that are to be preloaded. Raises LatheError."""
        experiments = ServedExperiments.open([each.build() for each in config.experiments], config.store)
        loader = _Loader(config, experiments)
        tidy = partial(device.give_back_all_memory, thaws=not config.has_several_models)
        pool = Pool(loader.look, loader.load, loader.stop, tidy, _bounds(config), failure=_failure_of)
        bases = loader.bases = cls(config, experiments, pool)
        for number, block in enumerate(config.blocks):
            own = config.of_model(block) if number else config.of_first_model
            bases._add(Base(own.base_name, own, own.aliases))
            pool.add(own.base_name, Terms(own.pinned, own.idle_unload_s))
        loader.check([block.base_name for block in config.models])
        pool.start()
        try:
            for block in config.blocks:
                if block.preload:
                    pool.lease(block.base_name).release()
        except BaseException as error:
            bases.close()
            if isinstance(error, ModelLoadError) and error.problem is not None:
                raise error.problem from None
            raise
        return bases

    def close(self) -> None:
        """End every base that was loaded here, then the experiments."""
        if self.pool.is_started:
            self.pool.close()
            self.experiments.close()

    # Names

    @property
    def first(self) -> Base:
        """The base of requests that name none."""
        return next(iter(self._by_name.values()))

    def all(self) -> list[Base]:
        """Every base, loaded or not, in the configuration's order."""
        return list(self._by_name.values())

    def find(self, name: str) -> Base | None:
        """The base of that name, or alias."""
        return self._by_name.get(self._aliases.get(name, name))

    def of_adapter(self, name: str) -> Base | None:
        """The base that knows an adapter, or a version `name@N`, loaded or not."""
        loaded = self.pool.loaded()
        for base in self._by_name.values():
            services = loaded.get(base.name)
            if services is not None:
                registry = services.runtime.registry
                if registry.knows(name) or registry.knows(name.partition("@")[0]):
                    return base
            elif name.partition("@")[0] in self.kept_paths(base):
                return base
        return None

    def of_model(self, model: str) -> Base | None:
        """The base that answers a request for `model`: its own name, an adapter's, or a sum's of adapters. None where
        nobody knows it (yet). RequestError for a sum that cannot be read."""
        found = self.find(model) or self.of_adapter(model)
        if found is not None:
            return found
        terms = parse_expression(model, lambda name: self.of_adapter(name) is not None)
        for term in terms or ():
            if (found := self.of_adapter(term.name)) is not None:
                return found
        return None

    def looked_up(self, model: str) -> Base | None:
        """A base of that name in model_dirs; else the first in whose adapter_dirs, or on whose adapter_hub, an
        adapter of that name may be. Blocks: it asks the disk. ForbiddenError for a name that leads out of them."""
        path = model_in(self.config.model_dirs, model) if model not in self._by_name else None
        if path is not None:
            block = ModelConfig.model_validate({"model": str(path), "name": model})
            self._add(Base(model, self.config.of_model(block), is_found=True))
            self.pool.add(model, Terms(idle_unload_s=self.config.idle_unload_s))
            return self._by_name[model]
        for base in self._by_name.values():
            if may_find(model, base.config.adapter_dirs, base.config.adapter_hub):
                return base
        return None

    def names(self) -> list[str]:
        """Every name a request may ask for, without versions and aliases."""
        loaded = self.pool.loaded()
        adapters: list[str] = []
        for base in self._by_name.values():
            services = loaded.get(base.name)
            adapters += services.runtime.registry.names() if services is not None else self.kept_paths(base)
        return [*self._by_name, *adapters, *self.experiments.runs]

    def outline(self, base: Base) -> Outline | None:
        """What is known of it without loading it. May read a file."""
        found = self._outlines.get(base.name)
        if found is None and (found := Outline.guessed(base.config)) is not None:
            self._outlines[base.name] = found
        return found

    def kept_paths(self, base: Base) -> dict[str, str]:
        """Adapters of a base that is not loaded, and where they come from."""
        kept = self._kept.get(base.name)
        if kept is None:
            return {each.name: str(each.path) for each in base.config.adapters}
        return {each.name: each.path for each in kept}

    def models_found(self) -> list[str]:
        """Names in model_dirs. Reads folders."""
        return models_in(self.config.model_dirs)

    def run(self, work: Callable[[], None]) -> None:
        """Run it on the thread of a base that is loaded, between two of its steps, the first base's if it is; here,
        where none is loaded. What it raises is raised here."""
        loaded = self.pool.loaded()
        for name in sorted(loaded, key=lambda name: name != self.first.name):
            try:
                loaded[name].runtime.worker.call(work)
            except StoppedError:  # it has left meanwhile
                continue
            return
        work()

    def runtimes(self) -> Iterator[Runtime]:
        """Of the bases that are loaded: for a look."""
        for services in self.pool.loaded().values():
            yield services.runtime

    def _add(self, base: Base) -> None:
        with self._adding:  # others go on reading the dictionary that was there
            self._by_name = {**self._by_name, base.name: base}
            self._aliases = {**self._aliases, **dict.fromkeys(base.aliases, base.name)}

    def _keep(self, name: str, adapters: tuple[KeptAdapter, ...]) -> None:
        self._kept[name] = adapters

    def _restored(self, name: str) -> tuple[KeptAdapter, ...] | None:
        return self._kept.get(name)


class _Loader:
    """Brings and ends a server's bases, on the pool's thread."""

    def __init__(self, config: ServeConfig, experiments: ServedExperiments) -> None:
        self.bases: Bases
        self._experiments = experiments
        self._share_bytes = _share_of(config)

    def look(self, name: str) -> int:
        """Bytes that it will take, by its files and by what is kept for its rows. Raises where it is not there."""
        base = self.bases.find(name)
        assert base is not None
        folder = found_here(base.config.model)
        if folder is None:
            return 0  # the hub's, and to be downloaded
        read_config(folder)
        weights = expected_bytes(folder, base.config.dtype, base.config.quantize, base.config.dequantize)
        own = base.config.memory_budget_gib
        rows = 0 if self._share_bytes is None else rows_of_share(self._share_bytes, weights)
        return weights + (rows if own is None else int(own * 2**30))

    def check(self, names: Sequence[str]) -> None:
        """ConfigError for those of `models` that can be seen not to be there, or to be no models, before anybody
        asks. What may still be downloaded is not looked for."""
        problems = []
        for number, name in enumerate(names):
            base = self.bases.find(name)
            assert base is not None
            try:
                self.look(name)
                if is_offline_mode() and found_here(base.config.model) is None:
                    raise NotFoundError(
                        f"no model {base.config.model!r}: not a folder here, nor in the hub's cache, and "
                        f"HF_HUB_OFFLINE says not to ask the hub"
                    )
            except LatheError as error:
                problems.append(f"models.{number}: {error}")
        if problems:
            raise ConfigError("\n".join(problems))

    def load(self, name: str) -> Services:
        base = self.bases.find(name)
        assert base is not None
        kept = self.bases._restored(name)
        config = base.config if kept is None else base.config.model_copy(update={"adapters": ()})
        runtime = Runtime.start(config, self._experiments, memory_bytes=self._share_bytes)
        if kept is not None:
            restore_adapters(runtime, kept)
        self.bases.pool.charge(name, runtime.num_bytes)
        self.bases._outlines[name] = Outline.of(runtime)
        return Services(runtime)

    def stop(self, services: Services) -> None:
        runtime = services.runtime
        self.bases._keep(runtime.model.name, keep_adapters(runtime))
        runtime.close(f"model {runtime.model.name!r} was unloaded to make room; ask again")
        services.close()


def _failure_of(services: Services) -> BaseException | None:
    return services.runtime.worker.failure


def _bounds(config: ServeConfig) -> Bounds:
    budget = config.models_budget_gib
    return Bounds(
        config.max_loaded_models,
        None if budget is None else int(budget * 2**30),
        config.min_resident_s,
        config.max_drain_s,
    )


def _share_of(config: ServeConfig) -> int | None:
    """Bytes of one of several models, weights and all, unless it says; None: what is free as it is loaded."""
    if config.models_budget_gib is not None:
        return int(config.models_budget_gib * 2**30 / config.max_loaded_models)
    if config.max_loaded_models == 1:
        return None
    return int(device.free_memory_bytes() * SHARE_OF_FREE_MEMORY / config.max_loaded_models)


def _none(_name: str) -> int:
    """It is there."""
    return 0


def _never(name: str) -> Services:
    raise AssertionError(f"{name} is loaded already")


def _nothing(_services: Services) -> None:
    """It is its maker's to close."""
