"""Two adapters, module by module: how far apart their updates are. Adapters in, numbers out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from serve.adapters.tools.factors import Core, Factors, inner
from serve.adapters.tools.opened import Opened
from serve.errors import AdapterError
from serve.tables import Table, numbers


@dataclass(frozen=True)
class Apart:
    """Of one module's two updates.

    norms       ‖A₁B₁‖ and ‖A₂B₂‖, Frobenius, with the scales; None where one of them has no update
    difference  ‖A₁B₁ − A₂B₂‖ over the larger of both; None likewise
    cosine      of both as vectors; None likewise, and where one of them is zero
    lengths     of DoRA's rows, ‖m₁ − m₂‖ / ‖m₁‖; None where they have none
    """

    path: str
    first_norm: float | None
    second_norm: float | None
    difference: float | None = None
    cosine: float | None = None
    lengths: float | None = None


@dataclass(frozen=True)
class Difference:
    """`others`: whole weights and biases of which one has another, or none, by name."""

    modules: tuple[Apart, ...]
    others: tuple[str, ...]

    @property
    def total(self) -> float:
        """Of all modules as one vector: the relative difference."""
        gaps = 0.0
        sums = [0.0, 0.0]
        for each in self.modules:
            norms = each.first_norm or 0.0, each.second_norm or 0.0
            gap = max(norms) if each.difference is None else each.difference * max(norms)
            gaps += gap**2
            sums = [total + norm**2 for total, norm in zip(sums, norms, strict=True)]
        return float(np.sqrt(gaps / max(sums))) if max(sums) else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "modules": [asdict(each) for each in self.modules],
            "others": list(self.others),
        }


def difference(first: Opened, second: Opened) -> Difference:
    """AdapterError where a module has other dimensions in each: they are not of one base; and for values that are no
    numbers."""
    for each in (first, second):
        each.check_finite()
    ours, theirs = first.modules_by_end(), second.modules_by_end()
    both = [(ours[end][0], ours[end][1], theirs[end][1]) for end in ours if end in theirs]
    problems = [
        f"{path} is {_shape(one)} in {first.name} and {_shape(other)} in {second.name}"
        for path, one, other in both
        if _shape(one) != _shape(other)
    ]
    if problems:
        raise AdapterError("\n  ".join(["these adapters are not of one base:", *problems[:8]]))
    apart = [_apart(path, one, other) for path, one, other in both]
    apart += [Apart(ours[end][0], Core.of([ours[end][1]]).norm, None) for end in ours.keys() - theirs.keys()]
    apart += [
        Apart(theirs[end][0], None, Core.of([theirs[end][1]]).norm) for end in theirs.keys() - ours.keys()
    ]
    return Difference(tuple(sorted(apart, key=lambda each: each.path)), tuple(_others(first, second)))


def _shape(module: Factors) -> tuple[int, ...]:
    return (*module.a.shape[:-1], module.b.shape[-1])


def _apart(path: str, first: Factors, second: Factors) -> Apart:
    norms = Core.of([first]).norm, Core.of([second]).norm
    largest, is_same = max(norms), _is_same(first, second)
    gap = 0.0 if is_same else Core.of([first, Factors(second.a, second.b, -second.scale)]).norm
    cosine = inner(first, second) / (norms[0] * norms[1]) if min(norms) else None
    return Apart(
        path,
        *norms,
        gap / largest if largest else 0.0,
        None if cosine is None else 1.0 if is_same else max(-1.0, min(1.0, cosine)),
        _lengths_apart(first, second),
    )


def _is_same(first: Factors, second: Factors) -> bool:
    is_scaled_alike = first.scale == second.scale
    return is_scaled_alike and np.array_equal(first.a, second.a) and np.array_equal(first.b, second.b)


def _lengths_apart(first: Factors, second: Factors) -> float | None:
    if first.length is None or second.length is None:
        return None
    return float(np.linalg.norm(first.length - second.length) / np.linalg.norm(first.length))


def _others(first: Opened, second: Opened) -> Iterable[str]:
    for name in sorted({*first.others, *second.others}):
        one, other = first.tensors.get(name), second.tensors.get(name)
        if one is None or other is None or one.shape != other.shape or not bool((one == other).all()):
            yield name


def tables(found: Difference, first: str, second: str) -> list[Table | str]:
    """What to print."""
    drawn = Table("module", *numbers("‖first‖", "‖second‖", "apart", "cosine", "lengths apart"))
    for each in found.modules:
        cells = (each.first_norm, each.second_norm, each.difference, each.cosine, each.lengths)
        drawn.add(each.path, *("" if cell is None else f"{cell:.4g}" for cell in cells))
    lines: list[Table | str] = [f"first: {first}, second: {second}", drawn]
    lines.append(f"all together {found.total:.4g} apart, of the larger one's norm")
    if found.others:
        lines.append(f"not low rank, and not the same in both: {', '.join(found.others)}")
    return lines
