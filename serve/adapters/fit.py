"""Does an adapter fit a network? Tensors in; out comes one update a module, or one error with every problem."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from serve.adapters.dora import adapted_norms
from serve.adapters.manifest import AdapterConfig, TensorSpec
from serve.adapters.paths import with_own_names
from serve.errors import AdapterError
from serve.model.network import Network
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
class Size:
    """What an update takes in the bank."""

    rank: int
    """0 of one that is dense."""
    has_gain: bool
    is_dense: bool = False
    """It is a whole weight's difference."""
    has_bias: bool = False


@dataclass(frozen=True)
class LowRank:
    """The update of one module, float32.

    a     [D, R], of experts [E, D, R]; None: the identity, and b [D, O] is the whole difference of the weight
    b     [R, O], of experts [E, R, O], with the scale folded in
    gain  [O]  DoRA's m / ‖W + s·BA‖ − 1, by which the updated output is lengthened; None: not at all, as where a is
    bias  [O]  added last, whatever the gain; None: nothing, as of experts
    """

    a: mx.array | None
    b: mx.array
    gain: mx.array | None = None
    bias: mx.array | None = None

    @property
    def size(self) -> Size:
        """What it takes in the bank."""
        rank = 0 if self.a is None else self.a.shape[-1]
        return Size(rank, self.gain is not None, self.a is None, self.bias is not None)

    def arrays(self) -> dict[str, mx.array]:
        """What there is, by the name of the tensor that it was made of."""
        b = "lora_b" if self.a is not None else "weight"
        made = {"lora_a": self.a, b: self.b, "m": self.gain, "bias": self.bias}
        return {name: array for name, array in made.items() if array is not None}


def check_fit(
    name: str,
    specs: Mapping[str, TensorSpec],
    config: AdapterConfig,
    network: Network,
    *,
    max_rank: int,
) -> dict[str, Size]:
    """Check names, shapes and dtypes, before any of the tensors is read.

    Names may have other prefixes than the model's (see `paths`). Returns module path → Size, by the model's own
    paths. Raises AdapterError naming each tensor, what was found and what would fit.
    """
    if config.fine_tune_type == "full":
        raise AdapterError(
            f"adapter {name!r} is a {config.fine_tune_type} fine-tune: it replaces the base's weights, so it "
            f"cannot share a batch with them; serve its exported folder as a model instead"
        )
    modules = _modules(network)
    problems: list[str] = []
    sizes: dict[str, Size] = {}
    by_path: dict[str, dict[str, TensorSpec]] = {}
    for key, spec in with_own_names(specs, network).items():
        path, _, part = key.rpartition(".")
        by_path.setdefault(path, {})[part] = spec
    for path, parts in sorted(by_path.items()):
        before = len(problems)
        _check_parts(path, parts, modules, config, problems)
        if len(problems) == before:
            sizes[path] = _check_shapes(path, parts, modules[path], config, max_rank, problems)
    if problems:
        raise _unfit(name, problems, config)
    return sizes


def fit(
    name: str,
    tensors: Mapping[str, mx.array],
    config: AdapterConfig,
    network: Network,
    *,
    squared_norms: dict[str, mx.array] | None = None,
) -> dict[str, LowRank]:
    """The updates of tensors that passed `check_fit`, before anything of the running server is touched.

    squared_norms  by module path, the base's ‖W‖² that DoRA needs; filled here, and used again by later calls
    Returns module path → LowRank. Raises AdapterError naming each tensor that is not finite: as stored, or with the
    scale folded in, or in the dtype that the network computes in.
    """
    modules, dtype = _modules(network), network.parameters_dtype()
    tensors = with_own_names(tensors, network)
    norms = {} if squared_norms is None else squared_norms
    problems: list[str] = []
    updates: dict[str, LowRank] = {}
    for path in sorted({key.rpartition(".")[0] for key in tensors}):
        parts = {part: tensors[f"{path}.{part}"] for part in PARTS[config.fine_tune_type]}
        broken = [part for part, value in parts.items() if not _is_finite(value)]
        problems += [f"{path}.{part} holds NaN or infinite values" for part in broken]
        if not broken:
            updates[path] = _update(path, parts, modules[path], config, dtype, norms, problems)
    if problems:
        raise _unfit(name, problems, config)
    # An array is evaluated on the thread that made it: MLX's streams are per thread.
    mx.eval([list(update.arrays().values()) for update in updates.values()])
    return updates


