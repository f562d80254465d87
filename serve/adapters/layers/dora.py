"""The DoRA arithmetic: a linear layer whose rows have a learned length m and a low-rank change of direction.

Liu et al. 2024, eq. 5: W' = m · (W + s·BA) / ‖W + s·BA‖, the norm taken over each output row and held constant in
the backward pass (§4.3). Parameter names are mlx-lm's (`lora_a`, `lora_b`, `m` [O]); the maths is PEFT's.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from serve.adapters.layers.lora import LoRALinear, fused_linear
from serve.model.weights import QUANTIZED, dense_weight, linear_shape, project, squared_row_norms


def adapted_norms(
    linear: nn.Module, squared: mx.array, lora_a: mx.array, lora_b: mx.array, scale: float
) -> mx.array:
    """‖W + s·BA‖ of every output row, [O] float32, without making W + s·BA, and without unpacking W.

    squared  [O]  ‖W‖² of each row
    The square is multiplied out: ‖w + s·bA‖² = ‖w‖² + 2s·b·(A w) + s²·b (A Aᵀ) bᵀ for a row w of W and b of B;
    A w, for all rows at once, is one product of R rows with the packed W. A zero row counts as length 1.
    """
    a, b = lora_a.astype(mx.float32), lora_b.astype(mx.float32)  # [D, R], [R, O]
    dtype = mx.float32 if isinstance(linear, QUANTIZED) else linear.weight.dtype
    crossed = project(linear, a.T.astype(dtype)).astype(mx.float32)  # [R, O]
    total = squared + (b * (2 * scale * crossed + scale * scale * ((a.T @ a) @ b))).sum(axis=0)
    # Rounding may leave −1e-9 of a row that the update cancels.
    return mx.where(total > 0, mx.sqrt(mx.maximum(total, 0)), 1)


class DoRALinear(LoRALinear):
    """A frozen linear layer with a trainable direction (lora_a, lora_b) and length (m) of its output rows."""

    def __init__(
        self,
        linear: nn.Module,
        lora_a: mx.array,
        lora_b: mx.array,
        m: mx.array,
        scale: float,
        dropout: float,
        squared: mx.array | None = None,
    ) -> None:
        """`squared` [O]: ‖W‖² of each row, measured here if not given."""
        super().__init__(linear, lora_a, lora_b, scale, dropout)
        self.m = m
        self._squared = squared_row_norms(linear) if squared is None else squared

    @classmethod
    def from_base(
        cls,
        linear: nn.Module,
        *,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        key: mx.array | None = None,
        squared: mx.array | None = None,
    ) -> DoRALinear:
        """As LoRA's, with m the rows' own lengths, so the layer starts unchanged."""
        inputs, outputs = linear_shape(linear)
        bound = 1 / math.sqrt(inputs)
        lora_a = mx.random.uniform(low=-bound, high=bound, shape=(inputs, rank), key=key)
        squared = squared_row_norms(linear) if squared is None else squared
        return cls(linear, lora_a, mx.zeros((rank, outputs)), mx.sqrt(squared), scale, dropout, squared)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., D] → [..., O].

        With dropout the change of length acts on the dropped input, as PEFT's DoraLinearLayer has it.
        """
        if not self.is_on:
            return self.linear(x)
        dropped = self.dropout(x)
        update = (self.scale * ((dropped @ self.lora_a) @ self.lora_b)).astype(x.dtype)
        gain = (self.gain() - 1).astype(x.dtype)  # the difference to 1 keeps its digits in half precision
        y = project(self.linear, x)
        inner = y if dropped is x else project(self.linear, dropped)
        out = y + update + gain * (inner + update)
        return out + self.linear.bias if "bias" in self.linear else out

    def gain(self) -> mx.array:
        """m / ‖W + s·BA‖, [O] float32; the gradient reaches m alone."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        return self.m / mx.stop_gradient(adapted_norms(self.linear, self._squared, a, b, self.scale))

    def tensors(self) -> dict[str, mx.array]:
        """What an adapter folder holds of this layer."""
        return {**super().tensors(), "m": self.m}

    def fuse(self) -> nn.Linear:
        """One plain linear layer, in full precision. The bias is not scaled."""
        weight = dense_weight(self.linear)
        turned = weight.astype(mx.float32) + self.delta()
        return fused_linear(self.linear, self.gain()[:, None] * turned, weight.dtype)
