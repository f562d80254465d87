"""Several adapters' updates, weighted and added: one update a module, exact in float32. Arrays only, no files.

What a module's weights W become is W + Σ wᵢ (W'ᵢ − W), W'ᵢ being what adapter i alone makes of them. Low ranks are
stacked, [A₁ A₂] and [w₁ B₁; w₂ B₂], so nothing is rounded beyond the weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from serve.adapters.fitting.update import LowRank
from serve.beside import evaluate
from serve.errors import AdapterError

LEAST_LENGTH = 1e-3
"""Of 1 + Σ wᵢ gᵢ, by which a row of a DoRA sum is lengthened: what is divided by less loses its digits."""


@dataclass(frozen=True)
class Part:
    """One weighted update of a module."""

    weight: float
    update: LowRank


def combine(updates: Sequence[Mapping[str, LowRank]], weights: Sequence[float]) -> dict[str, LowRank]:
    """The weighted sum of adapters' updates, by module path. Adapters of weight 0 leave nothing behind.

    Evaluated when it returns. AdapterError names the modules whose sum no update can stand for.
    """
    by_path: dict[str, list[Part]] = {}
    for each, weight in zip(updates, weights, strict=True):
        if weight:
            for path, update in each.items():
                by_path.setdefault(path, []).append(Part(weight, update))
    problems: list[str] = []
    combined: dict[str, LowRank] = {}
    for path, parts in sorted(by_path.items()):
        made = _sum(path, parts, problems)
        if made is not None:
            combined[path] = made
    if problems:
        raise AdapterError("\n  ".join(["these adapters do not add up:", *problems]))
    evaluate([update.arrays() for update in combined.values()])
    return combined


def _sum(path: str, parts: Sequence[Part], problems: list[str]) -> LowRank | None:
    """Parts of one module. With DoRA, g = m/‖W'‖ − 1 and W' = (1 + g) (W + A B), so that the sum is
    (1 + G) (W + Σ wᵢ (1 + gᵢ)/(1 + G) Aᵢ Bᵢ), where G = Σ wᵢ gᵢ."""
    gain = _gain(parts)
    if gain is not None and bool(mx.any(mx.abs(1 + gain) < LEAST_LENGTH)):
        problems.append(f"{path}: with DoRA's lengths weighted so, rows of its weights would vanish")
        return None
    if gain is not None and any(part.update.a is None for part in parts):
        problems.append(f"{path}: a whole weight and DoRA's lengths are added, which have no form together")
        return None
    scaled = [_scaled(part, gain) for part in parts]
    bias = _added([part.weight * _wide(part.update.bias) for part in parts if part.update.bias is not None])
    stacked = [(update.a, update.b) for update in scaled if update.a is not None]
    whole = [update.b for update in scaled if update.a is None]
    if whole:
        whole += [a @ b for a, b in stacked]
        return LowRank(None, sum(whole[1:], whole[0]), None, bias)
    a = mx.concatenate([a for a, _ in stacked], axis=-1)
    return LowRank(a, mx.concatenate([b for _, b in stacked], axis=-2), gain, bias)


def _gain(parts: Sequence[Part]) -> mx.array | None:
    return _added([part.weight * _wide(part.update.gain) for part in parts if part.update.gain is not None])


def _added(arrays: Sequence[mx.array]) -> mx.array | None:
    return sum(arrays[1:], arrays[0]) if arrays else None


def _scaled(part: Part, gain: mx.array | None) -> LowRank:
    """The part as it is added: its B takes the weight, and what the common gain leaves of its own."""
    update = part.update
    a, b = None if update.a is None else _wide(update.a), _wide(update.b)
    if gain is None:
        return LowRank(a, b * part.weight)
    own = 1 if update.gain is None else 1 + _wide(update.gain)
    return LowRank(a, b * (part.weight * own / (1 + gain)))


def _wide(array: mx.array) -> mx.array:
    """Residents are kept in the network's dtype; sums are made in float32."""
    return array.astype(mx.float32)
