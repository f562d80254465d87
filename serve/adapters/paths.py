"""Names in adapter files → layers of this model: the same layer has other prefixes in other libraries.

`layers.0.self_attn.q_proj` is `model.layers.0…` in mlx-lm, `language_model.model.layers.0…` in mlx-vlm, and
`base_model.model.model.layers.0…` in PEFT. What stands before the part that all of them share is left out of the
comparison; a name that means two layers is neither's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from serve.adapters.prefixes import without_containers
from serve.errors import AdapterError
from serve.model.network import Network
from serve.model.weights import expert_modules, linear_modules

T = TypeVar("T")


def with_own_names(named: Mapping[str, T], network: Network) -> dict[str, T]:
    """`path.tensor` → value, with paths as this model has them. Names that fit nothing stay what they are.

    AdapterError where two names mean the same tensor.
    """
    paths = own_paths((name.rpartition(".")[0] for name in named), network)
    renamed: dict[str, T] = {}
    origins: dict[str, str] = {}
    for name, value in named.items():
        path, _, part = name.rpartition(".")
        own = f"{paths[path]}.{part}" if path else name
        if own in renamed:
            raise AdapterError(f"two tensors are the same layer's {part}: {origins[own]} and {name}")
        renamed[own], origins[own] = value, name
    return renamed


def own_paths(paths: Iterable[str], network: Network) -> dict[str, str]:
    """Each path → the model's own one for the layer it means; itself where it means none."""
    own = {**linear_modules(network.module), **expert_modules(network.module)}
    by_end: dict[str, list[str]] = {}
    for path in own:
        by_end.setdefault(without_containers(path), []).append(path)
    found = {}
    for path in paths:
        meant = by_end.get(without_containers(path), [])
        found[path] = meant[0] if path not in own and len(meant) == 1 else path
    return found
