"""Evidence so far: per variant counts, rates and latency, and an anytime-valid comparison with the first variant.

The unit of analysis is the unit of assignment (`user`): outcomes are averaged within a unit and units are compared,
so one busy user counts once. Units stand in the order in which their first outcome was reported. Looking early and
often is allowed; the guarantee is exact when each unit's mean is final once it is read (one outcome a unit, or all
of them), and approximate while means still move. Works on a store alone, with no server running.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from rich.text import Text

from serve.errors import DataError, NotFoundError, RequestError
from serve.experiments.assignment import Experiment, Variant
from serve.experiments.difference import cut, difference_interval
from serve.experiments.records import Drop, Record, RunCounts
from serve.experiments.statistics import (
    Interval,
    Verdict,
    confidence_sequence,
    sample_ratio_p_value,
    verdict,
)
from serve.experiments.store import Store
from serve.tables import Table, numbers, words

SAMPLE_RATIO_ALPHA = 0.001
"""Below this p-value the split of units is called broken, and nothing else in the report can be trusted."""
MAX_WAITING_FRAC = 0.1
"""Of an arm's units with an outcome; more that wait for the other arm's are told, from MIN_WAITING on."""
MIN_WAITING = 50


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
    """treatment - control, over the units' mean outcomes. `interval` rests on units in whole blocks, see
    `difference.py`; the rest wait for the other arm's."""

    control: str
    treatment: str
    difference: float | None
    interval: Interval
    verdict: Verdict
    num_control_units: int
    num_treatment_units: int
    """In whole blocks."""


@dataclass(frozen=True)
class OtherRun:
    """Exposures under the same name that this report does not count: another definition served them."""

    run_id: int
    started_at: str
    num_exposures: int


