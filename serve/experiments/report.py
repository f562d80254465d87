"""Evidence so far: per variant counts, rates and latency, and an anytime-valid comparison with the first variant.

The unit of analysis is the unit of assignment (`user`): outcomes are averaged within a unit and units are compared,
so one busy user counts once. Looking early and often is allowed; the guarantee is exact when each unit's mean is
final once it is read (one outcome a unit, or all of them), and approximate while means still move.
Works on a store alone, with no server running.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from serve.errors import DataError, NotFoundError, RequestError
from serve.experiments.assignment import Experiment, Variant
from serve.experiments.statistics import (
    Interval,
    Verdict,
    confidence_sequence,
    difference,
    sample_ratio_p_value,
    verdict,
)
from serve.experiments.store import Row, Store

SAMPLE_RATIO_ALPHA = 0.001
"""Below this p-value the split of units is called broken, and nothing else in the report can be trusted."""


@dataclass(frozen=True)
class Latency:
    """Seconds over the exposures that have them; None where none has."""

    p50_s: float | None
    p95_s: float | None
    ttft_p50_s: float | None
    ttft_p95_s: float | None


@dataclass(frozen=True)
class VariantReport:
    """One arm. `mean` and `interval` are of the units' mean outcomes."""

    name: str
    model: str
    share: float
    num_exposures: int
    num_units: int
    num_outcomes: int
    num_units_with_outcome: int
    outcome_rate: float | None
    """Outcomes per exposure: if the arms differ here, missing feedback may explain a difference in means."""
    mean: float | None
    interval: Interval
    latency: Latency
    finishes: Mapping[str, int]
    versions: Mapping[str, int]
    """Exposures by adapter version and content hash."""


@dataclass(frozen=True)
class Comparison:
    """treatment - control, over the units' mean outcomes."""

    control: str
    treatment: str
    difference: float | None
    interval: Interval
    verdict: Verdict


