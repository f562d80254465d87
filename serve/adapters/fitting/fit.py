"""Does an adapter fit a network? Tensors in; out comes one update a module, or one error with every problem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from serve.adapters.fitting.own import own_layout
from serve.adapters.fitting.paths import adaptable_modules, module_at, unwrapped
from serve.adapters.fitting.update import LowRank, Size
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.header import FLOATS, TensorSpec
from serve.adapters.formats.tensors import without_containers
from serve.adapters.layers.dora import adapted_norms
from serve.beside import evaluate, pieces
from serve.errors import AdapterError
from serve.model.network import Network
from serve.model.weights import EXPERTS, QUANTIZED, dense_weight, linear_shape, squared_row_norms

MAX_PROBLEMS_SHOWN = 12
PARTS = {"lora": ("lora_a", "lora_b"), "dora": ("lora_a", "lora_b", "m")}
"""What every update of an adapter of that kind has."""
BESIDE = {"lora": ("weight", "base_weight", "bias", "lora_bias"), "dora": ("weight", "base_weight", "bias")}
"""What a linear layer's may have beside it, or instead: see `files`."""

EXPECTED = ", ".join(FLOATS)
LARGEST_UPDATE = 1e15
"""Norms square what they are given, in float32: what is larger than that makes infinities of any text."""
PACKING_SLACK = 1.2
"""How much farther, in squares, a copy of packed weights may be from them than packing it anew would take it."""

T = TypeVar("T")


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
    own, config = own_layout(specs, config, network)
    modules = adaptable_modules(network)
    problems: list[str] = []
    sizes: dict[str, Size] = {}
    for path, parts in sorted(_by_path(own).items()):
        if _are_embeddings(path, network) and set(parts) <= {"weight", "base_weight"}:
            continue  # a copy of the base's, or not: its values tell
        before = len(problems)
        _check_parts(path, parts, modules, config, problems)
        if len(problems) == before:
            sizes[path] = _check_shapes(path, parts, modules[path], config, max_rank, problems)
    if not sizes and not problems:
        problems.append("it holds no update of any layer")
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
    modules, dtype = adaptable_modules(network), network.parameters_dtype()
    own, config = own_layout(tensors, config, network)
    norms = {} if squared_norms is None else squared_norms
    problems: list[str] = []
    updates: dict[str, LowRank] = {}
    finite = dict(zip(own, _are_finite(own.values()), strict=True))
    for path, parts in sorted(_by_path(own).items()):
        broken = [part for part in parts if not finite[f"{path}.{part}"]]
        problems += [f"{path}.{part} holds NaN or infinite values" for part in broken]
        if broken:
            continue
        if path not in modules:
            _check_embeddings(path, parts, network, problems)
            continue
        update = _update(path, parts, modules[path], config, norms, problems)
        if update is not None:
            updates[path] = _in_range(update, config, dtype)
    scaled = {path: f"times its scale of {config.scale_of(path):g}" for path in updates}
    check_ranges(updates, scaled, dtype, problems)
    if problems:
        raise _unfit(name, problems, config)
    # An array is evaluated on the thread that made it: MLX's streams are per thread.
    evaluate([update.arrays() for update in updates.values()])
    return updates


def _by_path(named: Mapping[str, T]) -> dict[str, dict[str, T]]:
    by_path: dict[str, dict[str, T]] = {}
    for name, value in named.items():
        path, _, part = name.rpartition(".")
        by_path.setdefault(path, {})[part] = value
    return by_path


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
    is_update = not set(parts) <= set(BESIDE[kind]) or "lora_bias" in parts
    unknown = sorted(set(parts) - {*PARTS[kind], *BESIDE[kind]})
    missing = sorted(set(PARTS[kind]) - set(parts)) if is_update else []
    if unknown:
        problems.append(f"{path}: has {', '.join(unknown)}; a {kind} adapter has {', '.join(PARTS[kind])}")
    elif path not in modules:
        trained = "" if is_update else ", and weights of other layers are shared by all adapters"
        problems.append(f"{path}: the model has no linear layer of that name{trained}")
    elif missing:
        problems.append(f"{path}: {', '.join(missing)} is missing")
    elif isinstance(modules[path], EXPERTS):
        beside = sorted(set(parts) - set(PARTS[kind]))
        if kind == "dora":
            problems.append(f"{path}: holds MoE experts, which DoRA has no form for")
        elif beside:
            problems.append(
                f"{path}: holds MoE experts, of which lora_a and lora_b are read, and has {beside[0]}"
            )


