"""A fine-tuned model minus its base → an adapter: of each changed matrix the nearest update of a rank. Two models in.

Eckart & Young 1936: no other matrix of that rank is nearer. What no adapter of low rank has a place for (norms,
embeddings, biases) is said, not dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from serve.adapters.tools.factors import Array, Factors
from serve.errors import ConfigError, ModelError
from serve.model.loading import LoadedModel
from serve.model.network import Network
from serve.model.weights import dense_weight, expert_modules, linear_modules
from serve.tables import Table, numbers

MAX_SHOWN = 8


@dataclass(frozen=True)
class Kept:
    """One module's change: ‖W' − W‖, relative to ‖W‖, and the share of it that the update leaves out."""

    path: str
    change: float
    error: float
    rank: int


@dataclass(frozen=True)
class Extraction:
    """`left_out`: tensors that changed and that no update is for, by name → ‖W' − W‖ / ‖W‖."""

    modules: dict[str, Factors]
    kept: tuple[Kept, ...]
    left_out: Mapping[str, float]

    def as_json(self) -> dict[str, Any]:
        return {"modules": [asdict(each) for each in self.kept], "left_out": dict(self.left_out)}


def extract(
    tuned: LoadedModel, base: LoadedModel, rank: int, progress: Callable[[str], None] = lambda message: None
) -> Extraction:
    """ModelError where the two are of other families or shapes, and where nothing has changed."""
    if rank < 1:
        raise ConfigError(f"--rank is {rank}; expected 1 or more")
    _check_family(tuned, base)
    mine, theirs = _matrices(tuned.network), _matrices(base.network)
    _check_shapes(tuned, base)
    modules: dict[str, Factors] = {}
    kept = []
    for path, module in mine.items():
        weight = _wide(dense_weight(theirs[path]))
        change = _wide(dense_weight(module)) - weight
        if change.any():
            progress(path)
            modules[path], error = nearest(change, rank)
            size = float(np.linalg.norm(change) / (np.linalg.norm(weight) or 1.0))
            kept.append(Kept(path, size, error, modules[path].rank))
    left_out = _others_changed(tuned, base, mine)
    if not modules:
        also = f"; changed are {', '.join(left_out)}, which no adapter has a place for" if left_out else ""
        raise ModelError(
            f"{tuned.name} and {base.name} have the same matrices: there is nothing to extract{also}"
        )
    return Extraction(modules, tuple(kept), left_out)


def nearest(change: Array, rank: int) -> tuple[Factors, float]:
    """The update of at most `rank` that is nearest to a weight's change [.., O, D], and the share of the norm that it
    leaves out. By the eigenvectors of the smaller Gram matrix, in float64."""
    delta = change.swapaxes(-1, -2).astype(np.float64)  # [.., D, O]
    is_wide = delta.shape[-2] <= delta.shape[-1]
    turned = delta if is_wide else delta.swapaxes(-1, -2)
    values, vectors = np.linalg.eigh(turned @ turned.swapaxes(-1, -2))
    rank = min(rank, values.shape[-1])
    first = vectors[..., -rank:]  # the largest come last
    second = first.swapaxes(-1, -2) @ turned
    # As much of the singular values in A as in B.
    root = np.maximum(values[..., -rank:], 0) ** 0.25
    safe = np.where(root > 0, root, 1)
    first, second = first * root[..., None, :], second / safe[..., :, None]
    a, b = (first, second) if is_wide else (second.swapaxes(-1, -2), first.swapaxes(-1, -2))
    gap = float(np.linalg.norm(delta - a @ b) / np.linalg.norm(delta))
    return Factors(a.astype(np.float32), b.astype(np.float32)), gap


def tables(found: Extraction) -> list[Table | str]:
    """What to print."""
    drawn = Table("module", *numbers("changed by", "left out", "rank"))
    for each in found.kept:
        drawn.add(each.path, f"{each.change:.3%}", f"{each.error:.3%}", f"{each.rank}")
    lines: list[Table | str] = [drawn]
    if found.left_out:
        changed = ", ".join(f"{name} ({change:.3%})" for name, change in found.left_out.items())
        lines.append(f"changed too, and in no adapter of low rank: {changed}")
    return lines


def _check_family(tuned: LoadedModel, base: LoadedModel) -> None:
    families = [model.config.get("model_type") for model in (tuned, base)]
    if families[0] != families[1]:
        raise ModelError(
            f"{tuned.name} is of family {families[0]}, {base.name} of {families[1]}; one family was expected"
        )


def _check_shapes(tuned: LoadedModel, base: LoadedModel) -> None:
    mine, theirs = (
        {path: _shape(module) for path, module in _matrices(each.network).items()} for each in (tuned, base)
    )
    problems = [
        f"{path} is {mine.get(path, 'missing')} in {tuned.name} and {theirs.get(path, 'missing')} in {base.name}"
        for path in sorted({*mine, *theirs})
        if mine.get(path) != theirs.get(path)
    ]
    if problems:
        more = [f"… and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        raise ModelError("\n  ".join(["these are not one model, tuned:", *problems[:MAX_SHOWN], *more]))


def _matrices(network: Network) -> dict[str, nn.Module]:
    return {**linear_modules(network.module), **expert_modules(network.module)}


def _shape(module: nn.Module) -> tuple[int, ...]:
    return tuple(dense_weight(module).shape)


def _others_changed(
    tuned: LoadedModel, base: LoadedModel, matrices: Mapping[str, nn.Module]
) -> dict[str, float]:
    """Everything but the matrices."""
    covered = {f"{path}.{part}" for path in matrices for part in ("weight", "scales", "biases")}
    mine, theirs = (dict(tree_flatten(each.network.module.parameters())) for each in (tuned, base))
    changed = {}
    for name in sorted({*mine, *theirs} - covered):
        one, other = mine.get(name), theirs.get(name)
        if one is None or other is None or one.shape != other.shape:
            raise ModelError(
                f"{name} is in {tuned.name} otherwise than in {base.name}: these are not one model, tuned"
            )
        gap = float(mx.linalg.norm((one.astype(mx.float32) - other.astype(mx.float32)).reshape(-1)))
        if gap:
            changed[name] = gap / (float(mx.linalg.norm(other.astype(mx.float32).reshape(-1))) or 1.0)
    return changed


def _wide(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32))
