"""The LoRA arithmetic, once: the training layer, and the same update from a bank of adapters.

Hu et al. 2021, eq. 3: h = W x + scale · B A x. Parameter names and layouts are mlx-lm's (`lora_a` [D, R],
`lora_b` [R, O]), so files interchange.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(inputs D, outputs O) of a Linear or QuantizedLinear."""
    outputs, inputs = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        inputs = inputs * 32 // linear.bits
    return inputs, outputs


class LoRALinear(nn.Module):
    """A frozen linear layer with one trainable low-rank update."""

    def __init__(
        self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.linear = linear
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        self.lora_a = lora_a
        self.lora_b = lora_b

    @classmethod
    def from_base(
        cls, linear: nn.Module, *, rank: int, scale: float, dropout: float = 0.0, key: mx.array | None = None
    ) -> LoRALinear:
        """A fresh update: A uniform in ±1/√D (as mlx-lm and PEFT), B zero, so the layer starts unchanged."""
        inputs, outputs = linear_shape(linear)
        bound = 1 / math.sqrt(inputs)
        lora_a = mx.random.uniform(low=-bound, high=bound, shape=(inputs, rank), key=key)
        return cls(linear, lora_a, mx.zeros((rank, outputs)), scale, dropout)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., D] → [..., O]."""
        update = (self.dropout(x) @ self.lora_a) @ self.lora_b
        return self.linear(x) + (self.scale * update).astype(x.dtype)

    def fuse(self) -> nn.Linear:
        """One plain linear layer, in full precision: a quantized base is dequantized, never re-quantized."""
        linear = self.linear
        weight = linear.weight
        if isinstance(linear, nn.QuantizedLinear):
            weight = mx.dequantize(
                weight,
                linear.scales,
                linear.get("biases"),
                group_size=linear.group_size,
                bits=linear.bits,
                mode=linear.mode,
            )
        outputs, inputs = weight.shape
        delta = self.scale * (self.lora_a.astype(mx.float32) @ self.lora_b.astype(mx.float32)).T
        fused = nn.Linear(inputs, outputs, bias="bias" in linear)
        fused.weight = (weight.astype(mx.float32) + delta).astype(weight.dtype)
        if "bias" in linear:
            fused.bias = linear.bias
        return fused


def banked_delta(x: mx.array, a: mx.array, b: mx.array, rows: mx.array, slots: mx.array) -> mx.array:
    """Low-rank update, each row with its own adapter.

    x      [B, T, D]  activations
    a      [S, D, R]  down projections, one a slot
    b      [S, R, O]  up projections, the scale folded in
    rows   [B] uint32 0 … B-1
    slots  [B] uint32 row -> slot; slot 0 is the base (zero update)
    Returns [B, T, O] in x.dtype, to be added to the layer's output.
    """
    # Without lhs_indices, gather_mm would make them anew in each of its calls: a hundred small operations a step.
    h = mx.gather_mm(x, a, lhs_indices=rows, rhs_indices=slots)  # [B, T, R]
    return mx.gather_mm(h, b, lhs_indices=rows, rhs_indices=slots).astype(x.dtype)
