"""Of cases that each run in step and one ahead: here one of both, in turns, and the other under `-m large`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest


def either_way(cases: Iterable[Any]) -> Iterator[Any]:
    """Parameters (case, ahead). Whether a step is prepared while the one before it runs is the engine's affair, and
    what a case is that of a drafter or family, so neither way goes untried."""
    for number, case in enumerate(cases):
        values, marks = (case.values, case.marks) if isinstance(case, type(pytest.param())) else ((case,), ())
        for ahead in (False, True):
            is_here = ahead == bool(number % 2)
            name = f"{'one ahead' if ahead else 'in step'}-{values[0]}"
            yield pytest.param(
                *values, ahead, id=name, marks=[*marks, *([] if is_here else [pytest.mark.large])]
            )
