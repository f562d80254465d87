"""LoRA on a stack of MoE experts: every expert has its own A and B.

Parameter names and layouts are mlx-lm's LoRASwitchLinear: `lora_a` [E, R, D], `lora_b` [E, O, R].
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from serve.adapters.layers.lora import AdaptedLayer, gathered_update
from serve.model.weights import dense_weight, linear_shape


class LoRAExperts(AdaptedLayer):
    """A frozen SwitchLinear with one trainable low-rank update an expert."""

    RANK_AXES = (1, 2)

    @classmethod
    def from_base(
        cls, linear: nn.Module, *, rank: int, scale: float, dropout: float = 0.0, key: mx.array | None = None
    ) -> LoRAExperts:
        """A fresh update: A uniform in ±1/√D, B zero."""
        inputs, outputs = linear_shape(linear)
        experts = linear.weight.shape[0]
        bound = 1 / math.sqrt(inputs)
        lora_a = mx.random.uniform(low=-bound, high=bound, shape=(experts, rank, inputs), key=key)
        return cls(linear, lora_a, mx.zeros((experts, outputs, rank)), scale, dropout)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x [..., 1, D] and the expert of each entry → [..., 1, O], as SwitchLinear."""
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        if not self.is_on:
            return y
        update = expert_update(self.dropout(x), self.lora_a, self.lora_b, indices, sorted_indices)
        if self.has_principal:
            update = update - expert_update(x, self._a0, self._b0, indices, sorted_indices)
        return y + (self.scale * update).astype(x.dtype)

    def delta(self) -> mx.array:
        """What is added to the weights: [E, O, D] float32."""
        parts = self.tensors()
        return self.scale * (parts["lora_b"].astype(mx.float32) @ parts["lora_a"].astype(mx.float32))

    def fuse(self) -> SwitchLinear:
        """One plain SwitchLinear, in full precision."""
        weight = dense_weight(self.linear)
        fused = SwitchLinear(1, 1, 1, bias=False)
        fused.weight = (weight.astype(mx.float32) + self.delta()).astype(weight.dtype)
        if "bias" in self.linear:
            fused.bias = self.linear.bias
        return fused


def expert_update(
    x: mx.array, lora_a: mx.array, lora_b: mx.array, indices: mx.array, sorted_indices: bool
) -> mx.array:
    """B A x with each entry's own expert: x [..., 1, D], lora_a [E, R, D], lora_b [E, O, R] → [..., 1, O]."""
    a, b = lora_a.swapaxes(-1, -2), lora_b.swapaxes(-1, -2)
    return gathered_update(x, a, b, rhs_indices=indices, sorted_indices=sorted_indices)
