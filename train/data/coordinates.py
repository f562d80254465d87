"""Boxes and points in a row's turns, taken along when their picture is resized. Texts and sizes in, texts out.

They stand in JSON under known keys, or between marks; which picture they are of is the last one shown before them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Unit = Literal["pixels", "fractions", "thousandths"]

_NUMBER = r"-?\d+(?:\.\d+)?"
_NUMBERS = re.compile(_NUMBER)
_LIST = r"\[[\s\d.,\-\[\]]*\]"
FRACTION_DIGITS = 4


@dataclass(frozen=True)
class Picture:
    """(height, width) in pixels, as it is stored and as the tower sees it."""

    stored: tuple[int, int]
    seen: tuple[int, int]


@dataclass(frozen=True)
class Coordinates:
    """How coordinates are found in words, and what becomes of them.

    rows, model  the unit that rows use, and the one that the model learns
    keys, tags   where they stand: `"bbox_2d": [x, y, x, y]`; `<box>(x,y),(x,y)</box>`, `<|box_start|>…<|box_end|>`
    """

    rows: Unit
    model: Unit
    keys: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @cached_property
    def _ways(self) -> list[re.Pattern[str]]:
        ways = [rf'"(?:{"|".join(map(re.escape, self.keys))})"\s*:\s*({_LIST})'] if self.keys else []
        for tag in map(re.escape, self.tags):
            ways += [rf"<{tag}>(.*?)</{tag}>", rf"<\|{tag}_start\|>(.*?)<\|{tag}_end\|>"]
        return [re.compile(way, re.DOTALL) for way in ways]

    def adjusted(self, text: str, picture: Picture) -> str:
        """The text with each coordinate in the model's unit. ValueError for one outside of its picture."""
        for way in self._ways:
            text = way.sub(self._rewriter(picture), text)
        return text

    def _rewriter(self, picture: Picture) -> Callable[[re.Match[str]], str]:
        def rewritten(match: re.Match[str]) -> str:
            whole, start = match[0], match.start(1) - match.start(0)
            inside = match[1]
            count = -1

            def number(found: re.Match[str]) -> str:
                nonlocal count
                count += 1
                return self._moved(found[0], 1 - count % 2, picture)

            return whole[:start] + _NUMBERS.sub(number, inside) + whole[start + len(inside) :]

        return rewritten

    def _moved(self, said: str, axis: int, picture: Picture) -> str:
        """One number along an axis: 0 is height, 1 width; x comes before y."""
        size = {"pixels": picture.stored[axis], "fractions": 1.0, "thousandths": 1000.0}[self.rows]
        share = float(said) / size
        if not -0.001 <= share <= 1.001:
            raise ValueError(
                f"found the coordinate {said}, outside of a picture of {picture.stored[1]}x{picture.stored[0]} "
                f"({self.rows})"
            )
        share = min(max(share, 0.0), 1.0)
        if self.model == "fractions":
            return f"{share:.{FRACTION_DIGITS}f}"
        return str(round(share * (1000 if self.model == "thousandths" else picture.seen[axis])))
