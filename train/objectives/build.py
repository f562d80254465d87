"""A recipe → the objective it names."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from serve.model.network import Network
from train.loop.objective import Objective
from train.objectives.reference import Reference, base, start_of
from train.recipe.objectives import OBJECTIVES
from train.recipe.recipe import Recipe

Builder = Callable[[Recipe, Reference], Objective]
"""(recipe, what the objective measures against, where it does) → the objective with the recipe's knobs."""


def build_objective(recipe: Recipe, network: Network) -> Objective:
    """The objective of a run.

    network  with the weights the run starts from, before a checkpoint's are put in: where `resume_adapter_file`
             gave it an adapter, that is what the reference is, and else the base
    """
    reference = start_of(network) if recipe.resume_adapter_file and recipe.has_reference else base
    return builder_of(recipe.objective)(recipe, reference)


def builder_of(objective: str) -> Builder:
    """The function that its registry entry names."""
    module, _, function = OBJECTIVES[objective].builder.partition(":")
    builder: Builder = getattr(import_module(module), function)
    return builder
