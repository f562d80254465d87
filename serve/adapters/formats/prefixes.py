"""What stands before the part of a layer's name that every library has, and is left out when names are compared."""

from __future__ import annotations

CONTAINERS = frozenset(
    ("base_model", "model", "language_model", "text_model", "thinker", "transformer", "backbone", "_orig_mod")
)
"""Parts of names that say what a layer is inside of, and not which it is."""


def without_containers(path: str) -> str:
    """`base_model.model.model.layers.0.mlp.up_proj` → `layers.0.mlp.up_proj`."""
    parts = path.split(".")
    while len(parts) > 1 and parts[0] in CONTAINERS:
        parts.pop(0)
    return ".".join(parts)
