"""Which guess of a draft model comes true more often: its likeliest token, or its draw by the target's random number.

Two kinds of one guess: both are known where one is made, and the token that came says which of them was right, so
nothing is tried out. Where the target is surer than the draft model, its likeliest token is what comes; where it is
as unsure, the draw is. No arrays.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

MEMORY = 0.99
"""What is left of both counts after one more guess."""
MIN_LEAD = 2.0
"""Guesses by which the other kind must be ahead to take over: two of a kind are not told apart by luck alone."""
MAX_GROUPS = 4096

GuessKind = Literal["learned", "drawn", "likeliest"]
Group = tuple[str, float]
"""An adapter's effect hash and a temperature."""


@dataclass
class _Counts:
    drawn: float = 0.0
    likeliest: float = 0.0
    is_likeliest: bool = False


class GuessKinds:
    """Of one draft model."""

    def __init__(self, kind: GuessKind) -> None:
        """`learned`: drawn, until the likeliest ones are seen to be right more often; the others: always."""
        self._kind = kind
        self._groups: OrderedDict[Group, _Counts] = OrderedDict()

    def is_likeliest(self, group: Group) -> bool:
        """Whether a group's next guess is the likeliest token, and not a draw."""
        if self._kind != "learned":
            return self._kind == "likeliest"
        counts = self._groups.get(group)
        return counts is not None and counts.is_likeliest

    def note(self, group: Group, drawn: int, likeliest: int, token: int) -> None:
        """Behind the same text, one kind would guess this, the other that, and the token came."""
        counts = self._groups.pop(group, None) or _Counts()
        counts.drawn = counts.drawn * MEMORY + (drawn == token)
        counts.likeliest = counts.likeliest * MEMORY + (likeliest == token)
        lead = counts.likeliest - counts.drawn
        if abs(lead) >= MIN_LEAD:
            counts.is_likeliest = lead > 0
        self._groups[group] = counts
        if len(self._groups) > MAX_GROUPS:
            self._groups.popitem(last=False)
