"""How long prompts and answers are: one length, or a distribution of them, as it is written on the command line."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol

from serve.errors import ConfigError

FORMS = "128, uniform:64:512 or lognormal:MEDIAN:SIGMA[:MAX]"
MAX_LENGTH = 1 << 20
LONGEST_OF_MEDIAN = 16
"""A lognormal without a MAX ends at so many medians."""


class Lengths(Protocol):
    """A distribution over whole numbers of tokens, 1 and more. `str` gives the form it is written in."""

    def draw(self, drawn: random.Random) -> int: ...


@dataclass(frozen=True)
class Fixed:
    """All the same."""

    num_tokens: int

    def draw(self, drawn: random.Random) -> int:
        return self.num_tokens

    def __str__(self) -> str:
        return str(self.num_tokens)


@dataclass(frozen=True)
class Uniform:
    """Each from `low` to `high` as likely as the others."""

    low: int
    high: int

    def draw(self, drawn: random.Random) -> int:
        return drawn.randint(self.low, self.high)

    def __str__(self) -> str:
        return f"uniform:{self.low}:{self.high}"


@dataclass(frozen=True)
class Lognormal:
    """Many short ones and a long tail, as people's requests are. What is longer than `high` is as long."""

    median: int
    sigma: float
    high: int

    def draw(self, drawn: random.Random) -> int:
        length = self.median * math.exp(drawn.gauss(0.0, self.sigma))
        return max(1, min(round(length), self.high))

    def __str__(self) -> str:
        return f"lognormal:{self.median}:{self.sigma:g}:{self.high}"


def parse(text: str, option: str) -> Lengths:
    """The lengths that `text` stands for. Raises ConfigError naming `option`."""
    kind, *numbers = text.strip().split(":")
    try:
        if not numbers:
            return Fixed(_length(kind))
        if kind == "uniform" and len(numbers) == 2:
            low, high = map(_length, numbers)
            if low <= high:
                return Uniform(low, high)
        if kind == "lognormal" and len(numbers) in (2, 3):
            median, sigma = _length(numbers[0]), float(numbers[1])
            high = _length(numbers[2]) if len(numbers) == 3 else min(LONGEST_OF_MEDIAN * median, MAX_LENGTH)
            if 0 <= sigma <= 4 and median <= high:
                return Lognormal(median, sigma, high)
    except ValueError:
        pass
    raise ConfigError(f"{option}: found {text!r}; expected {FORMS}, in tokens")


def _length(text: str) -> int:
    length = int(text)
    if not 1 <= length <= MAX_LENGTH:
        raise ValueError(f"{length} tokens")
    return length