def _check_shapes(
    path: str,
    parts: Mapping[str, TensorSpec],
    module: nn.Module,
    config: AdapterConfig,
    max_rank: int,
    problems: list[str],
) -> Size:
    a, b = (parts[part].shape if part in parts else () for part in ("lora_a", "lora_b"))
    inputs, outputs = linear_shape(module)
    wanted: dict[str, tuple[int, ...]]
    if isinstance(module, EXPERTS):
        experts = module.weight.shape[0]
        rank = a[1] if len(a) == 3 else (b[2] if len(b) == 3 else 0)
        wanted = {"lora_a": (experts, rank, inputs), "lora_b": (experts, outputs, rank)}
    else:
        rank = a[1] if len(a) == 2 else (b[0] if len(b) == 2 else 0)
        wanted = {"lora_a": (inputs, rank), "lora_b": (rank, outputs)}
        wanted |= dict.fromkeys(("weight", "base_weight"), (outputs, inputs))
        wanted |= dict.fromkeys(("m", "bias", "lora_bias"), (outputs,))
    before = len(problems)
    for part, spec in parts.items():
        if spec.shape != wanted[part]:
            needed = ", ".join(str(size) for size in wanted[part])
            problems.append(f"{path}.{part} is {spec.shape}, the model needs ({needed})")
        if not spec.is_floating:
            problems.append(
                f"{path}.{part} holds {spec.dtype}, floating-point values were expected: {EXPECTED}"
            )
    if rank > max_rank:
        problems.append(f"{path} has rank {rank}, this server takes up to {max_rank}")
    elif len(problems) == before and "lora_a" in parts and rank != config.rank_of(path):
        problems.append(f"{path} has rank {rank}, its adapter_config.json says {config.rank_of(path)}")
    is_dense = "weight" in parts
    has_bias = "bias" in parts or "lora_bias" in parts
    if not is_dense and "lora_a" not in parts:
        rank = 1  # a bias alone
    return Size(0 if is_dense else rank, "m" in parts, is_dense, has_bias)


def _is_finite(value: mx.array) -> bool:
    return all(_are_finite([value]))


def _are_finite(values: Iterable[mx.array]) -> list[bool]:
    """Of each. 0 · x is 0 of every number and of nothing else, and is found ten times as fast as by isfinite."""
    return [total == 0 for total in _numbers(values, lambda value: mx.sum(value * 0))]


def _numbers(values: Iterable[mx.array], number_of: Callable[[mx.array], mx.array]) -> list[float]:
    """A number of each, several evaluated together: one evaluation takes longer than to look at a small tensor."""
    found: list[float] = []
    for piece in pieces(values):
        found += cast(list[float], mx.stack([number_of(value) for value in piece]).tolist())
    return found


def _update(
    path: str,
    parts: Mapping[str, mx.array],
    module: nn.Module,
    config: AdapterConfig,
    norms: dict[str, mx.array],
    problems: list[str],
) -> LowRank | None:
    """What these tensors change; None: nothing."""
    scale = config.scale_of(path)
    wide = {part: value.astype(mx.float32) for part, value in parts.items()}
    whole = _difference(parts, module)
    bias = _bias(wide, module, scale)
    if "lora_a" not in wide:
        if whole is not None:
            return LowRank(None, whole, bias=bias)
        inputs, outputs = linear_shape(module)
        return None if bias is None else LowRank(mx.zeros((inputs, 1)), mx.zeros((1, outputs)), bias=bias)
    a, b = wide["lora_a"], wide["lora_b"]
    if isinstance(module, EXPERTS):
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    if whole is not None:
        if "m" in wide:
            problems.append(
                f"{path}: was trained over other weights than the base's, and DoRA over those has no form"
            )
        return LowRank(None, whole + scale * (a @ b), bias=bias)
    gain = None
    if "m" in wide:
        if path not in norms:
            norms[path] = squared_row_norms(module)
        adapted = adapted_norms(module, norms[path], a, b, scale)
        gain = wide["m"] / adapted - 1
        if not _is_finite(adapted):
            problems.append(f"{path}: the lengths of its updated rows overflow float32")
    return LowRank(a, b * scale, gain, bias)


def _difference(parts: Mapping[str, mx.array], module: nn.Module) -> mx.array | None:
    """W' − W of a layer that comes whole, [D, O] float32; None where it comes as it is here."""
    trained, copied = parts.get("weight"), parts.get("base_weight")
    new = copied if trained is None else trained
    if new is None:
        return None
    base = dense_weight(module)
    is_same = _is_copy(new, base) or (trained is None and _is_packed_copy(new, base, module))
    return None if is_same else (new.astype(mx.float32) - base.astype(mx.float32)).T


