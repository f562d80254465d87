"""Layers that are several in an adapter's file and one here (q_proj, k_proj, v_proj → qkv_proj): their updates side
by side, exact: A's ranks together, B zero outside of each one's own outputs. Shapes in, functions of tensors out.

Adapters of a Phi that was converted to Llama's form have them so, and those of trainers that keep queries, keys and
values apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from serve.errors import AdapterError

LEAVES: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"), (0, 1, 1)),
    "gate_up_proj": (("gate_proj", "up_proj"), (0, 0)),
    "in_proj_qkv": (("in_proj_q", "in_proj_k", "in_proj_v"), (0, 0, 1)),
}
"""What one layer here is there, in the order of its outputs; and which of those have as many outputs."""
LOW = ("lora_a", "lora_b")
BY_OUTPUT = ("m", "weight", "base_weight", "bias")
"""Parts that say something of each output, and so are whole only together."""

Made = Callable[[Sequence[mx.array]], mx.array]


def wholes_of(path: str) -> list[str]:
    """What the layer that `path` is a part of may be called."""
    parent, _, leaf = path.rpartition(".")
    return [f"{parent}.{whole}" for whole, (leaves, _) in LEAVES.items() if leaf in leaves]


def outputs_of(path: str, known: Mapping[str, int], total: int) -> dict[str, slice]:
    """By leaf, its outputs among those of the whole layer. `known`: how many the leaves that are there have.

    AdapterError where they do not make up `total`.
    """
    leaves, kinds = LEAVES[path.rpartition(".")[2]]
    sizes: dict[int, int] = {}
    for leaf, kind in zip(leaves, kinds, strict=True):
        if leaf in known and sizes.setdefault(kind, known[leaf]) != known[leaf]:
            raise AdapterError(f"{path}: {leaf} has {known[leaf]} outputs; {sizes[kind]} were expected")
    rest = [kind for kind in kinds if kind not in sizes]
    left = total - sum(sizes[kind] for kind in kinds if kind in sizes)
    if rest:
        sizes[rest[0]] = left // len(rest)
        left -= sizes[rest[0]] * len(rest)
    if left or min(sizes.values()) < 1:
        told = ", ".join(f"{leaf} {count}" for leaf, count in known.items())
        raise AdapterError(f"{path} has {total} outputs here, which these do not make up: {told}")
    slices, start = {}, 0
    for leaf, kind in zip(leaves, kinds, strict=True):
        slices[leaf] = slice(start, start + sizes[kind])
        start += sizes[kind]
    return slices


def beside(path: str, part: str, leaves: Sequence[str]) -> Made:
    """A part of all leaves → the whole layer's. AdapterError where a leaf is missing that nothing can stand for."""
    wanted = LEAVES[path.rpartition(".")[2]][0]
    if part in BY_OUTPUT and len(leaves) < len(wanted):
        missing = ", ".join(leaf for leaf in wanted if leaf not in leaves)
        raise AdapterError(f"{path} is one layer here, and there is no {part} of {missing}")
    axis = 1 if part == "lora_a" else 0
    return lambda values: mx.concatenate(list(values), axis=axis)


def placed(slices: Sequence[slice], total: int, factors: Sequence[float]) -> Made:
    """B of each leaf [R, O] (or lora_bias [O]) → of the whole layer, zero elsewhere, times a factor each."""

    def made(values: Sequence[mx.array]) -> mx.array:
        padded = []
        for value, rows, factor in zip(values, slices, factors, strict=True):
            wide = value if factor == 1 else value.astype(mx.float32) * factor
            widths = [(0, 0)] * (value.ndim - 1) + [(rows.start, total - rows.stop)]
            padded.append(mx.pad(wide, widths))
        return mx.concatenate(padded, axis=0) if padded[0].ndim == 2 else sum(padded[1:], padded[0])

    return made
