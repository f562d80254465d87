"""What /metrics shows: the engine's own counters, read at each scrape, and per-request counts and latencies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.adapters.versions.version import COMBINED
from serve.api.bases import Bases
from serve.api.services import Services
from serve.api.vllm_metrics import GapCollector, VllmCollector
from serve.cache.stats import FeatureStats, PrefixStats
from serve.constraints.compiler import GrammarStats
from serve.engine.drafts import DraftStats
from serve.engine.request import MemoryUse
from serve.pool.member import State
from serve.runtime import Runtime

TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TPOT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


VLLM_DRAFTS = tuple(f"vllm:spec_decode_num_{name}" for name in ("drafts", "draft_tokens", "accepted_tokens"))
OTHER = "other"
"""Label of the models that are too many to be told apart."""
MAX_GONE = 16
"""Names of unloaded adapters whose last counts wait for a scrape."""


class Metrics:
    """One app's metrics, in a registry of its own. `model` labels are names without versions.

    What was counted for a name that is no longer served is shown once more and then removed, so that the labels are
    as many as the adapters in memory, whatever comes and goes, and `metrics_max_models` at most.
    """

    def __init__(self, bases: Bases) -> None:
        self._bases = bases
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollectors(bases))
        self.requests = Counter(
            "lathe_requests",
            "Generations by how they ended.",
            ["endpoint", "model", "finish"],
            registry=self.registry,
        )
        self.errors = Counter(
            "lathe_http_errors", "Requests refused or failed.", ["status"], registry=self.registry
        )
        self._drafted = tuple(
            Counter(f"lathe_spec_decode_num_{name}", meaning, ["model"], registry=self.registry)
            for name, meaning in (
                ("drafts", "Times that a row's next tokens were guessed and checked."),
                ("draft_tokens", "Guesses that were checked."),
                ("accepted_tokens", "Guesses that were right, and no wrong one before them."),
            )
        )
        self._counted: Mapping[str, DraftStats] = {}  # by label
        self.prompt_tokens = Counter(
            "lathe_request_prompt_tokens",
            "Tokens of prompts, cached ones too.",
            ["model"],
            registry=self.registry,
        )
        self.answer_tokens = Counter(
            "lathe_request_answer_tokens", "Tokens of answers.", ["model"], registry=self.registry
        )
        self.gaps = GapCollector()
        self.registry.register(self.gaps)
        self._told_apart: set[str] = set()
        self.ttft_s = self._histogram("lathe_ttft_seconds", "Time to the first token.", TTFT_BUCKETS_S)
        self.tpot_s = self._histogram("lathe_tpot_seconds", "Time per token after the first.", TPOT_BUCKETS_S)
        self.e2e_s = self._histogram("lathe_request_seconds", "Time to the last token.", E2E_BUCKETS_S)
        drafts = zip(VLLM_DRAFTS, self._drafted, strict=True)
        in_vllms_names: dict[str, Counter | Histogram] = {
            "vllm:time_to_first_token_seconds": self.ttft_s,
            "vllm:request_time_per_output_token_seconds": self.tpot_s,
            "vllm:e2e_request_latency_seconds": self.e2e_s,
            "vllm:prompt_tokens": self.prompt_tokens,
            "vllm:generation_tokens": self.answer_tokens,
            **dict(drafts),
        }
        self.registry.register(VllmCollector(bases, in_vllms_names, self.requests))

    def show(self) -> bytes:
        """Everything in Prometheus' text format. What it showed of names that are gone is removed."""
        self._count_drafts()
        gone = self._gone()
        text = generate_latest(self.registry)
        self._remove(gone)
        return text

    def unloaded(self) -> None:
        """Some adapter has left: where nobody scrapes, the counts of those that are gone are not kept for ever."""
        gone = self._gone()
        if len(gone) > MAX_GONE:
            self._remove(gone)

    @property
    def _by_model(self) -> tuple[Counter | Histogram, ...]:
        timed = self.ttft_s, self.tpot_s, self.e2e_s
        return self.requests, *timed, self.prompt_tokens, self.answer_tokens, *self._drafted

    def label(self, model: str) -> str:
        """Under which a model's counts are shown."""
        if model in self._told_apart or self._bases.find(model) is not None:
            return model
        if len(self._told_apart) >= self._bases.config.metrics_max_models:
            return OTHER
        self._told_apart.add(model)
        return model

    def _count_drafts(self) -> None:
        """What the engine has counted since it was last asked, under the labels of everything else."""
        found = {
            name or runtime.model.name: stats
            for runtime in self._bases.runtimes()
            for name, stats in runtime.worker.stats().drafts.items()
        }
        for label, now in found.items():
            before = self._counted.get(label, DraftStats())
            # Nobody had asked for it in long, or its base had left, and it was counted anew.
            if now.num_drafts < before.num_drafts:
                before = DraftStats()
            if now != before:
                for counter, new, old in zip(self._drafted, astuple(now), astuple(before), strict=True):
                    counter.labels(self.label(label)).inc(new - old)
        self._counted = found

    def _gone(self) -> set[str]:
        """Names that were counted, and that neither new requests nor running ones use."""
        versions = {
            version.name for runtime in self._bases.runtimes() for version in runtime.registry.versions()
        }
        served = {COMBINED, OTHER, *self._bases.names(), *versions}
        return {
            sample.labels["model"]
            for metric in self._by_model
            for family in metric.collect()
            for sample in family.samples
        } - served

    def _remove(self, models: set[str]) -> None:
        for metric in self._by_model:
            for model in models:
                metric.remove_by_labels({"model": model})
        for model in models:
            self.gaps.by_model.pop(model, None)
        self._told_apart -= models

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, meaning, ["model"], buckets=buckets, registry=self.registry)


