"""The objectives there are, one entry each: the kinds of rows it learns from, its block of the recipe, its measures.

A new one is an entry here, its block in `objective_config`, its file in train/objectives, and a line in `Recipe` and
in train/objectives/build.py; a test holds the four together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.recipe.kinds import SHAPES, Kind
from train.recipe.objective_config import DPOConfig, GRPOConfig, KTOConfig, ObjectiveConfig, ORPOConfig


@dataclass(frozen=True)
class ObjectiveEntry:
    """What the rest of training knows of an objective."""

    kinds: tuple[Kind, ...]
    """Kinds of rows it can use, in the order in which `type: auto` looks; mlx-lm's where it has one."""
    config: type[ObjectiveConfig] | None = None
    """The block of its name in a recipe; None: it has no knobs."""
    measures: tuple[str, ...] = ()
    """Of its validations, those that tell which weights are best; more is better."""
    splits_by: Literal["row", "pair"] | None = "row"
    """What a forward may hold alone: a row; a pair, whose answers are two rows; None: only the whole batch."""


ANSWERED: tuple[Kind, ...] = ("completion", "chat", "sharegpt", "text", "alpaca")
PAIR_MEASURES = ("rewards/accuracies", "rewards/margins")
OBJECTIVES: dict[str, ObjectiveEntry] = {
    "sft": ObjectiveEntry(ANSWERED),
    "cpt": ObjectiveEntry(ANSWERED),
    "dpo": ObjectiveEntry(("preference",), DPOConfig, PAIR_MEASURES, "pair"),
    "orpo": ObjectiveEntry(("preference",), ORPOConfig, PAIR_MEASURES, "pair"),
    # One estimate of the divergence a batch.
    "kto": ObjectiveEntry(("unpaired",), KTOConfig, ("rewards/margins",), None),
    "grpo": ObjectiveEntry(("prompt",), GRPOConfig, ("reward",)),
}


def needed(objective: str) -> str:
    """What rows of an objective must hold, in words."""
    return "; or ".join(SHAPES[kind] for kind in OBJECTIVES[objective].kinds)


def objectives_of(kind: str) -> str:
    """`dpo or orpo`: the objectives that a kind of row is for."""
    return " or ".join(name for name, entry in OBJECTIVES.items() if kind in entry.kinds)
