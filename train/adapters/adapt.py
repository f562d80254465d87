"""What of a model trains: adapter layers put in place of linear ones, or the weights themselves.

A Network goes in and is changed in place; out comes what trains, by name. Knows no data and no optimizer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from serve.adapters.formats.tensors import PARTS
from serve.adapters.layers.dora import DoRALinear
from serve.adapters.layers.experts import LoRAExperts
from serve.adapters.layers.lora import AdaptedLayer, LoRALinear
from serve.errors import AdapterError, ConfigError
from serve.model.network import Network
from serve.model.weights import EXPERTS, QUANTIZED, linear_shape
from train.adapters import towers
from train.adapters.buffers import freeze_buffers
from train.adapters.keys import HEADS, Layout, choose, last_layers, layout_of
from train.adapters.pissa import DEFAULT, is_pissa, start_on_principal
from train.adapters.towers import FROZEN, VisionTraining, part_of, tower_blocks, vision_linears

FineTuneType = Literal["lora", "dora", "full"]


@dataclass(frozen=True)
class Adapted:
    """What was made trainable. `keys` are paths in a layer, or the head's; `num_layers` counts from the last."""

    fine_tune_type: FineTuneType
    num_layers: int
    keys: tuple[str, ...]
    num_trainable: int
    num_parameters: int
    notes: tuple[str, ...] = ()
    rank: int = 0
    """Of the update an adapter folder holds: twice the recipe's with PiSSA."""

    @property
    def line(self) -> str:
        """How much trains, for a person."""
        share = self.num_trainable / self.num_parameters
        return f"trainable: {self.num_trainable:,} of {self.num_parameters:,} parameters ({share:.2%})"


@dataclass(frozen=True)
class AdapterSettings:
    """The adapter that is put over a network's layers. `keys`: see `keys.choose`."""

    rank: int
    scale: float
    """The factor itself, whichever way a recipe spells it."""
    dropout: float = 0.0
    keys: Sequence[str] | str | None = None
    """None or "all-linear": every linear layer and expert stack, not the head."""
    num_layers: int = -1
    """The last this many blocks; -1, or more than there are: all."""
    fine_tune_type: Literal["lora", "dora"] = "lora"
    init: str = DEFAULT
    """default: A random, B zero; pissa, pissa_niter_N: the weight's principal part."""
    vision: VisionTraining = FROZEN
    """What of towers and projectors trains, and how."""


def add_lora(
    network: Network,
    settings: AdapterSettings,
    *,
    is_restored: bool = False,
    is_sketch: bool = False,
) -> Adapted:
    """Freeze the network and put a fresh adapter over the layers that `settings` names.

    is_restored  a checkpoint's tensors come next, so no singular values are computed
    is_sketch    the network has no weights yet: nothing is measured or evaluated, shapes alone are right
    Adapter weights are float32 whatever the base's dtype; the layer casts the update to the activations' dtype.
    Randomness: MLX's global generator. ConfigError names keys that do not exist, or cannot be adapted.
    """
    keys, num_layers, init = settings.keys, settings.num_layers, settings.init
    towers.check(network, settings.vision)
    fine_tune_type = settings.fine_tune_type
    if fine_tune_type == "dora" and is_pissa(init):
        raise ConfigError(
            f"lora_parameters.init_lora_weights: {init} goes with fine_tune_type: lora, not dora"
        )
    layout = layout_of(network, num_layers)
    chosen = choose(keys, layout)
    notes = []
    if num_layers > len(network.layers):
        notes.append(f"num_layers {num_layers}: the model has {len(network.layers)}, all are adapted")
    if fine_tune_type == "dora" and chosen & layout.experts:
        notes.append(_without_experts(chosen, keys, layout))
        chosen -= layout.experts
    network.module.freeze()
    options = {"rank": settings.rank, "scale": settings.scale, "dropout": settings.dropout}
    seeing = vision_linears(network, settings.vision.parts("lora")).keys()
    for root, names in [
        *((layer, (chosen - layout.heads) & layout.adaptable) for layer in layout.layers),
        (network.module, chosen & layout.heads),
        (network.module, seeing),
    ]:
        placed = [
            (path, _adapter_over(module, fine_tune_type, options, is_sketch))
            for path, module in root.named_modules()
            if path in names
        ]
        if placed:
            root.update_modules(tree_unflatten(placed))
    if is_pissa(init):
        for path, layer in adapted_layers(network).items():
            _start(path, layer, init, is_restored or is_sketch)
    trainable = trainable_tensors(network)
    if not trainable:
        raise ConfigError("lora_parameters.keys: nothing to train: no linear layer was chosen")
    stray = [name for name in trainable if name.rsplit(".", 1)[-1] not in PARTS]
    assert not stray, f"the base must stay frozen, but these train: {stray}"
    if whole := settings.vision.parts("full"):
        towers.unfreeze(network, whole)
        notes.append(_beside_an_adapter(whole))
    folder_rank = 2 * settings.rank if is_pissa(init) else settings.rank
    return _adapted(network, fine_tune_type, num_layers, tuple(sorted(chosen)), notes, folder_rank)


