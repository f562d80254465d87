"""A recipe → what of its base trains, put in place."""

from __future__ import annotations

from pathlib import Path

from serve.model.network import Network
from train.adapters.adapt import Adapted, AdapterSettings, add_lora, train_all
from train.adapters.towers import VisionTraining
from train.adapters.warm_start import warm_start
from train.recipe.recipe import Recipe


def build_adapted(
    recipe: Recipe, network: Network, *, is_restored: bool = False, is_sketch: bool = False
) -> Adapted:
    """Change the network into one that trains as the recipe says, from `resume_adapter_file` where there is one.

    is_restored  a checkpoint's tensors come next
    is_sketch    the network has no weights: shapes alone are right
    """
    has_parent = recipe.resume_adapter_file is not None
    settings = settings_of(recipe)
    if settings is None:
        # Random weights are all new; leaving some of them frozen would train on noise.
        num_layers = -1 if recipe.init == "random" else recipe.num_layers
        adapted = train_all(
            network, num_layers=num_layers, is_sketch=is_sketch, vision=vision_training(recipe)
        )
    else:
        adapted = add_lora(network, settings, is_restored=is_restored or has_parent, is_sketch=is_sketch)
    if recipe.resume_adapter_file is not None and not is_sketch:
        warm_start(Path(recipe.resume_adapter_file), network, adapted)
    return adapted


def settings_of(recipe: Recipe) -> AdapterSettings | None:
    """The adapter a recipe asks for; None where the weights themselves train."""
    lora = recipe.lora_parameters
    if recipe.fine_tune_type == "full" or lora is None:
        return None
    return AdapterSettings(
        rank=lora.rank,
        scale=lora.effective_scale,
        dropout=lora.dropout,
        keys=lora.keys,
        num_layers=recipe.num_layers,
        fine_tune_type=recipe.fine_tune_type,
        init=lora.init_lora_weights,
        vision=vision_training(recipe),
    )


def vision_training(recipe: Recipe) -> VisionTraining:
    """What of towers and projectors a recipe trains."""
    said = recipe.train_vision
    return VisionTraining(said.tower or None, said.projector or None)
