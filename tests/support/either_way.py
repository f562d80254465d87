"""Of cases that each run in step and one ahead: here one of both, in turns, and the other under `-m large`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

ParameterSet = type(pytest.param())


def either_way(cases: Iterable[Any]) -> list[Any]:
    """Parameters (case, ahead). Whether a step is prepared while the one before it runs is the engine's affair, what
    is guessed or kept is the case's; so every case runs, and both ways do."""
    made = []
    for number, case in enumerate(cases):
        values, marks = (case.values, case.marks) if isinstance(case, ParameterSet) else ((case,), ())
        for ahead in (False, True):
            left_out = [] if ahead == bool(number % 2) else [pytest.mark.large]
            name = f"{'one ahead' if ahead else 'in step'}-{values[0]}"
            made.append(pytest.param(*values, ahead, id=name, marks=[*marks, *left_out]))
    return made
