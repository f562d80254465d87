"""What the store of experiments keeps and gives back: frozen values. Knows no SQL, so a server without experiments
never imports any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serve.experiments.assignment import Experiment


@dataclass(frozen=True)
class Exposure:
    """A unit met a variant: the first token of one completion left the server. Times in seconds, UTC epoch."""

    completion_id: str
    run_id: int
    variant: str
    unit: str
    model_version: str
    """`name@N` of the adapter, or the base's name."""
    content_hash: str
    """Of the adapter's tensors, or the base's fingerprint: the same name may have been replaced meanwhile."""
    exposed_at: float
    ttft_s: float


@dataclass(frozen=True)
class Run:
    """One stored definition of an experiment."""

    id: int
    experiment: Experiment
    started_at: float


@dataclass(frozen=True)
class RunCounts:
    """A run as a list of runs shows it. `activated_at` is when a server last began to serve it."""

    run: Run
    activated_at: float
    num_exposures: int
    outcomes: Mapping[str, int]
    """Outcomes by name."""


@dataclass(frozen=True)
class Drop:
    """Outcomes that were deleted by hand, so that a report can say so."""

    name: str
    num_outcomes: int
    dropped_at: float


@dataclass(frozen=True)
class Outcome:
    """How a completion turned out. A later value replaces an earlier one; `reported_at` is the first one's time."""

    value: float
    reported_at: float


@dataclass(frozen=True)
class Record:
    """An exposure as a report reads it, with its outcomes by name."""

    completion_id: str
    variant: str
    unit: str
    model_version: str
    content_hash: str
    ttft_s: float
    latency_s: float | None
    num_tokens: int | None
    finish: str | None
    outcomes: Mapping[str, Outcome]
