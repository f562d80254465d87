"""Several adapters → one, offline, by the rules of PEFT's add_weighted_adapter. Factors in, factors out; no files.

cat keeps the sum exact, its rank the sum of the ranks; svd is the nearest to that sum of the rank asked for. The
others work on A and on B each for itself, as PEFT's do: their product is not the sum of the products.
TIES: Yadav et al. 2023. DARE: Yu et al. 2024.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from serve.adapters.tools.factors import Array, Core, Factors
from serve.errors import AdapterError, ConfigError

Method = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[Method, ...] = get_args(Method)
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
RANDOM = ("dare_linear", "dare_ties")
MAX_SHOWN = 8


@dataclass(frozen=True)
class Merge:
    """How adapters become one.

    rank     of svd; None: the largest of any part
    density  the share of values that pruning keeps
    seed     of what DARE drops
    """

    method: Method
    rank: int | None = None
    density: float | None = None
    seed: int = 0

    def check(self) -> None:
        """ConfigError for what the method cannot take, or does not read."""
        if self.method not in METHODS:
            raise ConfigError(f"--method is {self.method}; expected one of {', '.join(METHODS)}")
        if self.rank is not None and (self.method != "svd" or self.rank < 1):
            said = (
                f"is {self.rank}; expected 1 or more"
                if self.method == "svd"
                else f"means nothing to {self.method}"
            )
            raise ConfigError(f"--rank {said}; svd has a rank of its own, others those of their parts")
        if self.method in PRUNING and self.density is None:
            raise ConfigError(f"{self.method} needs --density, the share of values that is kept")
        if self.density is not None and self.method not in PRUNING:
            raise ConfigError(f"--density means nothing to {self.method}; {', '.join(PRUNING)} prune")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"--density is {self.density:g}; expected a share above 0, at most 1")


def merge(
    adapters: Sequence[Mapping[str, Factors]], weights: Sequence[float], how: Merge, names: Sequence[str]
) -> dict[str, Factors]:
    """By module path, of every module that any part has; scales are 1.

    names  of the parts, for messages
    AdapterError names each module where the parts' shapes, or ranks where the method needs equal ones, differ.
    """
    how.check()
    paths = sorted({path for each in adapters for path in each})
    problems: list[str] = []
    for path in paths:
        parts = {name: each[path] for name, each in zip(names, adapters, strict=True) if path in each}
        _check(path, parts, how, problems)
    if problems:
        shown = problems[:MAX_SHOWN] + (
            [f"… and {len(problems) - MAX_SHOWN} more"] if len(problems) > MAX_SHOWN else []
        )
        raise AdapterError("\n  ".join(["these adapters cannot be merged so:", *shown]))
    if how.method == "svd" and how.rank is None:
        how = replace(how, rank=max(part.rank for each in adapters for part in each.values()))
    merged = {}
    for path in paths:
        parts_here = [
            (each[path], weight) for each, weight in zip(adapters, weights, strict=True) if path in each
        ]
        merged[path] = _module(path, [part for part, _ in parts_here], [w for _, w in parts_here], how)
    return merged


def _check(path: str, parts: Mapping[str, Factors], how: Merge, problems: list[str]) -> None:
    named = list(parts.items())
    first_name, first = named[0]
    for name, part in named:
        if part.length is not None:
            problems.append(
                f"{path} of {name} is DoRA's, whose rows have lengths of their own; LoRA alone is merged"
            )
        if _outside(part) != _outside(first):
            problems.append(f"{path} is {_shown(first)} in {first_name} and {_shown(part)} in {name}")
        elif how.method not in ("cat", "svd") and part.rank != first.rank:
            problems.append(
                f"{path} has rank {first.rank} in {first_name} and {part.rank} in {name}: {how.method} adds "
                f"factors of one rank; cat and svd take any"
            )


def _outside(part: Factors) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is not the rank."""
    return part.a.shape[:-1], (*part.b.shape[:-2], part.b.shape[-1])


def _shown(part: Factors) -> str:
    experts = f"{part.a.shape[0]} experts of " if part.is_experts else ""
    return f"{experts}{part.a.shape[-2]} → {part.b.shape[-1]}"


def _module(path: str, parts: Sequence[Factors], weights: Sequence[float], how: Merge) -> Factors:
    if how.method in ("cat", "svd"):
        stacked = [part.times(weight) for part, weight in zip(parts, weights, strict=True)]
        if how.method == "svd":
            assert how.rank is not None
            return Core.of(stacked).truncated(how.rank)[0]
        a = np.concatenate([part.a for part in stacked], axis=-1)
        return Factors(a, np.concatenate([part.b for part in stacked], axis=-2))
    # The square root of a weight goes to A and to B, its sign to A alone.
    roots = [math.sqrt(abs(weight * part.scale)) for part, weight in zip(parts, weights, strict=True)]
    signed = [
        math.copysign(root, weight * part.scale)
        for root, part, weight in zip(roots, parts, weights, strict=True)
    ]
    a = _added([part.a for part in parts], signed, how, f"{path}.lora_a")
    return Factors(a, _added([part.b for part in parts], roots, how, f"{path}.lora_b"))


def _added(tensors: Sequence[Array], weights: Sequence[float], how: Merge, name: str) -> Array:
    density = how.density if how.density is not None else 1.0
    if how.method in RANDOM:
        tensors = [
            dropped(tensor, density, generator(how.seed, index, name)) for index, tensor in enumerate(tensors)
        ]
    elif how.method in PRUNING:
        tensors = [largest(tensor, density) for tensor in tensors]
    stack = np.stack(tensors)
    weighted = stack * np.array(weights, stack.dtype).reshape(-1, *[1] * (stack.ndim - 1))
    if how.method in ("ties", "dare_ties"):
        return _agreeing(stack, weighted)
    return np.asarray(weighted.sum(axis=0))


def _agreeing(stack: Array, weighted: Array) -> Array:
    """Of each value, the mean over the parts whose sign the sum of all has. PEFT elects before it weights."""
    sign = np.where(stack.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(stack) == sign
    return np.asarray((weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1))


def largest(tensor: Array, density: float) -> Array:
    """The share `density` of the values, those of the largest magnitude; 0 for the others."""
    if density >= 1:
        return tensor
    count = int(density * tensor.size)
    kept = np.zeros(tensor.size, bool)
    kept[np.argpartition(-np.abs(tensor).reshape(-1), max(count - 1, 0))[:count]] = True
    return np.where(kept.reshape(tensor.shape), tensor, 0).astype(tensor.dtype)


def dropped(tensor: Array, density: float, random: np.random.Generator) -> Array:
    """Values kept with this chance, and lengthened so that the mean stays what it is; 0 for the others."""
    if density >= 1:
        return tensor
    kept = random.random(tensor.shape) < density
    return np.where(kept, tensor / density, 0).astype(tensor.dtype)


def generator(seed: int, index: int, name: str) -> np.random.Generator:
    """The random numbers of one tensor of the part in this place: the same whatever else is merged."""
    digest = hashlib.sha256(f"{seed}|{index}|{name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))
