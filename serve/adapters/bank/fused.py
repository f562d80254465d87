"""A layer's low-rank update of each row by its own adapter, in one kernel: MLX's CUDA backend.

There a step of few tokens waits for the host that hands kernels out, not for the GPU: a product of gathered matrices
takes three kernels and more a layer, this takes one. A block has one token: it computes its A x into shared memory,
and adds B (A x) to a part of the layer's output (the shrink and expand of Punica, Chen et al. 2023, in one).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx

from serve import device
from serve.adapters.layers.lora import LANES

MAX_TOKENS = 8
"""Rows of more tokens are multiplied as matrices: here each token reads its adapter's matrices anew."""
MAX_RANK = 512
THREADS = 256
OUTPUTS_OF_BLOCK = 4096

_HEADER = """
template <typename T> struct alignas(sizeof(T) * 8) Eight { T at[8]; };
"""

# y [N, O], x [N, D], whatever their axes; a [S, D, W], of whose columns this layer has R; b [S, R, O]
_SOURCE = """
    constexpr int threads = THREADS_;
    __shared__ float partial[threads][8];
    __shared__ float inner[MAX_RANK_];

    const int token = blockIdx.y;
    const unsigned entry = entries[token / layout[1]];  // of a token's row
    const int first_column = layout[0], num_blocks = gridDim.x;
    const int inputs = a_shape[1], width = a_shape[2], rank = b_shape[1], outputs = b_shape[2];
    const int lanes = rank / 8, slices = threads / lanes;
    y += (long long)token * outputs;
    out += (long long)token * outputs;

    if (entry != 0) {
        x += (long long)token * inputs;
        a += (long long)entry * inputs * width + first_column;
        b += (long long)entry * rank * outputs;
        const int lane = threadIdx.x % lanes, slice = threadIdx.x / lanes;
        float sum[8] = {};
        if (slice < slices) {
            #pragma unroll 4
            for (int d = slice; d < inputs; d += slices) {
                const Eight<A> row = *reinterpret_cast<const Eight<A>*>(a + (long long)d * width + lane * 8);
                const float value = static_cast<float>(x[d]);
                for (int i = 0; i < 8; ++i) sum[i] += value * static_cast<float>(row.at[i]);
            }
        }
        for (int i = 0; i < 8; ++i) partial[threadIdx.x][i] = sum[i];
        __syncthreads();
        for (int count = slices; count > 1;) {
            const int half = (count + 1) / 2;
            if (slice + half < count) {
                for (int i = 0; i < 8; ++i) partial[threadIdx.x][i] += partial[threadIdx.x + half * lanes][i];
            }
            __syncthreads();
            count = half;
        }
        if (slice == 0) for (int i = 0; i < 8; ++i) inner[lane * 8 + i] = partial[threadIdx.x][i];
        __syncthreads();
    }
    for (int o = (blockIdx.x * threads + threadIdx.x) * 8; o < outputs; o += num_blocks * threads * 8) {
        float sum[8];
        const Eight<Y> before = *reinterpret_cast<const Eight<Y>*>(y + o);
        for (int i = 0; i < 8; ++i) sum[i] = static_cast<float>(before.at[i]);
        if (entry != 0) {
            #pragma unroll 4
            for (int r = 0; r < rank; ++r) {
                const Eight<A> row = *reinterpret_cast<const Eight<A>*>(b + (long long)r * outputs + o);
                for (int i = 0; i < 8; ++i) sum[i] += inner[r] * static_cast<float>(row.at[i]);
            }
        }
        Eight<Y> after;
        for (int i = 0; i < 8; ++i) after.at[i] = static_cast<Y>(sum[i]);
        *reinterpret_cast<Eight<Y>*>(out + o) = after;
    }
""".replace("THREADS_", str(THREADS)).replace("MAX_RANK_", str(MAX_RANK))


def takes(num_tokens: int, rank: int, outputs: int) -> bool:
    """Whether rows of so many tokens are updated here, on this machine, of a layer and adapters of such shapes."""
    is_fit = rank <= MAX_RANK and rank % LANES == 0 and outputs % LANES == 0
    return is_fit and num_tokens <= MAX_TOKENS and device.backend() == "cuda"


def layout(start: int, num_tokens: int) -> mx.array:
    """What `updated` is to know of where things are: made once, since it is an array on the device."""
    return mx.array([start, num_tokens], dtype=mx.int32)


def updated(
    y: mx.array, x: mx.array, a: mx.array, b: mx.array, entries: mx.array, where: mx.array
) -> mx.array:
    """y + x A B, each row with its own entry's factors; those of entry 0 as they were. Sums are in float32.

    y        [..., O], x [..., D]: T tokens a row
    a        [S, D, W], b [S, R, O] of one dtype; A is R columns of a
    entries  [B] uint32
    where    the first of these columns, and T: see `layout`
    """
    outputs = b.shape[-1]
    num_blocks = -(-outputs // OUTPUTS_OF_BLOCK)
    (out,) = _kernel()(
        inputs=[y, x, a, b, entries, where],
        template=[("Y", y.dtype), ("X", x.dtype), ("A", a.dtype)],
        grid=(num_blocks * THREADS, y.size // outputs, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[y.shape],
        output_dtypes=[y.dtype],
    )
    assert isinstance(out, mx.array)
    return out


@cache
def _kernel() -> Any:
    """Compiled at first use of each triple of dtypes."""
    return mx.fast.cuda_kernel(
        name="lathe_low_rank",
        input_names=["y", "x", "a", "b", "entries", "layout"],
        output_names=["out"],
        header=_HEADER,
        source=_SOURCE,
    )
