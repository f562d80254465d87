"""The LoRA arithmetic, once: the training layer, and the same update from a bank of adapters.

Hu et al. 2021, eq. 3: h = W x + scale · B A x. Parameter names and layouts are mlx-lm's (`lora_a` [D, R],
`lora_b` [R, O]), so files interchange.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from serve import device
from serve.model.weights import dense_weight, linear_shape

LANES = 8
"""MLX's CUDA kernel of gather_mm reads eight numbers at once along the last axis: where a row is no multiple of them,
it reads at addresses that no GPU can read eight from, and the whole process has lost its GPU."""
MAX_WIDE_TOKENS = 64
"""That kernel takes more tokens an entry than these in half precision only: in float32 it asks for more shared memory
than MLX has set it up for, and is not started."""


class AdaptedLayer(nn.Module):
    """A frozen layer `linear` with a trainable low-rank update. With `is_on` false it is its base layer.

    With principal factors A₀, B₀ (PiSSA) the update is scale · (B A − B₀ A₀): the base keeps its weights, and the
    layer starts unchanged with A, B on the base's largest singular values. They are frozen, and no parameters.
    """

    is_on: bool = True
    wraps_linear = True
    RANK_AXES = (1, 0)
    """Which axis of lora_a, and of lora_b, counts the rank."""

    def __init__(
        self, linear: nn.Module, lora_a: mx.array, lora_b: mx.array, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.linear = linear
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        self.lora_a = lora_a
        self.lora_b = lora_b

    def start_from(self, lora_a: mx.array, lora_b: mx.array) -> None:
        """Begin at these principal factors (PiSSA), which are subtracted for good."""
        self.lora_a, self.lora_b = lora_a, lora_b
        self._a0, self._b0 = lora_a, lora_b

    @property
    def has_principal(self) -> bool:
        """Whether frozen principal factors are subtracted from the update."""
        return "_a0" in self

    def tensors(self) -> dict[str, mx.array]:
        """What an adapter folder holds of this layer: a plain update, of twice the rank where A₀, B₀ are subtracted.

        [A | A₀] and [B | −B₀], as PEFT converts PiSSA, so any reader of LoRA files has the right update.
        """
        if not self.has_principal:
            return {"lora_a": self.lora_a, "lora_b": self.lora_b}
        axis_a, axis_b = self.RANK_AXES
        return {
            "lora_a": mx.concatenate([self.lora_a, self._a0], axis=axis_a),
            "lora_b": mx.concatenate([self.lora_b, -self._b0], axis=axis_b),
        }

    def set_tensors(self, tensors: dict[str, mx.array]) -> None:
        """The inverse of `tensors`, exactly."""
        if not self.has_principal:
            self.update(tensors)
            return
        axis_a, axis_b = self.RANK_AXES
        self.lora_a, self._a0 = mx.split(tensors["lora_a"], 2, axis=axis_a)
        self.lora_b, principal = mx.split(tensors["lora_b"], 2, axis=axis_b)
        self._b0 = -principal


class LoRALinear(AdaptedLayer):
    """A frozen linear layer with one trainable low-rank update."""

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
        y = self.linear(x)
        return y + self.update_of(x).astype(x.dtype) if self.is_on else y

    def update_of(self, x: mx.array) -> mx.array:
        """scale · B A x, with the principal factors subtracted: [..., O]."""
        update = (self.dropout(x) @ self.lora_a) @ self.lora_b
        if self.has_principal:
            update = update - (x @ self._a0) @ self._b0
        return self.scale * update

    def delta(self) -> mx.array:
        """What is added to the weight: [O, D] float32."""
        parts = self.tensors()
        return self.scale * (parts["lora_a"].astype(mx.float32) @ parts["lora_b"].astype(mx.float32)).T

    def fuse(self) -> nn.Linear:
        """One plain linear layer, in full precision: a quantized base is dequantized, never re-quantized."""
        weight = dense_weight(self.linear)
        return fused_linear(self.linear, weight.astype(mx.float32) + self.delta(), weight.dtype)


def fused_linear(linear: nn.Module, weight: mx.array, dtype: mx.Dtype) -> nn.Linear:
    """A plain linear layer with this weight [O, D] and the bias that `linear` has."""
    fused = nn.Linear(1, 1, bias=False)
    fused.weight = weight.astype(dtype)
    if "bias" in linear:
        fused.bias = linear.bias
    return fused


def gathered(x: mx.array, factors: mx.array, lhs: mx.array, rhs: mx.array) -> mx.array:
    """Products of entries with matrices of a stack: x[lhs[i]] · factors[rhs[i]].

    x        [N, T, K]
    factors  [S, K, O]
    lhs, rhs [M] uint32. Without lhs, gather_mm would make it anew in each call: a hundred small operations a step.
    Returns [M, T, O], of float32 where MLX's CPU backend multiplies nothing else.
    """
    backend = device.backend()
    num_outputs = factors.shape[-1]
    if backend == "cpu" and not x.dtype == factors.dtype == mx.float32:
        x, factors = x.astype(mx.float32), factors.astype(mx.float32)
    if num_outputs % LANES:
        factors = whole_lanes(factors, -1)
    if backend == "cuda":
        parts = [
            mx.gather_mm(part, factors, lhs_indices=lhs, rhs_indices=rhs) for part in _parts(x, factors.dtype)
        ]
        update = mx.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]
    else:
        update = mx.gather_mm(x, factors, lhs_indices=lhs, rhs_indices=rhs)
    return update[..., :num_outputs] if num_outputs % LANES else update


def gathered_update(x: mx.array, a: mx.array, b: mx.array, **indices: Any) -> mx.array:
    """x A B, each entry with its own factors: a [N, D, R], b [N, R, O], `indices` as gather_mm takes them."""
    num_outputs = b.shape[-1]
    if device.backend() == "cpu":
        # MLX's CPU backend multiplies gathered matrices in float32 alone.
        x, a, b = (array.astype(mx.float32) for array in (x, a, b))
    a, b = whole_lanes(a, -1), whole_lanes(b, -2, -1)
    parts = [mx.gather_mm(mx.gather_mm(part, a, **indices), b, **indices) for part in _parts(x, a.dtype)]
    update = mx.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]
    return update if update.shape[-1] == num_outputs else update[..., :num_outputs]


def _parts(x: mx.array, dtype: mx.Dtype) -> list[mx.array]:
    """`x` cut along its tokens, into what one product with a factor of this dtype can take.

    MLX's CUDA kernel takes it that each entry begins where the last one ends. In a slice of tokens it does not, and
    the kernel would read other rows' tokens: every part is whole in memory.
    """
    if device.backend() != "cuda":
        return [x]
    num_tokens, is_wide = x.shape[-2], mx.float32 in (x.dtype, dtype)
    cuts = list(range(MAX_WIDE_TOKENS, num_tokens, MAX_WIDE_TOKENS)) if is_wide else []
    return [mx.contiguous(part) for part in (mx.split(x, cuts, axis=-2) if cuts else [x])]


def whole_lanes(array: mx.array, *axes: int) -> mx.array:
    """`array` with zeros up to a multiple of LANES on these axes: itself where there is one already."""
    widths = [(0, 0)] * array.ndim
    for axis in axes:
        widths[axis] = (0, -array.shape[axis] % LANES)
    return mx.pad(array, widths) if any(more for _, more in widths) else array
