"""Which layers an adapter goes on: names and patterns of the recipe → modules of a network. Changes nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import mlx.nn as nn

from serve.errors import ConfigError
from serve.model.network import Network
from serve.model.weights import LINEAR, expert_modules, linear_modules

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "output")
REGEX = "re:"


@dataclass
class Layout:
    """What there is to adapt. Keys are paths inside a block, and the head's path in the whole model."""

    layers: list[nn.Module]
    linear: set[str] = field(default_factory=set)
    experts: set[str] = field(default_factory=set)
    heads: set[str] = field(default_factory=set)
    other: dict[str, str] = field(default_factory=dict)
    """Modules with weights that take no adapter → the reason."""

    @property
    def adaptable(self) -> set[str]:
        return self.linear | self.experts | self.heads


def layout_of(network: Network, num_layers: int) -> Layout:
    """The modules of the last `num_layers` blocks (-1: all), and the head."""
    layout = Layout(last_layers(network.layers, num_layers))
    for layer in layout.layers:
        layout.linear |= linear_modules(layer).keys()
        layout.experts |= expert_modules(layer).keys()
        for path, module in layer.named_modules():
            if path and "weight" in module and path not in layout.adaptable:
                layout.other[path] = (
                    f"is a {type(module).__name__}; an adapter goes on linear layers and experts"
                )
    prefix = f"{network.text_path}." if network.has_towers else ""
    for path, module in network.module.named_modules():
        if not path.startswith(prefix):
            continue  # towers and projectors, which train_vision speaks of
        leaf = path.rsplit(".", 1)[-1]
        if leaf in HEADS and isinstance(module, LINEAR) and not _is_in_layers(path):
            layout.heads.add(path)
        elif isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            layout.other[path] = layout.other[leaf] = "is an embedding, a table; an adapter goes on matrices"
    if not layout.heads:
        layout.other["lm_head"] = (
            "is tied to the embeddings in this model: it has no weights of its own, and changing them would "
            "change what every token means on the way in"
        )
    return layout


def _is_in_layers(path: str) -> bool:
    return re.search(r"(^|\.)(layers|h|blocks)\.\d+\.", path) is not None


def last_layers(layers: Sequence[nn.Module], num_layers: int) -> list[nn.Module]:
    """The last `num_layers` blocks; -1, or more than there are, is all of them."""
    return list(layers) if num_layers < 0 else list(layers)[max(len(layers) - num_layers, 0) :]


def choose(keys: Sequence[str] | str | None, layout: Layout) -> set[str]:
    """The keys that `keys` means.

    keys  None or "all-linear": every linear layer and expert stack of a block, not the head. Otherwise names or
          their ends (`self_attn.q_proj`, `q_proj`), shell patterns of them (`self_attn.*`, `*_proj`), or regular
          expressions over the whole name after `re:` (`re:mlp[.](up|down)_proj`)
    ConfigError names every entry that means nothing, or something that takes no adapter.
    """
    if keys is None or keys == ALL_LINEAR:
        return layout.linear | layout.experts
    names = [keys] if isinstance(keys, str) else list(keys)
    chosen: set[str] = set()
    problems = []
    for name in names:
        if name == ALL_LINEAR:
            chosen |= layout.linear | layout.experts
            continue
        try:
            meant = set(_meant(name, layout.adaptable))
        except re.error as error:
            problems.append(f"  {name}: not a regular expression: {error}")
            continue
        if not meant:
            problems.append(f"  {_nothing_found(name, layout)}")
        chosen |= meant
    if not names:
        problems.append("  the list is empty: nothing would train")
    if problems:
        listing = ", ".join(sorted(layout.linear | layout.experts))
        heads = f"; beside the layers: {', '.join(sorted(layout.heads))}" if layout.heads else ""
        raise ConfigError(
            "lora_parameters.keys:\n" + "\n".join(problems) + f"\n  the layers have: {listing}{heads}"
        )
    return chosen


def _meant(name: str, keys: set[str]) -> Iterator[str]:
    if name in keys:
        yield name
    elif name.startswith(REGEX):
        pattern = re.compile(name.removeprefix(REGEX))
        yield from (key for key in keys if pattern.fullmatch(key))
    elif any(sign in name for sign in "*?["):
        yield from (key for key in keys if fnmatchcase(key, name) or fnmatchcase(key, f"*.{name}"))
    else:
        yield from (key for key in keys if key.endswith(f".{name}"))


def _nothing_found(name: str, layout: Layout) -> str:
    if name in layout.other:
        return f"{name} {layout.other[name]}"
    if name.startswith(REGEX) or any(sign in name for sign in "*?["):
        return f"{name}: no layer's name matches"
    leaves = {key.rsplit(".", 1)[-1] for key in layout.adaptable}
    near = difflib.get_close_matches(name, layout.adaptable | leaves, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{name}: no layer has it{hint}"