@dataclass(frozen=True)
class ExperimentReport:
    """What `lathe ab report` prints. `outcome` is None, and nothing is compared, if several were reported and none
    chosen, or none was reported."""

    experiment: str
    run_id: int
    started_at: str
    outcome: str | None
    outcomes: Mapping[str, int]
    """How many of each name this run has."""
    dropped: tuple[Drop, ...]
    other_runs: tuple[OtherRun, ...]
    alpha: float
    variants: tuple[VariantReport, ...]
    comparisons: tuple[Comparison, ...]
    sample_ratio_p_value: float | None
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for json.dumps."""
        return asdict(self)


def report(
    store: Store,
    experiment_name: str,
    outcome: str | None = None,
    alpha: float = 0.05,
    *,
    run_id: int | None = None,
) -> ExperimentReport:
    """Report on a run of an experiment: the newest, unless another is named.

    outcome  which feedback to compare on; the only one, if left out
    alpha    chance that any comparison here is ever wrong, over all looks, shared equally by them; and the same
             for the arms' own intervals
    Raises NotFoundError (no such experiment, run or outcome), DataError (values outside [0, 1]).
    """
    if not 0 < alpha < 1:
        raise RequestError(f"alpha: found {alpha}; expected a number between 0 and 1", param="alpha")
    runs = store.runs(experiment_name)
    counts = choose_run(runs, run_id)
    run = counts.run
    records = store.records(run.id)
    chosen = _choose_outcome(counts, outcome)
    _check_range(records, chosen)
    means = {v.name: _unit_means(records, v, chosen) for v in run.experiment.variants}
    variants = tuple(
        _variant(run.experiment, v, records, means[v.name], alpha) for v in run.experiment.variants
    )
    comparisons = tuple(
        _compare(variants[0], other, means, alpha / (len(variants) - 1)) for other in variants[1:]
    )
    p_value = sample_ratio_p_value([v.num_units for v in variants], [v.share for v in variants])
    return ExperimentReport(
        experiment=experiment_name,
        run_id=run.id,
        started_at=_time(run.started_at),
        outcome=chosen,
        outcomes=counts.outcomes,
        dropped=tuple(store.drops(run.id)),
        other_runs=tuple(
            OtherRun(each.run.id, _time(each.run.started_at), each.num_exposures)
            for each in runs
            if each is not counts and each.num_exposures
        ),
        alpha=alpha,
        variants=variants,
        comparisons=comparisons if chosen is not None or not counts.outcomes else (),
        sample_ratio_p_value=p_value,
        warnings=tuple(_warnings(variants, comparisons, p_value)),
    )


def choose_run(runs: Sequence[RunCounts], run_id: int | None) -> RunCounts:
    """The run of this number, or the first. NotFoundError names those there are."""
    chosen = next((each for each in runs if run_id in (None, each.run.id)), None)
    if chosen is None:
        there = ", ".join(str(each.run.id) for each in runs)
        raise NotFoundError(f"{runs[0].run.experiment.name} has no run {run_id}; its runs: {there}")
    return chosen


def runs_table(runs: Sequence[RunCounts]) -> Table:
    """A line a run, the one now serving first."""
    table = Table("run", "since", words("weights"), *numbers("exposures"), words("outcomes"))
    for each in runs:
        weights = "\n".join(f"{v.name} {v.weight:g}" for v in each.run.experiment.variants)
        table.add(
            str(each.run.id),
            _time(each.run.started_at),
            weights,
            f"{each.num_exposures:,}",
            counted(each.outcomes),
        )
    return table


def counted(outcomes: Mapping[str, int]) -> str:
    """Outcomes with their numbers, in words."""
    return ", ".join(f"{name} {count:,}" for name, count in outcomes.items()) or "none"


def render(found: ExperimentReport) -> list[Table | Text]:
    """The report, for `serve.tables.show`: a column a variant, then what it says."""
    title = f"{found.experiment}, run {found.run_id}, since {found.started_at}"
    arms = found.variants
    table = Table(found.outcome or "", *numbers(*(arm.name for arm in arms)), title=title)
    lines_of: dict[str, list[str]] = {
        "exposures": [f"{arm.num_exposures:,}" for arm in arms],
        "users": [f"{arm.num_units:,}" for arm in arms],
    }
    if found.outcome is not None:
        lines_of |= {
            "outcomes": [f"{arm.num_outcomes:,}" for arm in arms],
            "mean": ["-" if arm.mean is None else f"{arm.mean:.3f}" for arm in arms],
            f"{1 - found.alpha:.0%} interval": [
                f"{arm.interval.low:.3f} to {arm.interval.high:.3f}" for arm in arms
            ],
        }
    lines_of["latency ms, p50 / p95"] = [_pair(arm.latency.p50_s, arm.latency.p95_s) for arm in arms]
    lines_of["TTFT ms, p50 / p95"] = [_pair(arm.latency.ttft_p50_s, arm.latency.ttft_p95_s) for arm in arms]
    for name, values in lines_of.items():
        table.add(name, *values)
    lines = [Text(_sentence(comparison)) for comparison in found.comparisons]
    lines += [Text(note) for note in _notes(found)]
    lines += [Text(f"Warning: {warning}", style="yellow") for warning in found.warnings]
    return [table, *lines]


def _notes(found: ExperimentReport) -> Iterator[str]:
    """What else there is: other outcomes, deleted ones, other runs."""
    if len(found.outcomes) > 1:
        hint = "" if found.outcome else "; nothing is compared until --outcome names one"
        command = f"lathe ab drop {found.experiment} --outcome NAME"
        yield f"Outcomes: {counted(found.outcomes)}{hint}. A misspelled one goes away with `{command}`."
    for drop in found.dropped:
        yield f"Dropped by hand: {drop.num_outcomes:,} of outcome {drop.name} on {_time(drop.dropped_at)}"
    if found.other_runs:
        runs = ", ".join(
            f"run {each.run_id} (exposures: {each.num_exposures:,}, since {each.started_at})"
            for each in found.other_runs
        )
        yield f"Not counted here, since variants, weights or salt were others: {runs}. `--run N` reports on one."


def _time(epoch_s: float) -> str:
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="seconds")


def _choose_outcome(counts: RunCounts, outcome: str | None) -> str | None:
    names = counts.outcomes
    if outcome is None:
        return next(iter(names)) if len(names) == 1 else None
    if outcome not in names:
        raise NotFoundError(
            f"outcome {outcome!r} has no feedback in run {counts.run.id}; found: {counted(names)}"
        )
    return outcome


def _check_range(records: Sequence[Record], outcome: str | None) -> None:
    for record in records:
        reported = record.outcomes.get(outcome or "")
        if reported is not None and not 0 <= reported.value <= 1:
            raise DataError(
                f"outcome {outcome!r} of {record.completion_id} is {reported.value}; expected 0 … 1"
            )


@dataclass(frozen=True)
class _UnitMeans:
    """An arm's outcomes. `values` are means within units, in the order of the units' first outcomes."""

    values: np.ndarray
    num_outcomes: int


def _unit_means(records: Sequence[Record], variant: Variant, outcome: str | None) -> _UnitMeans:
    by_unit: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.variant == variant.name and (reported := record.outcomes.get(outcome or "")) is not None:
            by_unit.setdefault(record.unit, []).append((reported.reported_at, reported.value))
    in_order = sorted(by_unit.items(), key=lambda unit: (min(unit[1])[0], unit[0]))
    values = [sum(value for _, value in reports) / len(reports) for _, reports in in_order]
    return _UnitMeans(np.clip(np.array(values, dtype=float), 0, 1), sum(map(len, by_unit.values())))


def _variant(
    experiment: Experiment,
    variant: Variant,
    records: Sequence[Record],
    means: _UnitMeans,
    alpha: float,
) -> VariantReport:
    exposures = [record for record in records if record.variant == variant.name]
    values, total = means.values, float(means.values.sum())
    return VariantReport(
        name=variant.name,
        model=variant.model,
        share=experiment.share(variant),
        num_exposures=len(exposures),
        num_units=len({record.unit for record in exposures}),
        num_outcomes=means.num_outcomes,
        num_units_with_outcome=len(values),
        outcome_rate=means.num_outcomes / len(exposures) if exposures else None,
        mean=total / len(values) if len(values) else None,
        interval=confidence_sequence(min(total, len(values)), len(values), alpha / len(experiment.variants)),
        latency=_latency(exposures),
        finishes=dict(Counter(record.finish or "unfinished" for record in exposures)),
        versions=dict(Counter(f"{record.model_version} {record.content_hash[:12]}" for record in exposures)),
    )


def _latency(records: Sequence[Record]) -> Latency:
    total = [
        record.latency_s
        for record in records
        if record.latency_s is not None and record.finish in ("stop", "length")
    ]
    first = [record.ttft_s for record in records]
    p50, p95 = _percentiles(total)
    ttft_p50, ttft_p95 = _percentiles(first)
    return Latency(p50, p95, ttft_p50, ttft_p95)


def _percentiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    p50, p95 = np.percentile(values, [50, 95])
    return float(p50), float(p95)


def _compare(
    control: VariantReport, treatment: VariantReport, means: Mapping[str, _UnitMeans], alpha: float
) -> Comparison:
    ratio = treatment.share / control.share
    values = means[control.name].values, means[treatment.name].values
    blocks = cut(len(values[0]), len(values[1]), ratio)
    interval = difference_interval(*values, alpha, ratio)
    both = control.mean is not None and treatment.mean is not None
    return Comparison(
        control=control.name,
        treatment=treatment.name,
        difference=treatment.mean - control.mean if both else None,  # type: ignore[operator]
        interval=interval,
        verdict=verdict(interval),
        num_control_units=int(blocks.control_ends[-1]) if len(blocks.control_ends) else 0,
        num_treatment_units=int(blocks.treatment_ends[-1]) if len(blocks.treatment_ends) else 0,
    )


def _warnings(
    variants: Sequence[VariantReport], comparisons: Sequence[Comparison], p_value: float | None
) -> list[str]:
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
    for each in comparisons:
        found += _waiting_warnings(each, variants[0], next(v for v in variants if v.name == each.treatment))
    return found


def _waiting_warnings(found: Comparison, control: VariantReport, treatment: VariantReport) -> Iterator[str]:
    """Where one arm has far more outcomes than the weights say; at the beginning that is chance."""
    if not found.num_control_units:
        return
    arms = (control, found.num_control_units, treatment), (treatment, found.num_treatment_units, control)
    for arm, num_compared, other in arms:
        num_waiting = arm.num_units_with_outcome - num_compared
        if num_waiting > max(MAX_WAITING_FRAC * arm.num_units_with_outcome, MIN_WAITING):
            yield (
                f"{num_waiting:,} of {arm.num_units_with_outcome:,} users of {arm.name} wait to be compared: "
                f"there are too few outcomes of {other.name} for the weights"
            )


def _sentence(comparison: Comparison) -> str:
    if comparison.difference is None:
        return f"{comparison.treatment} against {comparison.control}: undecided, no outcomes in one of them."
    interval = f"{comparison.interval.low:+.3f} … {comparison.interval.high:+.3f}"
    return (
        f"{comparison.treatment} against {comparison.control}: {comparison.verdict}, "
        f"difference {comparison.difference:+.3f} ({interval}), valid at every look."
    )


def _pair(p50_s: float | None, p95_s: float | None) -> str:
    return "-" if p50_s is None or p95_s is None else f"{p50_s * 1e3:,.0f} / {p95_s * 1e3:,.0f}"
