"""Several adapters' updates, weighted and added: one update a module, exact in float32. Arrays only, no files.

What a module's weights W become is W + Σ wᵢ (W'ᵢ − W), W'ᵢ being what adapter i alone makes of them. Low ranks are
stacked, [A₁ A₂] and [w₁ B₁; w₂ B₂], so nothing is rounded beyond the weights themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from serve.adapters.fit import LowRank
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
    mx.eval([list(update.arrays().values()) for update in combined.values()])
    return combined


def _sum(path: str, parts: Sequence[Part], problems: list[str]) -> LowRank | None:
    """Parts of one module. With DoRA, g = m/‖W'‖ − 1 and W' = (1 + g) (W + A B), so that the sum is
    (1 + G) (W + Σ wᵢ (1 + gᵢ)/(1 + G) Aᵢ Bᵢ), where G = Σ wᵢ gᵢ."""
    gain = _gain(parts)
    if gain is not None and bool(mx.any(mx.abs(1 + gain) < LEAST_LENGTH)):
        problems.append(f"{path}: with DoRA's lengths weighted so, rows of its weights would vanish")
        return None
    scaled = [_scaled(part, gain) for part in parts]
    dense = [update for update in scaled if update.a is None]
    stacked = [update for update in scaled if update.a is not None]
    a = mx.concatenate([update.a for update in stacked], axis=-1) if stacked else None
    b = mx.concatenate([update.b for update in stacked], axis=-2) if stacked else None
    if dense:
        whole = [update.b for update in dense] + ([a @ b] if a is not None else [])
        a, b = None, sum(whole[1:], whole[0])
    return LowRank(a, b, gain)


def _gain(parts: Sequence[Part]) -> mx.array | None:
    gains = [part.weight * part.update.gain for part in parts if part.update.gain is not None]
    return sum(gains[1:], gains[0]) if gains else None


def _scaled(part: Part, gain: mx.array | None) -> LowRank:
    """The part as it is added: its B takes the weight, and what the common gain leaves of its own."""
    update = part.update
    if gain is None:
        return LowRank(update.a, update.b * part.weight)
    own = 1 if update.gain is None else 1 + update.gain
    return LowRank(update.a, update.b * (part.weight * own / (1 + gain)))
