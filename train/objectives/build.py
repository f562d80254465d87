"""A recipe → the objective it names."""

from __future__ import annotations

from serve.model.network import TextNetwork
from train.loop.objective import Objective
from train.objectives.dpo import DPO
from train.objectives.grpo import GRPO
from train.objectives.kto import KTO
from train.objectives.orpo import ORPO
from train.objectives.reference import Reference, base, start_of
from train.objectives.sft import SFT
from train.recipe.recipe import Recipe


def build_objective(recipe: Recipe, network: TextNetwork) -> Objective:
    """The objective of a run, with the recipe's knobs.

    network  with the weights the run starts from, before a checkpoint's are put in: where `resume_adapter_file`
             gave it an adapter, that is what the reference is, and else the base
    """
    if recipe.dpo is not None:
        return DPO(recipe.dpo, _reference(recipe, network))
    if recipe.orpo is not None:
        return ORPO(recipe.orpo)
    if recipe.kto is not None:
        return KTO(recipe.kto, _reference(recipe, network), max_length=recipe.max_seq_length)
    if recipe.grpo is not None:
        return GRPO(recipe.grpo, _reference(recipe, network))
    return SFT(recipe.objective)


def _reference(recipe: Recipe, network: TextNetwork) -> Reference:
    return start_of(network) if recipe.resume_adapter_file and recipe.has_reference else base
