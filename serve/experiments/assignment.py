"""Which variant a unit gets: a stable hash of salt, unit and variant, the same on every replica and after a restart.

No state, no clock, no randomness. Weighted rendezvous hashing: each variant draws a number for the unit, and the
largest weighted draw has it. A draw does not depend on the other variants, so a change moves only units that the
change concerns: a new variant takes its share, as much from each, and the rest stay where they were.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import log

RULE = "weighted rendezvous"
"""Stands in a stored run: units that another rule assigned are not mixed with this one's."""


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


def draw(salt: str, unit: str, variant: str) -> float:
    """A number in (0, 1): uniform over units, independent between salts and between variants."""
    digest = hashlib.sha256(f"{len(salt)}:{salt}:{len(unit)}:{unit}:{variant}".encode()).digest()
    return ((int.from_bytes(digest[:8], "big") >> 11) + 0.5) / 2**53


def assign(experiment: Experiment, unit: str) -> Variant:
    """The variant of `unit`. It moves to another only if that one's weight grew by a larger factor than its own.

    -log(draw) / weight is an exponential waiting time, and the variant that comes first is this one with
    probability weight / sum of weights.
    """
    return min(experiment.variants, key=lambda v: -log(draw(experiment.salt, unit, v.name)) / v.weight)
