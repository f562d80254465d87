"""What a recipe knows of objective orpo: its knobs, in TRL's words and defaults, and its entry."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from train.recipe.objective import PAIR_MEASURES, ObjectiveConfig, ObjectiveEntry


class ORPOConfig(ObjectiveConfig):
    """Pairs of answers without a reference: likelihood and odds ratio. Hong et al. 2024, arXiv 2403.07691."""

    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds-ratio term, the paper's λ."""
    nll_over: Literal["sequence", "answer"] = "sequence"
    """What the likelihood term counts of the chosen row: prompt and answer, as TRL, or the answer alone."""


ENTRY = ObjectiveEntry(
    "which of two answers is preferred, without a reference",
    ("preference",),
    "train.objectives.orpo:build",
    ORPOConfig,
    PAIR_MEASURES,
    splits_by="pair",
)
