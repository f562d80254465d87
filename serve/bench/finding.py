"""What a benchmark was to find: ratios taken within rounds, and what was asked of them; its parts, one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

import mlx.core as mx

from serve.bench.about import about
from serve.tables import Table, numbers


@dataclass(frozen=True)
class Finding:
    """A ratio, a round each, and what it was made of."""

    what: str
    ratios: tuple[float, ...]
    asked: float
    sense: Literal["at least", "at most"]
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What was measured, name and unit → a number a round."""

    @property
    def median(self) -> float:
        return median(self.ratios)

    @property
    def is_met(self) -> bool:
        """By the median."""
        return self.median >= self.asked if self.sense == "at least" else self.median <= self.asked

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "median": self.median, "is_met": self.is_met}


Keep = Callable[[list[Finding]], None]
"""Is given all that is known so far, after each finding: so a run that is cut off has told it."""


def collect(
    parts: Mapping[str, Callable[[], Iterable[Finding]]], chosen: Iterable[str], keep: Keep
) -> list[Finding]:
    """What the chosen parts find, one after the other; memory that one of them used is free for the next."""
    findings: list[Finding] = []
    for part in chosen:
        for each in parts[part]():
            findings.append(each)
            keep(findings)
        mx.clear_cache()
    return findings


def as_json(setting: Any, findings: Iterable[Finding]) -> dict[str, Any]:
    """Everything that was measured, and on what. `setting`: the benchmark's, a dataclass."""
    return {**about(), "settings": asdict(setting), "findings": [each.as_json() for each in findings]}


def table(title: str, findings: Iterable[Finding]) -> Table:
    """A line a finding."""
    drawn = Table("what", *numbers("ratio", "lowest", "highest", "asked", "met"), title=title)
    for each in findings:
        asked = f"{'≥' if each.sense == 'at least' else '≤'} {each.asked:.3g}"
        extremes = (f"{ratio:.3f}" for ratio in (each.median, min(each.ratios), max(each.ratios)))
        drawn.add(each.what, *extremes, asked, "yes" if each.is_met else "no")
    return drawn


def notes(findings: Iterable[Finding]) -> list[str]:
    """What the ratios were made of: medians."""
    said = []
    for each in findings:
        values = ", ".join(f"{name} {median(found):,.4g}" for name, found in each.values.items())
        said += [f"{each.what}: {values}"] if values else []
    return said
