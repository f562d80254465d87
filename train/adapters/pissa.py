"""PiSSA: begin an adapter on the largest singular values of the weight it stands beside, in place of zero.

Meng et al. 2024, eq. 2–4: W = U S Vᵀ, A = √S_R V_Rᵀ, B = U_R √S_R, the rest of W frozen. Here the base keeps all of
W and the layer subtracts frozen copies of A and B, which is the same sum, so one base serves every adapter.
"""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np

from serve.adapters.layers.lora import AdaptedLayer
from serve.errors import ConfigError
from serve.model.weights import dense_weight

DEFAULT, PISSA = "default", "pissa"
_NITER = re.compile(r"pissa_niter_([1-9]\d*)")


def iterations_of(init: str) -> int | None:
    """How many power iterations `pissa_niter_N` asks for; None for the full decomposition, `pissa`."""
    match = _NITER.fullmatch(init)
    return int(match[1]) if match else None


def is_pissa(init: str) -> bool:
    """Whether `init_lora_weights` asks for PiSSA, in either form."""
    return init == PISSA or _NITER.fullmatch(init) is not None


def start_on_principal(path: str, layer: AdaptedLayer, init: str) -> None:
    """Put A, B of an adapted layer on the R largest singular values of its weight, which is dequantized once.

    ConfigError when the rank is more than the weight has.
    """
    weight = np.array(dense_weight(layer.linear).astype(mx.float32))  # [..., O, D]
    axis_a, _ = layer.RANK_AXES
    rank = layer.lora_a.shape[axis_a]
    if rank > min(weight.shape[-2:]):
        raise ConfigError(
            f"lora_parameters.rank: found {rank}; init_lora_weights: {init} needs at most {min(weight.shape[-2:])}, "
            f"the singular values of {path}"
        )
    niter = iterations_of(init)
    u, s, vt = _largest(weight, rank, niter) if niter else np.linalg.svd(weight, full_matrices=False)
    root = np.sqrt(s[..., :rank] / layer.scale)  # the layer multiplies by its scale, so A and B hold the rest
    down = root[..., :, None] * vt[..., :rank, :]  # [..., R, D]
    up = u[..., :, :rank] * root[..., None, :]  # [..., O, R]
    if axis_a == 1 and weight.ndim == 2:
        down, up = np.swapaxes(down, -1, -2), np.swapaxes(up, -1, -2)
    layer.start_from(mx.array(np.ascontiguousarray(down)), mx.array(np.ascontiguousarray(up)))
    mx.eval(layer.lora_a, layer.lora_b)


def _largest(weight: np.ndarray, rank: int, niter: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values by power iteration from a random start (Halko et al. 2011, algorithm 4.4)."""
    transposed = np.swapaxes(weight, -1, -2)
    start = np.array(mx.random.normal((*weight.shape[:-2], weight.shape[-1], rank)))
    basis = np.linalg.qr(weight @ start)[0]
    for _ in range(niter):
        basis = np.linalg.qr(weight @ np.linalg.qr(transposed @ basis)[0])[0]  # [..., O, R]
    u, s, vt = np.linalg.svd(np.swapaxes(basis, -1, -2) @ weight, full_matrices=False)
    return basis @ u, s, vt
