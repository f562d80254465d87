"""One thing that a benchmark was to find: ratios taken within rounds, and what was asked of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

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