def _is_copy(new: mx.array, base: mx.array) -> bool:
    """Whether they are the same but for the dtype that one of them was saved in."""
    return bool(mx.array_equal(new.astype(base.dtype), base) or mx.array_equal(base.astype(new.dtype), new))


def _is_packed_copy(new: mx.array, base: mx.array, module: nn.Module) -> bool:
    """Whether the packed layer is no farther from `new` than packing takes it."""
    if not isinstance(module, QUANTIZED):
        return False
    how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    new = new.astype(mx.float32)
    packed = mx.dequantize(*mx.quantize(new, **how), **how)
    found, bound = ((new - each.astype(mx.float32)).square().sum() for each in (base, packed))
    return bool(found <= PACKING_SLACK * bound)


def _bias(wide: Mapping[str, mx.array], module: nn.Module, scale: float) -> mx.array | None:
    """What is added to the outputs beside the base's own bias; None: nothing."""
    if not wide.keys() & {"bias", "lora_bias"}:
        return None
    total = mx.zeros(linear_shape(module)[1])
    if "bias" in wide:
        total = wide["bias"] - (module.bias.astype(mx.float32) if "bias" in module else 0)
    if "lora_bias" in wide:
        total = total + scale * wide["lora_bias"]
    return total if bool(mx.any(total != 0)) else None


def check_ranges(
    updates: Mapping[str, LowRank], scaled: Mapping[str, str], dtype: mx.Dtype, problems: list[str]
) -> None:
    """Can the network's `dtype` hold the updates, and what they make of their inputs?

    scaled  by path, what B has been multiplied by, in words
    """
    name = str(dtype).rpartition(".")[2]
    named = {
        (path, part): value for path, update in updates.items() for part, value in update.arrays().items()
    }
    values = [value.astype(dtype) for value in named.values()]
    finite = dict(zip(named, _are_finite(values), strict=True))
    largest_of = dict(zip(named, _numbers(named.values(), lambda value: mx.abs(value).max()), strict=True))
    for path, update in updates.items():
        before = len(problems)
        for part in update.arrays():
            if not finite[path, part]:
                how = f", {scaled[path]}," if part == "lora_b" else ""
                problems.append(
                    f"{path}.{part}{how} has values that {name}, which the model computes in, cannot hold"
                )
        factor = _factor(update, {part: largest_of[path, part] for part in update.arrays()})
        if len(problems) == before and factor > LARGEST_UPDATE:
            problems.append(
                f"{path}: its update, {scaled[path]}, may be {factor:.1e} times as large as what it is "
                f"given, which no numbers after it can hold; up to {LARGEST_UPDATE:.0e} was expected"
            )


def _factor(update: LowRank, largest_of: Mapping[str, float]) -> float:
    """At least as large as what the update makes of an input of length 1; `largest_of` the numbers of each array."""
    sizes = [
        largest_of[part] * math.sqrt(array.shape[-1] * array.shape[-2])
        for part, array in update.arrays().items()
        if part in ("lora_a", "lora_b", "weight")
    ]
    gain = largest_of.get("m", 0.0)
    return max(math.prod(sizes) * (1 + gain), gain, largest_of.get("bias", 0.0))


def _in_range(update: LowRank, config: AdapterConfig, dtype: mx.Dtype) -> LowRank:
    """The same update, so that half precision does not round it away."""
    a, b = update.a, update.b
    if a is None or config.init_lora_weights == "default" or dtype == mx.float32:
        return update
    if not (_is_finite(a) and _is_finite(b)):
        return update
    a, b = balanced(a, b)
    return replace(update, a=a, b=b)


def _are_embeddings(path: str, network: Network) -> bool:
    own = network.embeddings_path
    return own is not None and without_containers(path) == without_containers(own)


def _check_embeddings(
    path: str, parts: Mapping[str, mx.array], network: Network, problems: list[str]
) -> None:
    """PEFT saves the embeddings beside an adapted head: as they are, they change nothing."""
    assert network.embeddings_path is not None, "check_fit let these pass"
    module = unwrapped(module_at(network.module, network.embeddings_path))
    base = dense_weight(module)
    for part, value in parts.items():
        is_same = value.shape == base.shape and (
            _is_copy(value, base) or _is_packed_copy(value, base, module)
        )
        if not is_same:
            problems.append(
                f"{path}.{part}: trained embeddings of shape {tuple(value.shape)}, and all adapters share those "
                f"of the base, {tuple(base.shape)}"
            )


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
