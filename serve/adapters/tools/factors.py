"""An adapter's updates as its files hold them, for tools that need no base model. NumPy; nothing of D × O is made.

Every measure of a product A B is taken of the small matrix between orthonormal bases of its factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.tensors import paths_of

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Factors:
    """One module's update, scale · A B.

    a       [D, R], of experts [E, D, R]
    b       [R, O], of experts [E, R, O]
    length  [O] DoRA's m, to which the rows are brought; None: they have the length they have
    """

    a: Array
    b: Array
    scale: float = 1.0
    length: Array | None = None

    @property
    def rank(self) -> int:
        """R."""
        return int(self.a.shape[-1])

    @property
    def is_experts(self) -> bool:
        """Whether it holds an update an expert."""
        return self.a.ndim == 3

    def times(self, weight: float) -> Factors:
        """As much of it, as a plain product: the scale and the weight are in B."""
        return Factors(self.a, self.b * (weight * self.scale))

    def delta(self) -> Array:
        """scale · A B, whole, [D, O] or [E, D, O] float64: for tests and small modules."""
        return self.scale * (self.a.astype(np.float64) @ self.b.astype(np.float64))


def factors_of(tensors: Mapping[str, mx.array], config: AdapterConfig) -> dict[str, Factors]:
    """By module path, from tensors with mlx-lm's names and orientation. Whole weights are left out."""
    found = {}
    for path in paths_of(tensors):
        a, b = (_numpy(tensors[f"{path}.{part}"]) for part in ("lora_a", "lora_b"))
        if a.ndim == 3:
            a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
        length = tensors.get(f"{path}.m")
        found[path] = Factors(a, b, config.scale_of(path), None if length is None else _numpy(length))
    return found


def tensors_of(modules: Mapping[str, Factors]) -> dict[str, mx.array]:
    """The inverse of `factors_of`, float32; scales are the config's."""
    tensors = {}
    for path, module in modules.items():
        a, b = module.a, module.b
        if module.is_experts:
            a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = _array(a), _array(b)
        if module.length is not None:
            tensors[f"{path}.m"] = _array(module.length)
    return tensors


def _numpy(array: mx.array) -> Array:
    """float32, or float64 where it is stored so."""
    return np.array(array if array.dtype == mx.float64 else array.astype(mx.float32))


def _array(array: Array) -> mx.array:
    return mx.array(np.ascontiguousarray(array, dtype=np.float32))


@dataclass(frozen=True)
class Core:
    """A sum of updates as Q_A M Q_Bᵀ, float64; the columns of Q_A [.., D, r] and Q_B [.., O, s] are orthonormal."""

    left: Array
    middle: Array
    right: Array

    @classmethod
    def of(cls, parts: Sequence[Factors]) -> Core:
        """Of the sum of `parts`, which are of one module."""
        a = np.concatenate([part.a for part in parts], axis=-1).astype(np.float64)
        b = np.concatenate([part.scale * part.b.astype(np.float64) for part in parts], axis=-2)
        left, upper = np.linalg.qr(a)
        right, lower = np.linalg.qr(b.swapaxes(-1, -2))
        return cls(left, upper @ lower.swapaxes(-1, -2), right)

    @property
    def norm(self) -> float:
        """Frobenius, of all experts together."""
        return float(np.linalg.norm(self.middle))

    def truncated(self, rank: int) -> tuple[Factors, float]:
        """The nearest update of at most `rank`, with as much of the singular values in A as in B; and the part of
        the norm that is left out."""
        u, s, vt = np.linalg.svd(self.middle)
        rank = min(rank, s.shape[-1])
        root = np.sqrt(s[..., :rank])
        a = self.left @ (u[..., :rank] * root[..., None, :])
        b = (root[..., :, None] * vt[..., :rank, :]) @ self.right.swapaxes(-1, -2)
        lost, total = float(np.linalg.norm(s[..., rank:])), float(np.linalg.norm(s))
        return Factors(a.astype(np.float32), b.astype(np.float32)), lost / total if total else 0.0


def inner(first: Factors, second: Factors) -> float:
    """⟨A₁B₁, A₂B₂⟩ = Σ (A₁ᵀA₂) ∘ (B₁B₂ᵀ), with the scales."""
    a = first.a.astype(np.float64).swapaxes(-1, -2) @ second.a
    b = first.b.astype(np.float64) @ second.b.astype(np.float64).swapaxes(-1, -2)
    return first.scale * second.scale * float(np.sum(a * b))