class _EngineCollectors(Collector):
    """Reads the engines of the bases that are loaded when asked, so nothing is counted twice. Where a server has
    several bases, `base` says whose each number is."""

    def __init__(self, bases: Bases) -> None:
        self._bases = bases

    def collect(self) -> Iterable[Metric]:
        loaded = self._bases.pool.loaded()
        found = {name: _EngineCollector(services) for name, services in loaded.items()}
        if len(self._bases.all()) == 1:
            for collector in found.values():
                yield from collector.collect()
            return
        yield from _together(found)
        yield from _models(self._bases)


def _together(collectors: Mapping[str, _EngineCollector]) -> Iterable[Metric]:
    """Each family once, with every base's samples."""
    families: dict[str, Metric] = {}
    for base, collector in collectors.items():
        for family in collector.collect():
            merged = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type, family.unit)
            )
            for sample in family.samples:
                merged.add_sample(sample.name, {**sample.labels, "base": base}, sample.value)
    return families.values()


def _models(bases: Bases) -> Iterator[Metric]:
    """What is loaded, and how often it was."""
    standings = bases.pool.standings()
    state = GaugeMetricFamily(
        "lathe_model_state", "1 for the state that a base is in.", labels=["base", "state"]
    )
    leases = GaugeMetricFamily("lathe_model_in_use", "Requests that hold a base.", labels=["base"])
    waiters = GaugeMetricFamily("lathe_model_awaited", "Requests that wait for a base.", labels=["base"])
    loads = CounterMetricFamily("lathe_model_loads", "Times that a base was loaded.", labels=["base"])
    failed = CounterMetricFamily("lathe_model_load_failures", "Times that it could not be.", labels=["base"])
    load_s = CounterMetricFamily("lathe_model_load_seconds", "Time that its loads took.", labels=["base"])
    for each in standings:
        for name in get_args(State):
            state.add_metric([each.name, name], float(each.state == name))
        leases.add_metric([each.name], each.num_leases)
        waiters.add_metric([each.name], each.num_waiters)
        loads.add_metric([each.name], each.num_loads)
        failed.add_metric([each.name], each.num_failed)
        load_s.add_metric([each.name], each.load_s)
    return iter((state, leases, waiters, loads, failed, load_s))


