"""Does an adapter fit a network? Tensors in; out comes one update a module, or one error with every problem."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from serve.adapters.dora import adapted_norms
from serve.adapters.manifest import AdapterConfig
from serve.errors import AdapterError
from serve.model.network import TextNetwork
from serve.model.weights import (
    EXPERTS,
    expert_modules,
    linear_modules,
    linear_shape,
    squared_row_norms,
)

MAX_PROBLEMS_SHOWN = 12
PARTS = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m")}


@dataclass(frozen=True)
class LowRank:
    """The update of one module, float32.

    a     [D, R], of experts [E, D, R]
    b     [R, O], of experts [E, R, O], with the scale folded in
    gain  [O]  DoRA's m / ‖W + s·BA‖ − 1, by which the updated output is lengthened; None: not at all
    """

    a: mx.array
    b: mx.array
    gain: mx.array | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


def fit(
    name: str,
    tensors: dict[str, mx.array],
    config: AdapterConfig,
    network: TextNetwork,
    *,
    max_rank: int,
    squared_norms: dict[str, mx.array] | None = None,
) -> dict[str, LowRank]:
    """Check every tensor against the network before anything of the running server is touched.

    squared_norms  by module path, the base's ‖W‖² that DoRA needs; filled here, and used again by later calls
    Returns module path → LowRank. Raises AdapterError naming each tensor, what was found and what would fit.
    """
    if config.fine_tune_type == "full":
        raise AdapterError(
            f"adapter {name!r} is a {config.fine_tune_type} fine-tune: it replaces the base's weights, so it "
            f"cannot share a batch with them; serve its exported folder as a model instead"
        )
    modules = {**linear_modules(network.module), **expert_modules(network.module)}
    norms = {} if squared_norms is None else squared_norms
    problems: list[str] = []
    updates: dict[str, LowRank] = {}
    for path in sorted({key.rpartition(".")[0] for key in tensors}):
        parts = _parts_of(path, tensors, modules, config, max_rank, problems)
        if parts is not None and not problems:
            updates[path] = _update(path, parts, modules[path], config, network.parameters_dtype(), norms)
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown)} more")
        if config.lineage is not None:
            shown.append(f"its manifest says it was trained on {config.lineage.base_model}")
        raise AdapterError("\n  ".join([f"adapter {name!r} does not fit the base model:", *shown]))
    # An array is evaluated on the thread that made it: MLX's streams are per thread.
    mx.eval(
        [
            [part for part in (update.a, update.b, update.gain) if part is not None]
            for update in updates.values()
        ]
    )
    return updates


def _parts_of(
    path: str,
    tensors: dict[str, mx.array],
    modules: dict[str, nn.Module],
    config: AdapterConfig,
    max_rank: int,
    problems: list[str],
) -> dict[str, mx.array] | None:
    """One module's tensors, by their last name; None after adding to `problems`."""
    kind = config.fine_tune_type
    parts = {
        key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == path
    }
    unknown = sorted(set(parts) - set(PARTS[kind]))
    if unknown:
        problems.append(f"{path}: has {', '.join(unknown)}; a {kind} adapter has {', '.join(PARTS[kind])}")
        return None
    if path not in modules:
        problems.append(f"{path}: the model has no linear layer of that name")
        return None
    missing = sorted(set(PARTS[kind]) - set(parts))
    if missing:
        problems.append(f"{path}: {', '.join(missing)} is missing")
        return None
    if kind == "dora" and isinstance(modules[path], EXPERTS):
        problems.append(f"{path}: holds MoE experts, which DoRA has no form for")
        return None
    before = len(problems)
    _check_shapes(path, parts, modules[path], max_rank, problems)
    return parts if len(problems) == before else None


def _check_shapes(
    path: str, parts: dict[str, mx.array], module: nn.Module, max_rank: int, problems: list[str]
) -> None:
    a, b = parts["lora_a"], parts["lora_b"]
    inputs, outputs = linear_shape(module)
    wanted: dict[str, tuple[int, ...]]
    if isinstance(module, EXPERTS):
        experts = module.weight.shape[0]
        rank = a.shape[1] if a.ndim == 3 else (b.shape[2] if b.ndim == 3 else 0)
        wanted = {"lora_a": (experts, rank, inputs), "lora_b": (experts, outputs, rank)}
    else:
        rank = a.shape[1] if a.ndim == 2 else (b.shape[0] if b.ndim == 2 else 0)
        wanted = {"lora_a": (inputs, rank), "lora_b": (rank, outputs), "m": (outputs,)}
    for part, value in parts.items():
        if tuple(value.shape) != wanted[part]:
            needed = ", ".join(str(size) for size in wanted[part])
            problems.append(f"{path}.{part} is {tuple(value.shape)}, the model needs ({needed})")
    if rank > max_rank:
        problems.append(f"{path} has rank {rank}, this server takes up to {max_rank}")
    for part, value in parts.items():
        if not mx.issubdtype(value.dtype, mx.floating):
            problems.append(f"{path}.{part} holds {value.dtype}, floating-point values were expected")
        elif not bool(mx.all(mx.isfinite(value))):
            problems.append(f"{path}.{part} holds NaN or infinite values")


def _update(
    path: str,
    parts: dict[str, mx.array],
    module: nn.Module,
    config: AdapterConfig,
    dtype: mx.Dtype,
    norms: dict[str, mx.array],
) -> LowRank:
    a, b = (parts[part].astype(mx.float32) for part in ("lora_a", "lora_b"))
    if isinstance(module, EXPERTS):
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    gain = None
    if "m" in parts:
        if path not in norms:
            norms[path] = squared_row_norms(module)
        gain = parts["m"].astype(mx.float32) / adapted_norms(module, norms[path], a, b, config.scale) - 1
    b = b * config.scale
    if config.init_lora_weights != "default" and dtype != mx.float32:
        a, b = balanced(a, b)
    return LowRank(a, b, gain)


def balanced(a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
    """Other factors of the same product, as large as the product itself: a [..., D, R], b [..., R, O].

    PiSSA's update is a small difference of large factors, which half precision would round away.
    """
    qa, ra = np.linalg.qr(np.array(a))
    qb, rb = np.linalg.qr(np.swapaxes(np.array(b), -1, -2))
    u, s, vt = np.linalg.svd(ra @ np.swapaxes(rb, -1, -2))
    root = np.sqrt(s)
    left = qa @ (u * root[..., None, :])
    right = (root[..., :, None] * vt) @ np.swapaxes(qb, -1, -2)
    return mx.array(left.astype(np.float32)), mx.array(right.astype(np.float32))
