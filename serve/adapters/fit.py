"""Does an adapter fit a network? Tensors in; out comes one (A, B) pair a module, or one error with every problem."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from serve.adapters.lora import linear_shape
from serve.adapters.manifest import AdapterConfig
from serve.errors import AdapterError
from serve.model.network import TextNetwork

MAX_PROBLEMS_SHOWN = 12


@dataclass(frozen=True)
class LowRank:
    """The update of one module: a [D, R], b [R, O] with the scale folded in, float32."""

    a: mx.array
    b: mx.array


def fit(
    name: str, tensors: dict[str, mx.array], config: AdapterConfig, network: TextNetwork, *, max_rank: int
) -> dict[str, LowRank]:
    """Check every tensor against the network before anything of the running server is touched.

    Returns module path → LowRank. Raises AdapterError naming each tensor, what was found and what would fit.
    """
    if config.fine_tune_type != "lora":
        raise AdapterError(
            f"adapter {name!r} is a {config.fine_tune_type} fine-tune: it replaces the base's weights, so it "
            f"cannot share a batch with them; serve its exported folder as a model instead"
        )
    modules = linear_modules(network.module)
    problems: list[str] = []
    updates: dict[str, LowRank] = {}
    for path in sorted({key.rpartition(".")[0] for key in tensors}):
        found = _fit_module(path, tensors, modules, max_rank, problems)
        if found is not None:
            updates[path] = LowRank(found[0], found[1] * config.scale)
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown)} more")
        if config.lineage is not None:
            shown.append(f"its manifest says it was trained on {config.lineage.base_model}")
        raise AdapterError("\n  ".join([f"adapter {name!r} does not fit the base model:", *shown]))
    # An array is evaluated on the thread that made it: MLX's streams are per thread.
    mx.eval([(update.a, update.b) for update in updates.values()])
    return updates


def linear_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer an adapter may touch, by its path in the base (a wrapper's own `.linear` is not shown)."""
    found: dict[str, nn.Module] = {}
    for path, child in module.named_modules():
        if isinstance(child, (nn.Linear, nn.QuantizedLinear)):
            found[path.removesuffix(".linear")] = child
    return found


def _fit_module(
    path: str,
    tensors: dict[str, mx.array],
    modules: dict[str, nn.Module],
    max_rank: int,
    problems: list[str],
) -> tuple[mx.array, mx.array] | None:
    parts = {
        key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == path
    }
    unknown = sorted(set(parts) - {"lora_a", "lora_b"})
    if unknown:
        problems.append(f"{path}: has {', '.join(unknown)}; this version serves lora_a and lora_b")
        return None
    if path not in modules:
        problems.append(f"{path}: the model has no linear layer of that name")
        return None
    missing = sorted({"lora_a", "lora_b"} - set(parts))
    if missing:
        problems.append(f"{path}: {', '.join(missing)} is missing")
        return None
    return _check_shapes(path, parts, linear_shape(modules[path]), max_rank, problems)


def _check_shapes(
    path: str, parts: dict[str, mx.array], shape: tuple[int, int], max_rank: int, problems: list[str]
) -> tuple[mx.array, mx.array] | None:
    a, b = parts["lora_a"], parts["lora_b"]
    inputs, outputs = shape
    rank = a.shape[1] if a.ndim == 2 else (b.shape[0] if b.ndim == 2 else 0)
    before = len(problems)
    if tuple(a.shape) != (inputs, rank):
        problems.append(f"{path}.lora_a is {tuple(a.shape)}, the model needs ({inputs}, {rank})")
    if tuple(b.shape) != (rank, outputs):
        problems.append(f"{path}.lora_b is {tuple(b.shape)}, the model needs ({rank}, {outputs})")
    if rank > max_rank:
        problems.append(f"{path} has rank {rank}, this server takes up to {max_rank}")
    for part, value in (("lora_a", a), ("lora_b", b)):
        if not mx.issubdtype(value.dtype, mx.floating):
            problems.append(f"{path}.{part} holds {value.dtype}, floating-point values were expected")
        elif not bool(mx.all(mx.isfinite(value))):
            problems.append(f"{path}.{part} holds NaN or infinite values")
    if len(problems) > before:
        return None
    return a.astype(mx.float32), b.astype(mx.float32)