class _EngineCollector(Collector):
    """Of one base."""

    def __init__(self, services: Services) -> None:
        self._runtime = services.runtime
        self._grammars = services.grammars.stats

    def collect(self) -> Iterable[Metric]:
        stats = self._runtime.worker.stats()
        rows = GaugeMetricFamily("lathe_rows", "Requests in the engine.", labels=["state"])
        rows.add_metric(["decoding"], stats.num_decoding)
        rows.add_metric(["prefilling"], stats.num_prefilling)
        rows.add_metric(["waiting"], stats.num_waiting)
        yield rows
        yield from _memory(stats.memory)
        yield from _prefixes(stats.prefixes)
        yield from _features(stats.features)
        yield from _adapters(self._runtime)
        yield from _of_grammars(self._grammars())
        is_up = float(self._runtime.worker.failure is None)
        yield GaugeMetricFamily("lathe_engine_up", "0 once a step has failed.", is_up)
        yield CounterMetricFamily("lathe_steps", "Engine steps.", stats.num_steps)
        yield CounterMetricFamily("lathe_prompt_tokens", "Prompt tokens computed.", stats.num_prompt_tokens)
        yield CounterMetricFamily("lathe_generated_tokens", "Tokens generated.", stats.num_generated_tokens)
        yield CounterMetricFamily(
            "lathe_preempted", "Rows taken back into the queue, to be computed again.", stats.num_preempted
        )
        finished = CounterMetricFamily("lathe_finished", "Ended rows by reason.", labels=["finish"])
        for reason, count in stats.num_finished.items():
            finished.add_metric([reason], count)
        yield finished
        recorder = self._runtime.recorder
        lost = recorder.num_failed_writes if recorder else 0
        yield CounterMetricFamily("lathe_exposures_lost", "Exposures the store did not take.", lost)


def _adapters(runtime: Runtime) -> Iterator[Metric]:
    """Versions and slots; what was found on the device and what had to be brought there."""
    registry = runtime.registry
    stats = registry.residency.stats()
    for name, what, value in (
        ("lathe_adapter_names", "Adapters that requests may ask for by name.", len(registry.names())),
        ("lathe_adapter_versions", "Adapter versions that answer requests.", len(registry.versions())),
        ("lathe_adapter_slots", "Adapter versions that the device may hold at once.", stats.num_slots),
        ("lathe_adapter_resident", "Adapter versions on the device, or on their way.", stats.num_seated),
        (
            "lathe_adapter_awaited",
            "Adapter versions that requests wait for, and no slot is free.",
            stats.num_wanted,
        ),
        ("lathe_adapter_file_bytes", "Bytes of files of adapters that are nowhere else.", stats.file_bytes),
    ):
        yield GaugeMetricFamily(name, what, value)
    for name, what, value in (
        ("lathe_adapter_hits", "Rows that found their adapter on the device.", stats.num_hits),
        ("lathe_adapter_misses", "Rows that waited for their adapter.", stats.num_misses),
        ("lathe_adapter_loads", "Times that an adapter was brought to the device.", stats.num_loads),
        ("lathe_adapter_evicted", "Adapters that left the device for others.", stats.num_evicted),
        (
            "lathe_adapter_failed",
            "Times that an adapter could not be brought to the device.",
            stats.num_failed,
        ),
    ):
        yield CounterMetricFamily(name, what, value)


def _of_grammars(grammars: GrammarStats) -> Iterator[Metric]:
    """What answers must be: compiled once, and found again."""
    for name, what, value in (
        ("lathe_grammar_queries", "Requests whose answers keep to a grammar.", grammars.num_queries),
        ("lathe_grammar_hits", "Requests that found theirs compiled.", grammars.num_hits),
        ("lathe_grammar_compiled", "Grammars compiled.", grammars.num_compiled),
        ("lathe_grammar_refused", "Grammars that cannot be kept to.", grammars.num_refused),
        ("lathe_grammar_compile_seconds", "Time that both took, beside the engine.", grammars.compile_s),
    ):
        yield CounterMetricFamily(name, what, value)
    yield GaugeMetricFamily("lathe_grammars", "Compiled grammars kept.", grammars.num_kept)