def _modules(network: Network) -> dict[str, nn.Module]:
    return {**linear_modules(network.module), **expert_modules(network.module)}


def _unfit(name: str, problems: list[str], config: AdapterConfig) -> AdapterError:
    shown = problems[:MAX_PROBLEMS_SHOWN]
    if len(problems) > len(shown):
        shown.append(f"… and {len(problems) - len(shown)} more")
    if config.lineage is not None:
        shown.append(f"its manifest says it was trained on {config.lineage.base_model}")
    return AdapterError("\n  ".join([f"adapter {name!r} does not fit the base model:", *shown]))


def _check_parts(
    path: str,
    parts: Mapping[str, TensorSpec],
    modules: Mapping[str, nn.Module],
    config: AdapterConfig,
    problems: list[str],
) -> None:
    """Are these the tensors of a module that there is?"""
    kind = config.fine_tune_type
    unknown = sorted(set(parts) - set(PARTS[kind]))
    missing = sorted(set(PARTS[kind]) - set(parts))
    if unknown:
        problems.append(f"{path}: has {', '.join(unknown)}; a {kind} adapter has {', '.join(PARTS[kind])}")
    elif path not in modules:
        problems.append(f"{path}: the model has no linear layer of that name")
    elif missing:
        problems.append(f"{path}: {', '.join(missing)} is missing")
    elif kind == "dora" and isinstance(modules[path], EXPERTS):
        problems.append(f"{path}: holds MoE experts, which DoRA has no form for")


def _check_shapes(
    path: str,
    parts: Mapping[str, TensorSpec],
    module: nn.Module,
    config: AdapterConfig,
    max_rank: int,
    problems: list[str],
) -> Size:
    a, b = parts["lora_a"].shape, parts["lora_b"].shape
    inputs, outputs = linear_shape(module)
    wanted: dict[str, tuple[int, ...]]
    if isinstance(module, EXPERTS):
        experts = module.weight.shape[0]
        rank = a[1] if len(a) == 3 else (b[2] if len(b) == 3 else 0)
        wanted = {"lora_a": (experts, rank, inputs), "lora_b": (experts, outputs, rank)}
    else:
        rank = a[1] if len(a) == 2 else (b[0] if len(b) == 2 else 0)
        wanted = {"lora_a": (inputs, rank), "lora_b": (rank, outputs), "m": (outputs,)}
    before = len(problems)
    for part, spec in parts.items():
        if spec.shape != wanted[part]:
            needed = ", ".join(str(size) for size in wanted[part])
            problems.append(f"{path}.{part} is {spec.shape}, the model needs ({needed})")
        if not spec.is_floating:
            problems.append(f"{path}.{part} holds {spec.dtype}, floating-point values were expected")
    if rank > max_rank:
        problems.append(f"{path} has rank {rank}, this server takes up to {max_rank}")
    elif len(problems) == before and rank != config.rank_of(path):
        problems.append(f"{path} has rank {rank}, its adapter_config.json says {config.rank_of(path)}")
    return Size(rank, "m" in parts)


def _is_finite(value: mx.array) -> bool:
    return bool(mx.all(mx.isfinite(value)))


def _update(
    path: str,
    parts: Mapping[str, mx.array],
    module: nn.Module,
    config: AdapterConfig,
    dtype: mx.Dtype,
    norms: dict[str, mx.array],
    problems: list[str],
) -> LowRank:
    a, b = (parts[part].astype(mx.float32) for part in ("lora_a", "lora_b"))
    if isinstance(module, EXPERTS):
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    gain, scale = None, config.scale_of(path)
    if "m" in parts:
        if path not in norms:
            norms[path] = squared_row_norms(module)
        adapted = adapted_norms(module, norms[path], a, b, scale)
        gain = parts["m"].astype(mx.float32) / adapted - 1
        if not _is_finite(adapted):
            problems.append(f"{path}: the lengths of its updated rows overflow float32")
    b = b * scale
    if config.init_lora_weights != "default" and dtype != mx.float32 and _is_finite(a) and _is_finite(b):
        a, b = balanced(a, b)
    update = LowRank(a, b, gain)
    for part, value in update.arrays().items():
        if not _is_finite(value.astype(dtype)):
            scaled = f", times its scale of {scale:g}," if part == "lora_b" else ""
            name = str(dtype).rpartition(".")[2]
            problems.append(
                f"{path}.{part}{scaled} has values that {name}, which the model computes in, cannot hold"
            )
    return update


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
