"""An adapter's tensors by their names, PATH.part in our form: which module, which part, which axis; see `files`.

What of a path says only what a layer is inside of is left out when names are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from serve.errors import AdapterError

if TYPE_CHECKING:  # configs are read where no mlx is
    import mlx.core as mx

PARTS = ("lora_a", "lora_b", "m")
"""Of an update of low rank."""
RANK_AXES = {2: (1, 0), 3: (1, 2)}
"""By the number of axes, which one of lora_a and of lora_b is the rank's."""

CONTAINERS = frozenset(
    ("base_model", "model", "language_model", "text_model", "thinker", "transformer", "backbone", "module")
)
"""Parts of names that say what a layer is inside of, and not which it is."""
WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""What torch puts around the modules that it compiles, shards and recomputes, be it in the middle of a name."""


def without_containers(path: str) -> str:
    """`base_model.model.model.layers.0.mlp.up_proj` → `layers.0.mlp.up_proj`."""
    parts = without_wrappers(path).split(".")
    while len(parts) > 1 and parts[0] in CONTAINERS:
        parts.pop(0)
    return ".".join(parts)


def without_wrappers(path: str) -> str:
    """`model.layers.0._orig_mod.mlp.up_proj` → `model.layers.0.mlp.up_proj`."""
    return ".".join(part for part in path.split(".") if part not in WRAPPERS)


def check_distinct(source: str, names: Mapping[str, str]) -> None:
    """AdapterError where two names become one, of which one would be lost."""
    first: dict[str, str] = {}
    for name, made in names.items():
        if first.setdefault(made, name) != name:
            raise AdapterError(
                f"{source}: {first[made]} and {name} are the same layer's, and one was expected"
            )


def others_of(tensors: Iterable[str]) -> list[str]:
    """Tensors that belong to no update of low rank: whole weights, and biases."""
    return sorted(name for name in tensors if name.rpartition(".")[2] not in PARTS)


def paths_of(tensors: Iterable[str]) -> list[str]:
    """Modules with an update of low rank, in order."""
    return sorted(name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a"))


def rank_in(tensors: Mapping[str, mx.array], path: str) -> int:
    """R, by the shape of lora_a."""
    a = tensors[f"{path}.lora_a"]
    return int(a.shape[RANK_AXES[a.ndim][0]])