def _memory(memory: MemoryUse) -> Iterator[Metric]:
    for name, meaning, num_bytes in (
        ("lathe_kv_bytes", "Memory of keys, values and recurrent state of rows.", memory.kv_bytes),
        ("lathe_prefix_bytes", "Memory of prefixes.", memory.prefix_bytes),
        ("lathe_feature_bytes", "Memory of encoded pictures.", memory.feature_bytes),
        ("lathe_adapter_bytes", "Memory of adapters on the device.", memory.adapter_bytes),
        ("lathe_adapter_host_bytes", "Memory of adapters in host memory.", memory.adapter_host_bytes),
        ("lathe_drafter_bytes", "Memory of drafters beside the rows.", memory.drafter_bytes),
        ("lathe_memory_budget_bytes", "What these may be together.", memory.budget_bytes),
    ):
        yield GaugeMetricFamily(name, meaning, num_bytes)


def _prefixes(prefixes: PrefixStats) -> Iterator[Metric]:
    for name, meaning, count in (
        ("lathe_prefix_queries", "Requests that looked for a prefix.", prefixes.num_queries),
        ("lathe_prefix_hits", "Requests that found one.", prefixes.num_hits),
        ("lathe_prefix_query_tokens", "Tokens that they could have found.", prefixes.num_query_tokens),
    ):
        yield CounterMetricFamily(name, meaning, count)
    from_disk = prefixes.num_disk_hit_tokens
    found = CounterMetricFamily("lathe_prefix_hit_tokens", "Tokens found, and not computed.", labels=["tier"])
    found.add_metric(["memory"], prefixes.num_hit_tokens - from_disk)
    found.add_metric(["disk"], from_disk)
    yield found
    evicted = CounterMetricFamily(
        "lathe_prefix_evicted", "Pieces of prefixes that left for others.", labels=["tier"]
    )
    evicted.add_metric(["memory"], prefixes.num_evicted)
    evicted.add_metric(["disk"], prefixes.num_disk_evicted)
    yield evicted
    yield GaugeMetricFamily(
        "lathe_prefix_segments", "Pieces of prefixes, in either tier.", prefixes.num_segments
    )
    yield GaugeMetricFamily("lathe_prefix_disk_bytes", "Prefixes on disk.", prefixes.disk_bytes)
    yield CounterMetricFamily(
        "lathe_prefix_disk_dropped", "Pieces that the disk had no time for.", prefixes.num_disk_dropped
    )
    yield CounterMetricFamily(
        "lathe_prefix_disk_errors", "Files not written, not read, or not whole.", prefixes.num_disk_errors
    )


def _features(features: FeatureStats) -> Iterator[Metric]:
    """Of pictures and frames; none of a model that reads text alone."""
    for name, what, value in (
        ("lathe_feature_queries", "Pictures whose tokens were to be computed.", features.num_queries),
        ("lathe_feature_encoded", "Times that a picture went through the tower.", features.num_encoded),
        ("lathe_feature_disk_dropped", "Pictures that the disk had no time for.", features.num_disk_dropped),
        ("lathe_feature_disk_errors", "Files not written, not read, or not whole.", features.num_disk_errors),
    ):
        yield CounterMetricFamily(name, what, value)
    found = CounterMetricFamily("lathe_feature_hits", "Pictures found, and not encoded.", labels=["tier"])
    found.add_metric(["memory"], features.num_hits - features.num_disk_hits)
    found.add_metric(["disk"], features.num_disk_hits)
    yield found
    evicted = CounterMetricFamily("lathe_feature_evicted", "Pictures that left for others.", labels=["tier"])
    evicted.add_metric(["memory"], features.num_evicted)
    evicted.add_metric(["disk"], features.num_disk_evicted)
    yield evicted
    yield GaugeMetricFamily("lathe_features", "Encoded pictures kept, in either tier.", features.num_kept)
    yield GaugeMetricFamily("lathe_feature_disk_bytes", "Encoded pictures on disk.", features.disk_bytes)
