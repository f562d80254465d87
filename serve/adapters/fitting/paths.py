"""Names in adapter files → layers of this model: the same layer has other prefixes in other libraries.

`layers.0.self_attn.q_proj` is `model.layers.0…` in mlx-lm, `language_model.model.layers.0…` in mlx-vlm, and
`base_model.model.model.layers.0…` in PEFT. What stands before the part that all of them share is left out of the
comparison; a name that means two layers is neither's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import mlx.nn as nn

from serve.adapters.formats.tensors import without_containers
from serve.model.network import Network
from serve.model.weights import expert_modules, linear_modules

ALSO_CALLED = {"visual": "vision_tower", "block_sparse_moe": "mlp", "feed_forward": "mlp"}
"""Parts of names that say the same in transformers and here."""
LEFT_OUT = ("vision_model",)
"""Parts of names inside a tower that one of them has."""


def own_paths(paths: Iterable[str], network: Network) -> dict[str, str]:
    """Each path → the model's own one for the layer it means; itself where it means none."""
    find = finder(network)
    return {path: find(path) for path in paths}


def finder(network: Network) -> Callable[[str], str]:
    """The same, path by path."""
    own = adaptable_modules(network)
    by_end: dict[str, list[str]] = {}
    for path in own:
        for end in {without_containers(path), _with_one_name(path)}:
            by_end.setdefault(end, []).append(path)

    def find(path: str) -> str:
        meant = by_end.get(without_containers(path)) or by_end.get(_with_one_name(path), [])
        return meant[0] if path not in own and len(meant) == 1 else path

    return find


def adaptable_modules(network: Network) -> dict[str, nn.Module]:
    """Every layer that an update may be of, by path: linear ones, stacks of experts, and where the embeddings are the
    head, those, by the path that a head would have."""
    heads = {head: unwrapped(module_at(network.module, path)) for head, path in network.tied_head.items()}
    return {**linear_modules(network.module), **expert_modules(network.module), **heads}


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module there; parts of paths may be numbers in lists."""
    found: object = root
    for part in path.split(".") if path else []:
        found = found[int(part)] if isinstance(found, list) else found[part]  # type: ignore[index]
    assert isinstance(found, nn.Module), f"{path} is a module"
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """The base's layer, without the bank or the adapter around it."""
    return module.linear if getattr(module, "wraps_linear", False) else module


def _with_one_name(path: str) -> str:
    """The end of a path, with one name for what libraries call differently."""
    parts = without_containers(path).split(".")
    return ".".join(ALSO_CALLED.get(part, part) for part in parts if part not in LEFT_OUT)
