"""A model's serving configuration in, everything that answers its requests out: engine, adapters, template.

Knows no HTTP. A process may have several, each with an engine's thread of its own; nothing here is global.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from serve.adapters.registry.copies import Copies
from serve.adapters.registry.registry import Registry
from serve.adapters.registry.resolver import Resolver
from serve.adapters.registry.watch import AdapterWatch
from serve.adapters.versions.version import AdapterVersion
from serve.config import ServeConfig
from serve.draft.make import make_drafters
from serve.engine.engine import Engine, EngineLimits
from serve.engine.gains import Gains
from serve.engine.worker import Worker
from serve.errors import AdapterError
from serve.experiments.recorder import Recorder
from serve.experiments.records import Run
from serve.experiments.served import ServedExperiments
from serve.model.generation_config import SamplingDefaults, read_defaults
from serve.model.loading import LoadedModel, load
from serve.model.template import ChatTemplate
from serve.model.template_rules import TemplateRules, make_template
from serve.model.thoughts import ThoughtRules
from serve.sight import Blind, Sight, sight_of
from serve.tools.rules import ToolRules

AHEAD: Mapping[str, bool | None] = {"auto": None, "on": True, "off": False}
"""What one_step_ahead means to the engine."""
LEAST_SHARE_OF_ROWS = 0.1
"""Of one of several models' memory, whatever its weights take."""


def rows_of_share(num_bytes: int, weight_bytes: int) -> int:
    """Of what one of several models may take, the part that its rows, caches and adapters have."""
    return max(num_bytes - weight_bytes, int(num_bytes * LEAST_SHARE_OF_ROWS))


@dataclass(frozen=True)
class Runtime:
    """What a server runs on. Owned by whoever started it, who closes it."""

    config: ServeConfig
    model: LoadedModel
    engine: Engine
    worker: Worker
    template: ChatTemplate
    """The base's."""
    sight: Sight | Blind
    """How what requests show is looked at."""
    served_experiments: ServedExperiments
    resolver: Resolver
    """Where names that nobody loaded are looked up."""
    sampling_defaults: SamplingDefaults
    """Of requests that say nothing."""
    thoughts: ThoughtRules
    """By which marks thoughts are told from answers."""
    weight_bytes: int
    """Of the base alone."""
    tools: ToolRules
    """By which marks calls of tools are told from answers."""
    watch: AdapterWatch | None = None
    """None where no folder is watched."""
    owns_experiments: bool = True
    """They end with it; else they are those of several models."""

    @property
    def experiments(self) -> Mapping[str, Run]:
        """By public name."""
        return self.served_experiments.runs

    @property
    def recorder(self) -> Recorder | None:
        """None without experiments."""
        return self.served_experiments.recorder

    @property
    def registry(self) -> Registry:
        """The adapters there are."""
        return self.engine.registry

    def template_of(self, version: AdapterVersion | None) -> ChatTemplate:
        """The chat template that an adapter version answers under, or the base (None)."""
        return version.template if version is not None and version.template is not None else self.template

    def prefix_bytes(self, version: AdapterVersion | None) -> int:
        """Memory that holds keys and values of prefixes under an adapter, or the base (None). Blocks until a step has
        ended."""
        found: list[int] = []
        self.worker.call(lambda: found.append(self.engine.prefix_bytes(version)))
        return found[0]

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.engine.max_context

    @classmethod
    def start(
        cls,
        config: ServeConfig,
        experiments: ServedExperiments | None = None,
        memory_bytes: int | None = None,
    ) -> Runtime:
        """Load the model and the adapters, open the store, start the engine's thread. Raises LatheError.

        experiments   those of a server of several models; None: the configuration's
        memory_bytes  of weights, rows and caches together, where the configuration names no memory_budget_gib
        """
        config.watch_roots  # noqa: B018 - before anything is loaded
        model = load(
            config.model,
            name=config.base_name,
            dequantize=config.dequantize,
            dtype=config.dtype,
            quantize=config.quantize,
        )
        if memory_bytes is not None and config.memory_budget_gib is None:
            left = rows_of_share(memory_bytes, model.network.num_bytes)
            config = config.model_copy(update={"memory_budget_gib": left / 2**30})
        return cls.around(model, config, experiments=experiments)

    @classmethod
    def around(
        cls,
        model: LoadedModel,
        config: ServeConfig,
        gains: Gains | None = None,
        experiments: ServedExperiments | None = None,
    ) -> Runtime:
        """As `start`, on a model that is loaded already and named config.base_name. `gains`: as Engine has it."""
        defaults = SamplingDefaults(**config.default_sampling.model_dump())
        if config.generation_config == "auto":
            defaults = defaults.over(read_defaults(model.path))
        rules = TemplateRules(config.special_tokens_in_messages)
        limits = _limits(config)
        weight_bytes = model.network.num_bytes  # before adapters are beside them
        drafters = make_drafters(config.drafter, model, limits)
        with ExitStack() as stack:
            engine = Engine(model, limits, rules, drafters.by_name, drafters.default, gains)
            stack.callback(engine.close)
            engine.bank.measure()
            template = make_template(model.tokenizer, rules)
            thoughts = ThoughtRules(
                model.tokenizer,
                config.reasoning_parser,
                config.thinking_start_token,
                config.thinking_end_token,
            )
            thoughts.check(template, config.thinking_budget)
            tools = ToolRules(model.tokenizer, config.tool_call_parser)
            tools.of(template, has_channels=False)  # what it needs is imported here
            sight = sight_of(model, config)
            for adapter in config.adapters:
                engine.registry.load(adapter.name, adapter.path)
            owns_experiments = experiments is None
            if experiments is None:
                experiments = ServedExperiments.open(
                    [each.build() for each in config.experiments], config.store
                )
                stack.callback(experiments.close)
            watch = _watch_of(config, engine.registry, experiments.runs)
            worker = Worker(engine)
            worker.start()
            stack.callback(worker.stop)
            if watch is not None:
                watch.start()
            stack.pop_all()
        resolver = Resolver(engine.registry, config.adapter_dirs, config.adapter_hub)
        return cls(
            config,
            model,
            engine,
            worker,
            template,
            sight,
            experiments,
            resolver,
            defaults,
            thoughts,
            weight_bytes,
            tools,
            watch,
            owns_experiments,
        )

    @property
    def num_bytes(self) -> int:
        """Of the weights, and of what rows, caches and adapters may take beside them."""
        return self.weight_bytes + self.engine.memory.total

    @property
    def used_bytes(self) -> int:
        """Of the weights, and of what rows, caches and adapters take beside them now."""
        return self.weight_bytes + self.engine.stats().memory.used_bytes

    def close(self, reason: str = "the server is shutting down") -> None:
        """Stop the engine's thread, whose open requests end with an error that says why, and finish writing."""
        if self.watch is not None:
            self.watch.close()
        self.worker.stop(reason)
        self.engine.close()
        if self.owns_experiments:
            self.served_experiments.close()