def _adapter_over(
    module: nn.Module, fine_tune_type: str, options: dict[str, Any], is_sketch: bool
) -> AdaptedLayer:
    if isinstance(module, EXPERTS):
        return LoRAExperts.from_base(module, **options)
    if fine_tune_type == "dora":
        squared = mx.ones(linear_shape(module)[1]) if is_sketch else None
        return DoRALinear.from_base(module, squared=squared, **options)
    return LoRALinear.from_base(module, **options)


def _start(path: str, layer: AdaptedLayer, init: str, is_restored: bool) -> None:
    if is_restored:
        layer.start_from(layer.lora_a, layer.lora_b)
    else:
        start_on_principal(path, layer, init)


def _beside_an_adapter(parts: Collection[str]) -> str:
    said = " and ".join(sorted(parts, reverse=True))
    return (
        f"train_vision: the weights of the {said} train whole, and stand in the folder beside the adapter's: `lathe "
        f"export` takes both, a server's rows share one tower and take neither"
    )


def _without_experts(chosen: set[str], keys: Sequence[str] | str | None, layout: Layout) -> str:
    """The note that DoRA leaves the experts out; ConfigError where nothing but experts was asked for by an entry."""
    names = [] if keys is None or isinstance(keys, str) else keys
    only = [name for name in names if choose([name], layout) <= layout.experts]
    if only or chosen <= layout.experts:
        raise ConfigError(
            f"lora_parameters.keys: {', '.join(only or sorted(chosen))} holds MoE experts; DoRA has no form for them "
            f"that mlx-lm reads; use fine_tune_type: lora, or leave them out"
        )
    return (
        f"not adapted: {', '.join(sorted(chosen & layout.experts))} (MoE experts; DoRA adapts linear layers)"
    )


def adapted_layers(network: Network) -> dict[str, AdaptedLayer]:
    """Every layer with an adapter, by its path in the mlx-lm model."""
    return {path: m for path, m in network.module.named_modules() if isinstance(m, AdaptedLayer)}


def manifest_keys(network: Network, adapted: Adapted) -> tuple[str, ...]:
    """What the manifest's `keys` say, as the library that opens the base reads them: mlx-lm looks in each layer,
    mlx-vlm takes whole paths."""
    return tuple(sorted(adapted_layers(network))) if network.has_towers else adapted.keys


@contextmanager
def adapters_off(network: Network) -> Iterator[None]:
    """Inside, every adapted layer is its base layer: the reference model, without a second copy of it.

    ConfigError where the weights themselves train: their former values are gone.
    """
    layers = list(adapted_layers(network).values())
    if not layers:
        raise ConfigError(
            "fine_tune_type: full keeps no reference model, for the weights themselves change; "
            "expected lora or dora"
        )
    before = [layer.is_on for layer in layers]
    try:
        for layer in layers:
            layer.is_on = False
        yield
    finally:
        for layer, was_on in zip(layers, before, strict=True):
            layer.is_on = was_on


def train_all(
    network: Network,
    *,
    num_layers: int = -1,
    is_sketch: bool = False,
    vision: VisionTraining = FROZEN,
) -> Adapted:
    """Make the weights themselves train: all of the language part's (-1), or those of its last `num_layers` blocks;
    and what `vision` says of towers and projectors.

    What a family means as buffers does not train, see `buffers`; a sketch, which has no weights, is not looked at.
    ConfigError on a quantized base: packed integers have no gradient.
    """
    towers.check(network, vision)
    quantized = [path for path, module in network.text.named_modules() if isinstance(module, QUANTIZED)]
    if quantized:
        raise ConfigError(
            f"fine_tune_type: full cannot train a quantized base ({quantized[0]} and {len(quantized) - 1} more are "
            f"packed integers); use fine_tune_type: lora, or a base in full precision"
        )
    network.module.freeze()
    if num_layers < 0:
        network.text.unfreeze()
    else:
        for layer in last_layers(network.layers, num_layers):
            layer.unfreeze()
    integers = towers.unfreeze(network, vision.parts("full"))
    if not trainable_tensors(network):
        raise ConfigError(
            f"num_layers: found {num_layers}; nothing would train; expected 1 or more, or -1 for all"
        )
    buffers = (*integers, *(() if is_sketch else freeze_buffers(network)))
    notes = [f"not trained, for no gradient reaches them: {_listed(buffers)}"] if buffers else []
    return _adapted(network, "full", num_layers, (), notes)


