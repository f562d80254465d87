"""What a recipe knows of objective kto: its knobs, in TRL's words and defaults, and its entry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from train.recipe.objective import ObjectiveConfig, ObjectiveEntry


class KTOConfig(ObjectiveConfig):
    """Single answers, each wanted or not. Ethayarajh et al. 2024, arXiv 2402.01306."""

    beta: float = Field(default=0.1, gt=0)
    """How much a log-probability gained over the reference counts; larger stays nearer to the reference."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Of the wanted answers' losses."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Of the unwanted answers' losses. (Number · weight) should be within 1 to 4/3 of the other's, eq. 8."""

    @property
    def has_reference(self) -> bool:
        return True

    def problems(self, recipe: Any) -> Iterator[tuple[str, str]]:
        """One estimate of the divergence a batch, from pairs of its rows."""
        if recipe.micro_batch_tokens:
            yield (
                "micro_batch_tokens",
                "has no effect with objective: kto, whose KL term is one a batch; leave it out, or 0",
            )
        if recipe.batch_size == 1:
            yield "batch_size", "found 1; kto estimates its KL term from pairs of rows: expected 2 or more"


ENTRY = ObjectiveEntry(
    "which answers are wanted",
    ("unpaired",),
    "train.objectives.kto:build",
    KTOConfig,
    ("rewards/margins",),
    # One estimate of the divergence a batch.
    splits_by=None,
)