def _watch_of(config: ServeConfig, registry: Registry, experiments: Mapping[str, Run]) -> AdapterWatch | None:
    """What follows the watched folders, to be started once the engine's thread runs."""
    if not config.adapter_watch:
        return None

    def load(name: str, path: Path) -> AdapterVersion:
        if name in experiments:
            raise AdapterError(f"{name!r} is the public name of an experiment; call the folder otherwise")
        return registry.load(name, path, replace=True)

    def is_known(name: str, path: Path) -> bool:
        shown, place = registry.find(name), str(path)
        is_of_name = shown is not None and any(each.version.path == place for each in shown.versions)
        return is_of_name or any(each.path == place for each in registry.versions())

    return AdapterWatch(
        config.adapter_watch,
        load,
        Copies(is_known),
        roots=config.watch_roots,
        interval_s=config.adapter_watch_interval_s,
        max_bytes=registry.max_bytes,
    )


def _limits(config: ServeConfig) -> EngineLimits:
    return EngineLimits(
        max_rows=config.max_rows,
        max_waiting=config.max_waiting,
        max_tenant_requests=config.max_tenant_requests,
        shares={"" if name == config.base_name else name: share for name, share in config.shares.items()},
        tenant_shares=config.tenant_shares,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        row_chunk_tokens=config.row_chunk_tokens,
        max_gap_ms=config.max_gap_ms,
        max_context=config.max_context,
        memory_budget_bytes=_bytes(config.memory_budget_gib),
        kv_budget_bytes=_bytes(config.kv_budget_gib),
        adapter_budget_bytes=_bytes(config.adapter_budget_gib),
        adapter_host_bytes=_bytes(config.adapter_host_gib),
        adapter_file_bytes=int(config.adapter_file_gib * 2**30),
        prefix_cache_bytes=_bytes(config.prefix_cache_gib),
        prefix_cache_dir=config.prefix_cache_dir,
        prefix_cache_disk_bytes=_bytes(config.prefix_cache_disk_gib),
        encode_patches=config.encode_patches,
        feature_cache_bytes=_bytes(config.feature_cache_gib),
        feature_cache_dir=config.feature_cache_dir,
        feature_cache_disk_bytes=_bytes(config.feature_cache_disk_gib),
        precision=config.kv_precision,
        ahead=AHEAD[config.one_step_ahead],
        max_adapters=config.max_adapters,
        adapter_versions=config.adapter_versions,
        max_rank=config.max_rank,
        allow_other_base=config.allow_other_base,
    )


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * 2**30)
