"""Goodput: how many requests a second were as quick as was promised. The promise as vLLM writes it: ttft:500."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serve.bench.client import Answer
from serve.errors import ConfigError

NAMES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Objective:
    """Bounds in seconds; None: any. TTFT, TPOT and the whole answer (end-to-end latency)."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2el_s: float | None = None

    def is_met(self, answer: Answer) -> bool:
        """Whether an answer without error kept all bounds. One of a single token has no time per token."""
        if answer.error is not None or answer.first_s is None or answer.last_s is None:
            return False
        times = ((self.ttft_s, answer.first_s), (self.tpot_s, answer.tpot_s), (self.e2el_s, answer.last_s))
        return all(bound is None or time is None or time <= bound for bound, time in times)

    def __str__(self) -> str:
        bounds = zip(NAMES, (self.ttft_s, self.tpot_s, self.e2el_s), strict=True)
        return " ".join(f"{name}:{1e3 * bound:g}" for name, bound in bounds if bound is not None)


@dataclass(frozen=True)
class Goodput:
    """What an objective made of answers."""

    objective: str
    """In milliseconds, as it was asked for."""
    requests_per_s: float
    share: float
    """Of all requests, failed ones among them."""


def goodput(answers: Sequence[Answer], wall_s: float, objective: Objective) -> Goodput:
    """Of answers that came in `wall_s` seconds."""
    num_good = sum(objective.is_met(answer) for answer in answers)
    return Goodput(str(objective), num_good / wall_s, num_good / max(1, len(answers)))


def parse(texts: Sequence[str]) -> Objective:
    """From ttft:MS, tpot:MS and e2el:MS, each at most once, in one text or several. Raises ConfigError."""
    bounds: dict[str, float] = {}
    for word in (word for text in texts for word in text.replace(",", " ").split()):
        name, _, number = word.partition(":")
        try:
            bound_ms = float(number)
        except ValueError:
            bound_ms = math.nan
        if name not in NAMES or not 0 < bound_ms < math.inf:
            raise ConfigError(
                f"--goodput: found {word!r}; expected milliseconds like ttft:500, tpot:50 or e2el:2000"
            )
        if name in bounds:
            raise ConfigError(f"--goodput: {name} stands there twice")
        bounds[name] = bound_ms / 1e3
    return Objective(*(bounds.get(name) for name in NAMES))
