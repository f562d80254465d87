"""Folders of models that see or hear: mlx-vlm's loader and classes, imported when the first such folder is met."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import switch_layers

from serve.model.rope import folder_in_older_words

TOWERS = ("vision_config", "audio_config")
NESTED = ("thinker_config",)
"""Configurations that hold those of towers, of models that also speak."""


def has_towers(config: dict[str, Any]) -> bool:
    """Whether a config.json is of a model with an encoder of pictures or sounds that mlx-vlm has."""
    inside = [config, *(config[name] for name in NESTED if isinstance(config.get(name), dict))]
    if not any(one.get(name) for one in inside for name in TOWERS):
        return False
    from mlx_vlm.utils import get_model_type

    model_type = get_model_type(config) or ""
    return bool(model_type.isidentifier() and importlib.util.find_spec(f"mlx_vlm.models.{model_type}"))


def load_with_towers(path: Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The whole module with lazy weights. Raises whatever mlx-vlm does."""
    from mlx_vlm.utils import load_model

    _know_newer_names()
    with folder_in_older_words(path) as folder:
        module = load_model(folder, lazy=True, trust_remote_code=trust_remote_code)
    _use_one_kind_of_experts(module)
    _compute_tables(module)
    return module


def build_with_towers(config: dict[str, Any]) -> nn.Module:
    """The same with random weights."""
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    own, _ = get_model_and_args(config)
    # As mlx-vlm's loader has it; families write what stands elsewhere in the file into this very object.
    config = {"text_config": {}, "vision_config": {}, "audio_config": {}, **copy.deepcopy(config)}
    settings = own.ModelConfig.from_dict(config)
    parts = ["text", "vision", "perceiver", "projector", "audio"]
    module = own.Model(update_module_configs(settings, own, config, parts))
    _use_one_kind_of_experts(module)
    return module


def _know_newer_names() -> None:
    """Lets mlx-vlm's loader read SigLIP's and CLIP's towers as transformers writes them since 5: without the level
    `vision_model`, which its own classes have. Once a process: its loader finds the function by name."""
    from mlx_vlm import utils

    own = utils.sanitize_weights
    if own.__module__ == __name__:
        return

    def sanitize_weights(
        module: Any, weights: dict[str, mx.array], config: Any = None
    ) -> dict[str, mx.array]:
        if isinstance(module, nn.Module):
            weights = in_older_names(weights, [path for path, _ in tree_flatten(module.parameters())])
        found: dict[str, mx.array] = own(module, weights, config)
        return found

    utils.sanitize_weights = sanitize_weights


def in_older_names(weights: dict[str, mx.array], parameters: Sequence[str]) -> dict[str, mx.array]:
    """Tensors by the names that a module with these parameters has; see `_know_newer_names`."""
    level, tower = "vision_model.", "vision_tower."
    has_level = any(path.startswith(tower + level) for path in parameters)
    if not has_level or any(tower + level in name for name in weights):
        return weights
    return {name.replace(tower, tower + level, 1): value for name, value in weights.items()}


def _compute_tables(module: nn.Module) -> None:
    """Arrays that are no weights (pixtral's and internvl_chat's positions), now: what one thread has planned, another
    one cannot compute, and it is another that runs the network."""
    found: list[Any] = []
    for child in module.modules():
        found += [value for name, value in child.items() if name.startswith("_")]
        for value in vars(child).values():
            found += [value, *vars(value).values()] if hasattr(value, "__dict__") else [value]
    mx.eval([value for value in found if isinstance(value, mx.array)])


def _use_one_kind_of_experts(module: nn.Module) -> None:
    """mlx-vlm's stacks of experts are mlx-lm's, class for class; here they all are the latter's, so that nobody else
    need know two. Its blocks around them stay, but for their shortcuts, which read packed weights themselves and so
    would leave out whatever wraps a stack."""
    from mlx_vlm.models import switch_layers as theirs

    same = {
        theirs.SwitchLinear: switch_layers.SwitchLinear,
        theirs.QuantizedSwitchLinear: switch_layers.QuantizedSwitchLinear,
    }
    for _, child in module.named_modules():
        if type(child) in same:
            child.__class__ = same[type(child)]
