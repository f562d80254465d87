"""Metrics in vLLM's names, where they mean the same: dashboards and autoscalers that know vLLM read them here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.api.bases import Bases
from serve.engine.request import EngineStats
from serve.runtime import Runtime

MODEL = "model_name"
"""vLLM's label; ours is `model`."""
GAP_BUCKETS_S = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
GAP_NAMES = {
    "lathe_inter_token_seconds": "model",
    "vllm:inter_token_latency_seconds": MODEL,
    "vllm:time_per_output_token_seconds": MODEL,
}
"""Ours, vLLM's, and vLLM's name of it until 2025; each with its label."""


Reading = Callable[[EngineStats, Runtime], float]
GAUGES: tuple[tuple[str, str, Reading], ...] = (
    (
        "num_requests_running",
        "Requests that have a row.",
        lambda stats, _: stats.num_decoding + stats.num_prefilling,
    ),
    ("num_requests_waiting", "Requests that wait for one.", lambda stats, _: stats.num_waiting),
    (
        "kv_cache_usage_perc",
        "Rows' memory in use; 1 is all.",
        lambda stats, runtime: stats.kv_bytes / max(runtime.engine.scheduler.budget.max_bytes, 1),
    ),
)
COUNTERS: tuple[tuple[str, str, Reading], ...] = (
    ("num_preemptions", "Rows taken back into the queue.", lambda stats, _: stats.num_preempted),
    ("prefix_cache_queries", "Tokens looked for.", lambda stats, _: stats.prefixes.num_query_tokens),
    ("prefix_cache_hits", "Of them those found.", lambda stats, _: stats.prefixes.num_hit_tokens),
)
"""Of each base, under its name."""


class Gaps:
    """Times between two tokens of one request's rows, in buckets: kept beside the request, added up when it ends."""

    def __init__(self) -> None:
        self.counts = [0] * (len(GAP_BUCKETS_S) + 1)
        self.sum_s = 0.0

    def add(self, gap_s: float, num_tokens: int) -> None:
        """So many tokens that came together, so long after the one before."""
        self.counts[bisect_left(GAP_BUCKETS_S, gap_s / num_tokens)] += num_tokens
        self.sum_s += gap_s

    def join(self, other: Gaps) -> None:
        """Those of another too."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum_s += other.sum_s

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: how many were no longer."""
        bounds, found, total = [*map(str, GAP_BUCKETS_S), "+Inf"], [], 0
        for bound, count in zip(bounds, self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class GapCollector(Collector):
    """Inter-token gaps by model."""

    def __init__(self) -> None:
        self.by_model: dict[str, Gaps] = {}

    def add(self, model: str, gaps: Gaps) -> None:
        """Those of a request that has ended."""
        self.by_model.setdefault(model, Gaps()).join(gaps)

    def collect(self) -> Iterable[Metric]:
        for name, label in GAP_NAMES.items():
            family = HistogramMetricFamily(name, "Time between two tokens of an answer.", labels=[label])
            for model, gaps in self.by_model.items():
                family.add_metric([model], gaps.buckets, gaps.sum_s)
            yield family


class VllmCollector(Collector):
    """What the engine and our own metrics know, said again in vLLM's words."""

    def __init__(self, bases: Bases, ours: Mapping[str, Counter | Histogram], requests: Counter) -> None:
        """ours: by vLLM's name, each labelled by `model`; requests: by endpoint, model and finish."""
        self._bases = bases
        self._ours = ours
        self._requests = requests

    def collect(self) -> Iterable[Metric]:
        runtimes = list(self._bases.runtimes())
        for metric, meaning, value_of in GAUGES:
            gauge = GaugeMetricFamily(f"vllm:{metric}", meaning, labels=[MODEL])
            for runtime in runtimes:
                gauge.add_metric([runtime.model.name], value_of(runtime.worker.stats(), runtime))
            yield gauge
        for metric, meaning, value_of in COUNTERS:
            counter = CounterMetricFamily(f"vllm:{metric}", meaning, labels=[MODEL])
            for runtime in runtimes:
                counter.add_metric([runtime.model.name], value_of(runtime.worker.stats(), runtime))
            yield counter
        for renamed, of_ours in self._ours.items():
            yield from _renamed(renamed, of_ours)
        yield self._successes()

    def _successes(self) -> Metric:
        """By why they ended; a refusal or an error is none."""
        counts: dict[tuple[str, str], float] = {}
        for family in self._requests.collect():
            for sample in family.samples:
                if sample.name.endswith("_total") and sample.labels["finish"] in ("stop", "length"):
                    key = sample.labels["model"], sample.labels["finish"]
                    counts[key] = counts.get(key, 0.0) + sample.value
        made = CounterMetricFamily(
            "vllm:request_success", "Ended requests.", labels=[MODEL, "finished_reason"]
        )
        for (model, finish), count in counts.items():
            made.add_metric([model, finish], count)
        return made


def _renamed(name: str, metric: Counter | Histogram) -> Iterator[Metric]:
    """A metric's samples under another name and vLLM's label."""
    for family in metric.collect():
        made = Metric(name, family.documentation, family.type)
        made.samples = [
            sample._replace(name=name + sample.name[len(family.name) :], labels=_relabelled(sample.labels))
            for sample in family.samples
        ]
        yield made


def _relabelled(labels: Mapping[str, str]) -> dict[str, str]:
    return {MODEL if name == "model" else name: value for name, value in labels.items()}