@dataclass(frozen=True)
class ExperimentReport:
    """What `lathe ab report` prints."""

    experiment: str
    run_id: int
    started_at: str
    outcome: str | None
    alpha: float
    variants: tuple[VariantReport, ...]
    comparisons: tuple[Comparison, ...]
    sample_ratio_p_value: float | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for json.dumps."""
        return asdict(self)


def report(
    store: Store, experiment_name: str, outcome: str | None = None, alpha: float = 0.05
) -> ExperimentReport:
    """Report on the newest run of an experiment.

    outcome  which feedback to compare on; may be left out while there is at most one
    alpha    chance that any interval here is ever wrong, over all looks; shared equally by the arms
    Raises NotFoundError (no such experiment or outcome), RequestError (several outcomes, none chosen),
    DataError (values outside [0, 1]).
    """
    if not 0 < alpha < 1:
        raise RequestError(f"alpha: found {alpha}; expected a number between 0 and 1", param="alpha")
    run = store.newest_run(experiment_name)
    rows = store.rows(run.id)
    chosen = _choose_outcome(rows, outcome)
    variants = tuple(_variant(run.experiment, v, rows, chosen, alpha) for v in run.experiment.variants)
    p_value = sample_ratio_p_value([v.num_units for v in variants], [v.share for v in variants])
    return ExperimentReport(
        experiment=experiment_name,
        run_id=run.id,
        started_at=datetime.fromtimestamp(run.started_at, UTC).isoformat(timespec="seconds"),
        outcome=chosen,
        alpha=alpha,
        variants=variants,
        comparisons=tuple(_compare(variants[0], other) for other in variants[1:]),
        sample_ratio_p_value=p_value,
        warnings=tuple(_warnings(variants, p_value)),
    )


def render(found: ExperimentReport) -> Group:
    """The report for a rich console."""
    title = f"{found.experiment}, run {found.run_id}, since {found.started_at}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("variant", overflow="fold", min_width=12)
    mean = f"{found.outcome or 'outcome'}\n{1 - found.alpha:.0%} interval"
    for name in ("expo-\nsures", "users", "out-\ncomes", mean, "latency ms\np50 / p95", "TTFT ms\np50 / p95"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in found.variants:
        latency = arm.latency
        table.add_row(
            arm.name,
            str(arm.num_exposures),
            str(arm.num_units),
            str(arm.num_outcomes),
            f"{'-' if arm.mean is None else format(arm.mean, '.3f')}\n"
            f"{arm.interval.low:.3f} to {arm.interval.high:.3f}",
            _pair(latency.p50_s, latency.p95_s),
            _pair(latency.ttft_p50_s, latency.ttft_p95_s),
        )
    lines = [Text(_sentence(comparison)) for comparison in found.comparisons]
    lines += [Text(f"Warning: {warning}", style="yellow") for warning in found.warnings]
    return Group(table, *lines)


def _choose_outcome(rows: Sequence[Row], outcome: str | None) -> str | None:
    names = sorted({name for row in rows for name in row.outcomes})
    if outcome is None and len(names) > 1:
        raise RequestError(f"outcome: this experiment has {', '.join(names)}; choose one", param="outcome")
    if outcome is not None and outcome not in names:
        raise NotFoundError(f"outcome {outcome!r} has no feedback yet; found: {', '.join(names) or 'none'}")
    chosen = outcome or (names[0] if names else None)
    for row in rows:
        value = row.outcomes.get(chosen or "", 0.0)
        if not 0 <= value <= 1:
            raise DataError(f"outcome {chosen!r} of {row.completion_id} is {value}; expected 0 … 1")
    return chosen


def _variant(
    experiment: Experiment, variant: Variant, rows: Sequence[Row], outcome: str | None, alpha: float
) -> VariantReport:
    mine = [row for row in rows if row.variant == variant.name]
    by_unit: dict[str, list[float]] = {}
    for row in mine:
        if outcome is not None and outcome in row.outcomes:
            by_unit.setdefault(row.unit, []).append(row.outcomes[outcome])
    means = [sum(values) / len(values) for values in by_unit.values()]
    num_outcomes = sum(map(len, by_unit.values()))
    return VariantReport(
        name=variant.name,
        model=variant.model,
        share=experiment.share(variant),
        num_exposures=len(mine),
        num_units=len({row.unit for row in mine}),
        num_outcomes=num_outcomes,
        num_units_with_outcome=len(means),
        outcome_rate=num_outcomes / len(mine) if mine else None,
        mean=sum(means) / len(means) if means else None,
        interval=confidence_sequence(
            min(sum(means), len(means)), len(means), alpha / len(experiment.variants)
        ),
        latency=_latency(mine),
        finishes=dict(Counter(row.finish or "unfinished" for row in mine)),
        versions=dict(Counter(f"{row.model_version} {row.content_hash[:12]}" for row in mine)),
    )


def _latency(rows: Sequence[Row]) -> Latency:
    total = [row.latency_s for row in rows if row.latency_s is not None and row.finish in ("stop", "length")]
    first = [row.ttft_s for row in rows]
    p50, p95 = _percentiles(total)
    ttft_p50, ttft_p95 = _percentiles(first)
    return Latency(p50, p95, ttft_p50, ttft_p95)


def _percentiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    p50, p95 = np.percentile(values, [50, 95])
    return float(p50), float(p95)


def _compare(control: VariantReport, treatment: VariantReport) -> Comparison:
    interval = difference(control.interval, treatment.interval)
    both = control.mean is not None and treatment.mean is not None
    return Comparison(
        control=control.name,
        treatment=treatment.name,
        difference=treatment.mean - control.mean if both else None,  # type: ignore[operator]
        interval=interval,
        verdict=verdict(interval),
    )


def _warnings(variants: Sequence[VariantReport], p_value: float | None) -> list[str]:
    found = []
    if p_value is not None and p_value < SAMPLE_RATIO_ALPHA:
        counts = ", ".join(f"{v.name} {v.num_units} (meant {v.share:.0%})" for v in variants)
        found.append(
            f"units did not arrive in the configured shares: {counts}, p = {p_value:.2g}; find out why"
        )
    for variant in variants:
        if len(variant.versions) > 1:
            found.append(
                f"{variant.name} was served by {len(variant.versions)} versions: {', '.join(variant.versions)}"
            )
    return found


def _sentence(comparison: Comparison) -> str:
    if comparison.difference is None:
        return f"{comparison.treatment} against {comparison.control}: undecided, no outcomes in one of them."
    interval = f"{comparison.interval.low:+.3f} … {comparison.interval.high:+.3f}"
    return (
        f"{comparison.treatment} against {comparison.control}: {comparison.verdict}, "
        f"difference {comparison.difference:+.3f} ({interval}), valid at every look."
    )


def _pair(p50_s: float | None, p95_s: float | None) -> str:
    return "-" if p50_s is None or p95_s is None else f"{p50_s * 1e3:.0f} / {p95_s * 1e3:.0f}"
