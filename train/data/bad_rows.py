"""Rows that cannot be used: raised all together, or left out, counted and named, as a recipe's `on_bad_row` says."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal, TypeVar

from serve.errors import DataError

MAX_PROBLEMS = 20
MAX_REASONS, MAX_SHOWN = 8, 3
"""What a person is told of rows left out: so many reasons, and so many rows of each."""


T = TypeVar("T")


class BadRows:
    """The bad rows of one split. `count` of them were met so far."""

    def __init__(self, policy: Literal["raise", "drop"] = "raise") -> None:
        self.policy = policy
        self.count = 0
        self._problems: list[str] = []
        self._places: dict[str, list[str]] = {}

    def add(self, error: DataError) -> None:
        """Take note of a row; each line of its error starts with file:line. DataError once many are to be raised."""
        self.count += 1
        lines = str(error).splitlines()
        if self.policy == "raise":
            self._problems += lines
            if len(self._problems) >= MAX_PROBLEMS:
                shown = self._problems[:MAX_PROBLEMS]
                raise DataError("\n".join([*shown, "… and perhaps more; these are the first"]))
            return
        parts = [_parted(line) for line in lines]
        reason = "; ".join(reason for _, reason in parts)
        self._places.setdefault(reason, []).append(parts[0][0])

    def of_split(self, examples: Iterable[T | DataError]) -> Iterator[T]:
        """Those that are no errors; the others are taken note of."""
        for example in examples:
            if isinstance(example, DataError):
                self.add(example)
            else:
                yield example

    def finish(self) -> None:
        """DataError with all problems, where they are raised and there are any."""
        if self._problems:
            raise DataError("\n".join(self._problems))

    def lines(self, split: str) -> Iterator[str]:
        """For a person: how many rows of a split were left out, and why, the commonest reasons first."""
        if not self._places:
            return
        yield f"{split}: {self.count:,} bad rows left out (on_bad_row: drop)"
        reasons = sorted(self._places.items(), key=lambda item: -len(item[1]))
        for reason, places in reasons[:MAX_REASONS]:
            yield f"{split}:   {len(places):,} of them: {reason}; first: {', '.join(places[:MAX_SHOWN])}"
        if len(reasons) > MAX_REASONS:
            yield f"{split}:   {len(reasons) - MAX_REASONS} more reasons"


def _parted(line: str) -> tuple[str, str]:
    """(file:line, what is wrong there) of a problem."""
    match = re.match(r"(.*?:\d+): (.*)", line)
    return (match[1], match[2]) if match else ("", line)
