"""Stacks of experts → PEFT's `target_parameters`: one A and one B of all experts of a parameter.

Hugging Face keeps the experts of a block as parameters gate_up_proj and down_proj of one module. PEFT packs A
[E · R, D] with the expert slowest, and B [O, R · E] with the expert fastest. Where both parameters are adapted, the
module is wrapped twice, and gate_up_proj's update is called base_layer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import mlx.core as mx

from serve.errors import AdapterError

BLOCKS = {"mlp.switch_mlp": "mlp.experts", "block_sparse_moe.switch_mlp": "mlp.experts"}
"""Ends of the names of blocks: mlx-lm's → Hugging Face's. Other families pack, or order, their experts otherwise."""
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
THEIRS = ("gate_up_proj", "down_proj")
"""Parameters of Hugging Face's own modules, which are called experts."""


@dataclass(frozen=True)
class StackUpdate:
    """An update of one stack of experts: a [E, R, D], b [E, O, R]."""

    a: mx.array
    b: mx.array
    scale: float


@dataclass(frozen=True)
class Packed:
    """One parameter's update in PEFT's form. `key`: what its tensors are called by."""

    parameter: str
    key: str
    a: mx.array
    b: mx.array
    rank: int
    scale: float


def packed(stacks: Mapping[str, StackUpdate], their_name: Callable[[str], str]) -> list[Packed]:
    """By mlx-lm's paths of stacks, or Hugging Face's of parameters; `their_name` says what that calls a module.

    AdapterError names blocks whose family keeps its experts otherwise.
    """
    blocks: dict[str, dict[str, StackUpdate]] = {}
    for path, stack in stacks.items():
        block, _, leaf = path.rpartition(".")
        blocks.setdefault(block, {})[leaf] = stack
    made = []
    for block, leaves in blocks.items():
        module = their_name(_their_block(block, leaves))
        joined = leaves.get(THEIRS[0]) or _gate_and_up(leaves)
        both = joined is not None and DOWN in leaves
        if joined is not None:
            made.append(_pack(f"{module}.gate_up_proj", f"{module}.base_layer" if both else module, joined))
        if DOWN in leaves:
            made.append(_pack(f"{module}.down_proj", module, leaves[DOWN]))
    return made


def _their_block(block: str, leaves: Mapping[str, StackUpdate]) -> str:
    if block.endswith(".experts") and leaves.keys() <= {*THEIRS}:
        return block
    end = next((end for end in BLOCKS if block.endswith(f".{end}") or block == end), None)
    if end is None or leaves.keys() - {GATE, UP, DOWN}:
        raise AdapterError(
            f"{block}: how Hugging Face keeps the experts {', '.join(sorted(leaves))} of this family is not known "
            f"here; known are blocks called {' and '.join(BLOCKS)}"
        )
    return block.removesuffix(end) + BLOCKS[end]


def _gate_and_up(leaves: Mapping[str, StackUpdate]) -> StackUpdate | None:
    """Both as one stack of twice the outputs: of the same rank if they share A, else of both ranks together."""
    gate, up = leaves.get(GATE), leaves.get(UP)
    if gate is None and up is None:
        return None
    one = gate or up
    assert one is not None
    if gate is None or up is None:
        nothing = mx.zeros_like(one.b)
        parts = [nothing, one.b] if gate is None else [one.b, nothing]
        return StackUpdate(one.a, mx.concatenate(parts, axis=1), one.scale)
    if gate.scale != up.scale:
        up = StackUpdate(up.a, up.b * (up.scale / gate.scale), gate.scale)
    if gate.a.shape == up.a.shape and bool(mx.array_equal(gate.a, up.a)):
        return StackUpdate(gate.a, mx.concatenate([gate.b, up.b], axis=1), gate.scale)
    aside = [
        mx.concatenate([gate.b, mx.zeros((*gate.b.shape[:2], up.b.shape[2]), gate.b.dtype)], axis=2),
        mx.concatenate([mx.zeros((*up.b.shape[:2], gate.b.shape[2]), up.b.dtype), up.b], axis=2),
    ]
    return StackUpdate(mx.concatenate([gate.a, up.a], axis=1), mx.concatenate(aside, axis=1), gate.scale)


def _pack(parameter: str, key: str, stack: StackUpdate) -> Packed:
    experts, rank, inputs = stack.a.shape
    a = mx.contiguous(stack.a.reshape(experts * rank, inputs))
    b = mx.contiguous(stack.b.transpose(1, 2, 0).reshape(stack.b.shape[1], rank * experts))
    return Packed(parameter, key, a, b, rank, stack.scale)
