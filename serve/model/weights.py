"""The weight matrices a model is made of: dense or quantized, one or a stack of experts. Knows no adapters.

Every layer that maps D inputs to O outputs by a matrix [O, D] is met here, so that nobody else unpacks bits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

LINEAR = (nn.Linear, nn.QuantizedLinear)
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
MOE_BLOCKS = (SwitchGLU, SwitchMLP)
ROWS_AT_ONCE = 4096


def linear_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer an adapter may touch, by its path in the base (a wrapper's own `.linear` is not shown)."""
    return _unwrapped(named_modules(module), LINEAR)


def expert_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Every stack of experts in a MoE block, likewise. Stacks that something else than an expert's choice indexes
    (deepseek_v41's grouped projection) are none."""
    kinds = _moe_blocks()
    named = named_modules(module)
    blocks = {path for path, child in named.items() if isinstance(child, kinds)}
    stacks = _unwrapped(named, EXPERTS)
    return {path: stack for path, stack in stacks.items() if path.rpartition(".")[0] in blocks}


def named_modules(module: nn.Module) -> dict[str, nn.Module]:
    """What Module.named_modules gives, in its order, in a tenth of its time: an adapter's load asks a dozen times."""
    found: dict[str, nn.Module] = {}
    stack: list[tuple[str, object]] = [("", module)]
    while stack:
        path, child = stack.pop()
        if isinstance(child, nn.Module):
            found[path] = child
            stack += _under(
                path, ((key, value) for key, value in child.items() if isinstance(value, dict | list))
            )
        elif isinstance(child, dict):
            stack += _under(path, child.items())
        elif isinstance(child, list | tuple):
            stack += _under(path, enumerate(child))
    return found


def _under(path: str, children: Iterable[tuple[object, object]]) -> list[tuple[str, object]]:
    return [(f"{path}.{key}" if path else f"{key}", child) for key, child in children]


def _unwrapped(named: Mapping[str, nn.Module], kinds: tuple[type, ...]) -> dict[str, nn.Module]:
    """Layers of these kinds, each by its path in the base: a real layer may be called `linear` too."""
    found = {}
    for path, child in named.items():
        if isinstance(child, kinds):
            parent, _, name = path.rpartition(".")
            is_wrapped = name == "linear" and getattr(named[parent], "wraps_linear", False)
            found[parent if is_wrapped else path] = child
    return found


def _moe_blocks() -> tuple[type, ...]:
    """What chooses experts: mlx-lm's blocks, and mlx-vlm's once somebody has loaded a model of it."""
    theirs = sys.modules.get("mlx_vlm.models.switch_layers")
    return MOE_BLOCKS if theirs is None else (*MOE_BLOCKS, theirs.SwitchGLU, theirs.SwitchMLP)


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(inputs D, outputs O) of a linear layer, or of each expert in a stack."""
    outputs, inputs = linear.weight.shape[-2:]
    if isinstance(linear, QUANTIZED):
        inputs = inputs * 32 // linear.bits
    return inputs, outputs


def dense_weight(module: nn.Module) -> mx.array:
    """The matrix [..., O, D] in floating point: dequantized where it is packed, the stored one where it is not."""
    if not isinstance(module, QUANTIZED):
        return module.weight
    return _dequantize(module, module.weight, module.scales, module.get("biases"))


def _dequantize(module: nn.Module, weight: mx.array, scales: mx.array, biases: mx.array | None) -> mx.array:
    options = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    global_scale = getattr(module, "global_scale", None)
    if global_scale is None:
        return mx.dequantize(weight, scales, biases, **options)
    # nvfp4 experts with one tensor scale each: MLX takes one such scale a call.
    experts = [
        mx.dequantize(weight[i], scales[i], None, global_scale=global_scale[i], **options)
        for i in range(weight.shape[0])
    ]
    return mx.stack(experts)


def project(linear: nn.Module, x: mx.array) -> mx.array:
    """x [..., D] → x Wᵀ [..., O], without the bias; packed weights stay packed."""
    if not isinstance(linear, QUANTIZED):
        return x @ linear.weight.T
    return mx.quantized_matmul(
        x,
        linear.weight,
        scales=linear.scales,
        biases=linear.get("biases"),
        transpose=True,
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
    )


def squared_row_norms(linear: nn.Module) -> mx.array:
    """Σ_d W[o, d]² of a linear layer, [O] float32, evaluated. A few thousand rows are dequantized at a time."""
    parts = []
    for start in range(0, linear.weight.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        weight = linear.weight[rows]
        if isinstance(linear, QUANTIZED):
            scales, biases = linear.scales[rows], linear.get("biases")
            if (
                biases is not None
            ):  # affine: in float32, as the packed product has it, not rounded to scales' dtype
                scales, biases = scales.astype(mx.float32), biases[rows].astype(mx.float32)
            weight = _dequantize(linear, weight, scales, biases)
        parts.append(weight.astype(mx.float32).square().sum(axis=-1))
        mx.eval(parts[-1])
    norms = mx.concatenate(parts)
    mx.eval(norms)
    return norms


def dequantize(module: nn.Module) -> None:
    """Put dense layers in place of all quantized ones of a model, with the values the packed ones stand for."""
    dense = [(p, _dense(m)) for p, m in module.named_modules() if isinstance(m, QUANTIZED)]
    if dense:
        module.update_modules(tree_unflatten(dense))


def _dense(module: nn.Module) -> nn.Module:
    weight = dense_weight(module)
    if isinstance(module, nn.QuantizedEmbedding):
        made = nn.Embedding(1, 1)
    elif isinstance(module, QuantizedSwitchLinear):
        made = SwitchLinear(1, 1, 1, bias=False)
    else:
        made = nn.Linear(1, 1, bias=False)
    made.weight = weight
    if "bias" in module:
        made.bias = module.bias
    return made