def _listed(paths: Sequence[str]) -> str:
    """The names, once for all layers: `model.layers.N.mlp.gate.bias (12)`."""
    counts = Counter(re.sub(r"\.\d+\.", ".N.", path) for path in paths)
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counts.items())


def trainable_tensors(network: Network) -> dict[str, mx.array]:
    """What the optimizer moves: trainable tensors by their path in the mlx-lm model."""
    return dict(tree_flatten(network.module.trainable_parameters()))


def adapter_tensors(network: Network) -> dict[str, mx.array]:
    """What an adapter folder holds: of each adapted layer its tensors, and whatever else trains."""
    layers = adapted_layers(network)
    adapters = {
        f"{path}.{name}": tensor for path, layer in layers.items() for name, tensor in layer.tensors().items()
    }
    return adapters | _whole_tensors(network, layers)


def _whole_tensors(network: Network, layers: Mapping[str, AdaptedLayer]) -> dict[str, mx.array]:
    """Weights that train themselves, in no adapted layer."""
    trains = trainable_tensors(network)
    return {name: tensor for name, tensor in trains.items() if name.rpartition(".")[0] not in layers}


def set_tensors(
    network: Network, tensors: dict[str, mx.array], source: str, *, with_frozen: bool = False
) -> None:
    """The inverse of `adapter_tensors`, bit for bit. AdapterError unless names and shapes are the same.

    with_frozen  of a full fine-tune, take arrays of the model that do not train here, too: earlier versions trained
                 buffers. Only where the whole model is used: a run would not keep them in its folder
    """
    wanted = adapter_tensors(network)
    problems = [f"  {name}: missing" for name in wanted if name not in tensors]
    frozen = {} if adapted_layers(network) else _frozen_arrays(network, wanted)
    if with_frozen:
        wanted = wanted | {name: value for name, value in frozen.items() if name in tensors}
    for name, tensor in tensors.items():
        if name not in wanted:
            problems.append(
                f"  {name}: {_EXPORT_FIRST if name in frozen else 'not a tensor that trains here'}"
            )
        elif tensor.shape != wanted[name].shape:
            problems.append(
                f"  {name}: is {tuple(tensor.shape)}, the model needs {tuple(wanted[name].shape)}"
            )
    if problems:
        shown = "\n".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise AdapterError(f"{source} does not fit this run:\n{shown}")
    cast = {name: tensor.astype(wanted[name].dtype) for name, tensor in tensors.items()}
    layers = adapted_layers(network)
    for path, layer in layers.items():
        layer.set_tensors({name: cast.pop(f"{path}.{name}") for name in layer.tensors()})
    if cast:
        network.module.load_weights(list(cast.items()), strict=False)


_EXPORT_FIRST = "does not train here; `lathe export` takes it, and a recipe takes the export as its model"


def _frozen_arrays(network: Network, trained: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The model's other arrays: buffers, and layers that do not train."""
    arrays = tree_flatten(network.module.parameters())
    return {name: value for name, value in arrays if name not in trained}


def trains_towers(network: Network) -> bool:
    """Whether anything that sees trains, so that features have a gradient."""
    if not network.has_towers:
        return False
    return any(part_of(name, network.text_path) is not None for name in trainable_tensors(network))


def embedding_names(network: Network) -> frozenset[str]:
    """Parameters of embeddings and of the head: Muon leaves them to AdamW."""
    named = network.module.named_modules()
    paths = [p for p, m in named if isinstance(m, nn.Embedding) or p.rsplit(".", 1)[-1] in HEADS]
    return frozenset(f"{path}.weight" for path in paths)


@contextmanager
def checkpointed_layers(network: Network) -> Iterator[None]:
    """Inside, each layer recomputes its activations in the backward pass (gradient checkpointing); of towers too,
    where anything of them trains.

    Each layer *instance* gets a subclass of its class; the class itself is never touched, so other models in the
    process, and serving, keep theirs. Outside, every layer has its own class again.
    """
    layers = [*network.layers, *(tower_blocks(network) if trains_towers(network) else ())]
    originals = [(layer, type(layer)) for layer in layers]
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


def _adapted(
    network: Network,
    kind: FineTuneType,
    num_layers: int,
    keys: tuple[str, ...],
    notes: list[str],
    rank: int = 0,
) -> Adapted:
    everything = sum(tensor.size for _, tensor in tree_flatten(network.module.parameters()))
    trains = sum(tensor.size for tensor in trainable_tensors(network).values())
    return Adapted(kind, num_layers, keys, trains, everything, tuple(notes), rank)
