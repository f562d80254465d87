"""An adapter's tensors → layers over the network's, wherever their names say, whichever rule once chose those layers.

So an adapter of any trainer fits: mlx-lm's on the text part, mlx-vlm's, ours with towers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from serve.adapters.fitting.fit import check_fit
from serve.adapters.fitting.own import own_layout
from serve.adapters.formats.config import AdapterConfig, FineTuneType
from serve.adapters.formats.header import specs_of
from serve.adapters.formats.tensors import PARTS
from serve.adapters.layers.dora import DoRALinear
from serve.adapters.layers.experts import LoRAExperts
from serve.adapters.layers.lora import AdaptedLayer, LoRALinear
from serve.errors import AdapterError
from serve.model.network import Network
from serve.model.weights import EXPERTS, expert_modules, linear_modules

ANY_RANK = 1 << 30


def place_adapter(
    network: Network, tensors: Mapping[str, mx.array], config: AdapterConfig, source: str
) -> None:
    """Put it in place, unfused. Weights in the same folder that trained whole take the place of the network's own.

    source  its folder, for messages
    AdapterError names each tensor that does not fit, and what would.
    """
    updates = {name: value for name, value in tensors.items() if name.rpartition(".")[2] in PARTS}
    whole = {name: value for name, value in tensors.items() if name not in updates}
    if updates:
        check_fit(source, specs_of(updates), config, network, max_rank=ANY_RANK)
    put_weights(network, whole, source)
    own, config = own_layout(updates, config, network)
    layers = {**linear_modules(network.module), **expert_modules(network.module)}
    tied = sorted({name.rpartition(".")[0] for name in own} & network.tied_head.keys())
    if tied:
        raise AdapterError(
            f"{source}: adapts {tied[0]}, which is the embeddings in this model: put into its weights, the update "
            f"would change both; serve it as an adapter"
        )
    placed = [
        (path, _adapted(layers[path], _parts(own, path), config.fine_tune_type, config.scale_of(path)))
        for path in sorted({name.rpartition(".")[0] for name in own})
    ]
    network.module.update_modules(tree_unflatten(placed))


def put_weights(network: Network, tensors: Mapping[str, mx.array], source: str) -> None:
    """Put arrays in place of the network's own of these names. AdapterError names each that it does not have so."""
    there: dict[str, mx.array] = dict(tree_flatten(network.module.parameters()))
    problems = []
    for name, tensor in tensors.items():
        if name not in there:
            problems.append(f"  {name}: the model has no weights of that name")
        elif tensor.shape != there[name].shape:
            problems.append(f"  {name}: is {tuple(tensor.shape)}, the model needs {tuple(there[name].shape)}")
    if problems:
        more = [f"  and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise AdapterError("\n".join([f"{source} does not fit the base model:", *problems[:8], *more]))
    cast = [(name, tensor.astype(there[name].dtype)) for name, tensor in tensors.items()]
    network.module.load_weights(cast, strict=False)


def _parts(named: Mapping[str, mx.array], path: str) -> dict[str, mx.array]:
    return {part: named[f"{path}.{part}"].astype(mx.float32) for part in PARTS if f"{path}.{part}" in named}


def _adapted(layer: nn.Module, parts: Mapping[str, Any], kind: FineTuneType, scale: float) -> AdaptedLayer:
    a, b = parts["lora_a"], parts["lora_b"]
    if isinstance(layer, EXPERTS):
        return LoRAExperts(layer, a, b, scale)
    if kind == "dora":
        return DoRALinear(layer, a, b, parts["m"], scale, 0.0)
    return LoRALinear(layer, a, b, scale)
