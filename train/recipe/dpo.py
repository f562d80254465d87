"""What a recipe knows of objective dpo: its knobs, in TRL's words and defaults, and its entry."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from serve.settings import Problems
from train.recipe.objective import PAIR_MEASURES, ObjectiveConfig, ObjectiveEntry


class DPOConfig(ObjectiveConfig):
    """Pairs of answers, the chosen one pushed above the rejected one. Rafailov et al. 2023, arXiv 2305.18290."""

    beta: float = Field(default=0.1, gt=0)
    """How much a log-probability gained over the reference counts; larger stays nearer to the reference.
    With ipo, the paper's τ."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """sigmoid: DPO, eq. 7. hinge: SLiC. ipo: Azar et al. 2023, eq. 17, by mean log-probabilities. robust: Chowdhury
    et al. 2024, unbiased where `label_smoothing` of the pairs are the wrong way round."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs taken to be the wrong way round; with sigmoid (conservative DPO) and robust."""
    reference_free: bool = False
    """Take the reference as equal for all answers, which leaves it out."""
    rpo_alpha: float | None = Field(default=None, gt=0)
    """Adds this times the chosen answer's mean negative log-likelihood (Pang et al. 2024, arXiv 2404.19733)."""

    @property
    def has_reference(self) -> bool:
        return not self.reference_free

    @property
    def without_reference(self) -> str:
        return ", objective orpo or dpo.reference_free: true"

    @model_validator(mode="after")
    def _smoothing_fits(self) -> DPOConfig:
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise Problems(
                [("label_smoothing", f"has no effect with {self.loss_type}; expected sigmoid or robust")]
            )
        if self.loss_type == "robust" and not self.label_smoothing:
            raise Problems(
                [("label_smoothing", "found 0, with which robust is sigmoid; say the share of wrong pairs")]
            )
        return self


ENTRY = ObjectiveEntry(
    "which of two answers is preferred, against a reference",
    ("preference",),
    "train.objectives.dpo:build",
    DPOConfig,
    PAIR_MEASURES,
    splits_by="pair",
)
