"""What of a model is its tower and what its projector, and how they train. A network in; modules by path out.

The tower turns pixels into vectors of its own; the projector turns those into the language part's. Whatever listens
is neither: it stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from serve.errors import ConfigError
from serve.model.network import Network
from serve.model.weights import QUANTIZED, linear_modules

Part = Literal["tower", "projector"]
How = Literal["lora", "full"]

PROJECTORS = re.compile(r"(merger|projector|connector|aligner|resampler|mlp1$|mm_|embed_vision)")
"""Names of modules that lead out of a tower; families have no others (`tests/train/test_vision_parts.py`)."""
SOUND = re.compile(r"(audio|sound|speech)")


@dataclass(frozen=True)
class VisionTraining:
    """How tower and projector train; None: not at all."""

    tower: How | None = None
    projector: How | None = None

    def __bool__(self) -> bool:
        return bool(self.tower or self.projector)

    def parts(self, how: How) -> frozenset[Part]:
        """Those that train so."""
        found: dict[Part, How | None] = {"tower": self.tower, "projector": self.projector}
        return frozenset(part for part, said in found.items() if said == how)


FROZEN = VisionTraining()


def part_of(path: str, text_path: str) -> Part | None:
    """What a module is, by its path in the whole model; None: of the language part, or no part of seeing."""
    names = path.split(".")
    if not path or path == text_path or path.startswith(f"{text_path}.") or any(map(SOUND.search, names)):
        return None
    if text_path.startswith(f"{path}."):
        return None  # it holds both
    return "projector" if any(map(PROJECTORS.search, names)) else "tower"


def vision_modules(network: Network, parts: frozenset[Part]) -> dict[str, nn.Module]:
    """The modules of these parts that hold arrays themselves, by path."""
    if not network.has_towers:
        return {}
    return {
        path: module
        for path, module in network.module.named_modules()
        if part_of(path, network.text_path) in parts and any(isinstance(v, mx.array) for v in module.values())
    }


def vision_linears(network: Network, parts: frozenset[Part]) -> dict[str, nn.Module]:
    """The linear layers of these parts, by path, as adapters know them."""
    if not network.has_towers:
        return {}
    found = linear_modules(network.module)
    return {path: layer for path, layer in found.items() if part_of(path, network.text_path) in parts}


def check(network: Network, vision: VisionTraining) -> None:
    """ConfigError unless the model has what is to train, in a form that can."""
    if vision and not network.has_towers:
        raise ConfigError("train_vision: the model reads text alone; it has no tower and no projector")
    packed = [
        path
        for path, module in vision_modules(network, vision.parts("full")).items()
        if isinstance(module, QUANTIZED)
    ]
    if packed:
        raise ConfigError(
            f"train_vision: full cannot train {packed[0]} and {len(packed) - 1} more, which are packed integers; "
            f"expected lora, or a base whose tower is in full precision"
        )
    for part in sorted(vision.parts("lora") | vision.parts("full")):
        if not vision_modules(network, frozenset({part})):
            raise ConfigError(f"train_vision.{part}: this model has none that is known as one")


def unfreeze(network: Network, parts: frozenset[Part]) -> tuple[str, ...]:
    """Let the weights of these parts train. Returns the arrays that stay as they are, for they are no floats."""
    left = []
    for path, module in vision_modules(network, parts).items():
        arrays = {name: value for name, value in module.items() if isinstance(value, mx.array)}
        floats = [name for name, value in arrays.items() if mx.issubdtype(value.dtype, mx.floating)]
        if floats:
            module.unfreeze(recurse=False, keys=floats)
        left += [f"{path}.{name}" for name in arrays if name not in floats]
    return tuple(left)


def tower_blocks(network: Network) -> Iterator[nn.Module]:
    """The layers of towers, which are lists of modules of one class, several or one."""
    for path, module in network.module.named_modules():
        if part_of(path, network.text_path) != "tower" and path:
            continue
        for name, child in module.items():
            inside = f"{path}.{name}" if path else name
            is_stack = isinstance(child, list) and child and all(isinstance(c, nn.Module) for c in child)
            if is_stack and part_of(inside, network.text_path) == "tower" and len(set(map(type, child))) == 1:
                yield from child
