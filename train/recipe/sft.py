"""What a recipe knows of objectives sft and cpt, which have no knobs of their own: their loss is one."""

from __future__ import annotations

from train.recipe.kinds import Kind
from train.recipe.objective import ObjectiveEntry

ANSWERED: tuple[Kind, ...] = ("completion", "chat", "sharegpt", "text", "alpaca")
BUILDER = "train.objectives.sft:build"

SFT = ObjectiveEntry("the answers of conversations", ANSWERED, BUILDER, is_supervised=True)
CPT = ObjectiveEntry("whole documents", ANSWERED, BUILDER, is_supervised=True)
