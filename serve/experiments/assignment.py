"""Which variant a unit gets: a stable hash of salt and unit, so the same on every replica and after a restart.

No state, no clock, no randomness.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Variant:
    """One arm. `model` is what a request's `model` field would say to be served by it directly."""

    name: str
    model: str
    weight: float = 1.0


@dataclass(frozen=True)
class Experiment:
    """A public model name behind which variants share the traffic. The first variant is the one to beat."""

    name: str
    salt: str
    variants: tuple[Variant, ...]

    def share(self, variant: Variant) -> float:
        """The fraction of units meant for `variant`."""
        return variant.weight / sum(v.weight for v in self.variants)


def position(salt: str, unit: str) -> float:
    """Where `unit` falls in [0, 1): uniform over units, independent between salts."""
    digest = hashlib.sha256(f"{len(salt)}:{salt}:{unit}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def assign(experiment: Experiment, unit: str) -> Variant:
    """The variant of `unit`. Growing one variant's weight moves units between neighbours only."""
    total = sum(v.weight for v in experiment.variants)
    point = position(experiment.salt, unit) * total
    ends = accumulate(v.weight for v in experiment.variants)
    return next(
        (v for v, end in zip(experiment.variants, ends, strict=True) if point < end), experiment.variants[-1]
    )
