"""What of a model trains: LoRA layers put in place of linear ones, or the weights themselves.

A TextNetwork goes in and is changed in place; out comes what trains, by name. Knows no data and no optimizer.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from serve.adapters.lora import LoRALinear
from serve.errors import AdapterError, ConfigError
from serve.model.network import TextNetwork

ALL_LINEAR = "all-linear"
LORA_LEAVES = ("lora_a", "lora_b")


@dataclass(frozen=True)
class Adapted:
    """What was made trainable. `keys` are relative to a layer; `num_layers` counts from the last."""

    fine_tune_type: Literal["lora", "full"]
    num_layers: int
    keys: tuple[str, ...]
    num_trainable: int
    num_parameters: int
    notes: tuple[str, ...] = ()


def add_lora(
    network: TextNetwork,
    *,
    rank: int,
    scale: float,
    dropout: float = 0.0,
    keys: Sequence[str] | str | None = None,
    num_layers: int = -1,
) -> Adapted:
    """Freeze the network and put a fresh LoRALinear over the named linear layers of its last `num_layers` blocks.

    keys        paths inside a layer (`self_attn.q_proj`); None or "all-linear": every linear layer there is
    num_layers  -1: all; more than there are: all
    LoRA weights are float32 whatever the base's dtype; LoRALinear casts the update to the activations' dtype.
    Randomness: MLX's global generator. ConfigError names keys that do not exist, or cannot be adapted.
    """
    layers = _last(network.layers, num_layers)
    linear, other = _modules_by_key(layers)
    chosen = set(linear) if keys is None or keys == ALL_LINEAR else _checked(keys, linear, other)
    notes = []
    if num_layers > len(network.layers):
        notes.append(f"num_layers {num_layers}: the model has {len(network.layers)}, all are adapted")
    skipped = sorted(key for key, reason in other.items() if "experts" in reason)
    if skipped and (keys is None or keys == ALL_LINEAR):
        notes.append(
            f"not adapted: {', '.join(skipped)} (MoE experts; the serving bank takes linear layers only)"
        )
    network.module.freeze()
    for layer in layers:
        placed = [
            (path, LoRALinear.from_base(module, rank=rank, scale=scale, dropout=dropout))
            for path, module in layer.named_modules()
            if path in chosen and isinstance(module, nn.Linear | nn.QuantizedLinear)
        ]
        if placed:
            layer.update_modules(tree_unflatten(placed))
    trainable = trainable_tensors(network)
    if not trainable:
        raise ConfigError("lora_parameters.keys: nothing to train: no linear layer was chosen")
    stray = [name for name in trainable if name.rsplit(".", 1)[-1] not in LORA_LEAVES]
    assert not stray, f"the base must stay frozen, but these train: {stray}"
    return _adapted(network, "lora", num_layers, tuple(sorted(chosen)), notes)


def train_all(network: TextNetwork, *, num_layers: int = -1) -> Adapted:
    """Make the weights themselves train: all of them (-1), or those of the last `num_layers` blocks.

    ConfigError on a quantized base: packed integers have no gradient.
    """
    quantized = [path for path, module in network.module.named_modules() if _is_quantized(module)]
    if quantized:
        raise ConfigError(
            f"fine_tune_type: full cannot train a quantized base ({quantized[0]} and {len(quantized) - 1} more are "
            f"packed integers); use fine_tune_type: lora, or a base in full precision"
        )
    if num_layers < 0:
        network.module.unfreeze()
    else:
        network.module.freeze()
        for layer in _last(network.layers, num_layers):
            layer.unfreeze()
    if not trainable_tensors(network):
        raise ConfigError(
            f"num_layers: found {num_layers}; nothing would train; expected 1 or more, or -1 for all"
        )
    return _adapted(network, "full", num_layers, (), [])


def trainable_tensors(network: TextNetwork) -> dict[str, mx.array]:
    """What an adapter folder holds: trainable tensors by their path in the mlx-lm model."""
    return dict(tree_flatten(network.module.trainable_parameters()))


def set_tensors(network: TextNetwork, tensors: dict[str, mx.array], source: str) -> None:
    """Put tensors in place of the trainable ones. AdapterError unless names and shapes are the same."""
    wanted = trainable_tensors(network)
    problems = [f"  {name}: missing" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name not in wanted:
            problems.append(f"  {name}: not a tensor that trains here")
        elif tensor.shape != wanted[name].shape:
            problems.append(
                f"  {name}: is {tuple(tensor.shape)}, the model needs {tuple(wanted[name].shape)}"
            )
    if problems:
        shown = "\n".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise AdapterError(f"{source} does not fit this run:\n{shown}")
    cast = [(name, tensor.astype(wanted[name].dtype)) for name, tensor in tensors.items()]
    network.module.load_weights(cast, strict=False)


def embedding_names(network: TextNetwork) -> frozenset[str]:
    """Parameters of embeddings and of the head: Muon leaves them to AdamW."""
    named = network.module.named_modules()
    paths = [
        p for p, m in named if isinstance(m, nn.Embedding) or p.rsplit(".", 1)[-1] in ("lm_head", "output")
    ]
    return frozenset(f"{path}.weight" for path in paths)


@contextmanager
def checkpointed_layers(network: TextNetwork) -> Iterator[None]:
    """Inside, each layer recomputes its activations in the backward pass (gradient checkpointing).

    Each layer *instance* gets a subclass of its class; the class itself is never touched, so other models in the
    process, and serving, keep theirs. Outside, every layer has its own class again.
    """
    originals = [(layer, type(layer)) for layer in network.layers]
    subclasses: dict[type, type] = {}
    try:
        for layer, kind in originals:
            if kind not in subclasses:
                subclasses[kind] = type(kind.__name__, (kind,), {"__call__": _recomputing(kind.__call__)})
            layer.__class__ = subclasses[kind]
        yield
    finally:
        for layer, kind in originals:
            layer.__class__ = kind


def _recomputing(call: Callable) -> Callable:
    def recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def inner(parameters: dict, *args: Any, **kwargs: Any) -> Any:
            layer.update(parameters)
            return call(layer, *args, **kwargs)

        return mx.checkpoint(inner)(layer.trainable_parameters(), *args, **kwargs)

    return recomputed


def _last(layers: Sequence[nn.Module], num_layers: int) -> list[nn.Module]:
    return list(layers) if num_layers < 0 else list(layers)[max(len(layers) - num_layers, 0) :]


def _modules_by_key(layers: Sequence[nn.Module]) -> tuple[set[str], dict[str, str]]:
    """(keys of linear layers, keys of weighted modules that cannot be adapted → why)."""
    linear: set[str] = set()
    other: dict[str, str] = {}
    for layer in layers:
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear | nn.QuantizedLinear):
                linear.add(path)
            elif isinstance(module, SwitchLinear | QuantizedSwitchLinear):
                other[path] = "holds MoE experts; the serving bank takes linear layers only, for now"
            elif path and "weight" in module:
                other[path] = f"is a {type(module).__name__}; LoRA adapts linear layers"
    return linear, other


def _checked(keys: Sequence[str] | str, linear: set[str], other: dict[str, str]) -> set[str]:
    names = [keys] if isinstance(keys, str) else list(keys)
    problems = []
    for name in names:
        if name in linear:
            continue
        if name in other:
            problems.append(f"  {name} {other[name]}")
            continue
        near = (
            difflib.get_close_matches(name, linear, n=1) or [k for k in linear if k.endswith(f".{name}")][:1]
        )
        hint = f"; did you mean {near[0]}?" if near else ""
        problems.append(f"  {name}: no layer has it{hint}")
    if not names:
        problems.append("  the list is empty: nothing would train")
    if problems:
        listing = ", ".join(sorted(linear))
        raise ConfigError("lora_parameters.keys:\n" + "\n".join(problems) + f"\n  the layers have: {listing}")
    return set(names)


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding | QuantizedSwitchLinear)


def _adapted(
    network: TextNetwork,
    kind: Literal["lora", "full"],
    num_layers: int,
    keys: tuple[str, ...],
    notes: list[str],
) -> Adapted:
    everything = sum(tensor.size for _, tensor in tree_flatten(network.module.parameters()))
    trains = sum(tensor.size for tensor in trainable_tensors(network).values())
    return Adapted(kind, num_layers, keys, trains, everything, tuple(notes))
