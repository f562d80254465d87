"""Supervised fine-tuning and continued pre-training: negative log-likelihood of the targets.

The two differ in what the data marks as targets (answers, or every token), which is none of this file's business.
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx

from serve.model.network import Network
from train.loop.loss import find_targets, sum_loss, sum_loss_and_hits
from train.loop.objective import Prepared, seen_input
from train.objectives.reference import Reference
from train.recipe import sft
from train.recipe.recipe import Recipe

TOKEN_ACCURACY = "mean_token_accuracy"
"""TRL's name."""


class SFT:
    """Cross entropy in nats, a mean over targets."""

    unit = "target"
    splits_by: Literal["row", "pair"] | None = sft.SFT.splits_by

    def __init__(self, name: str = "sft") -> None:
        self.name = name

    def prepare(self, batch: Any, *, pad: bool = False) -> Prepared:
        """tokens [B, T], positions, token_ids and weights [N]; segments [B, T] where rows are packed; seen."""
        targets = find_targets(batch.tokens, batch.is_target, pad=pad)
        inputs: dict[str, Any] = {
            "tokens": batch.tokens,
            "positions": targets.positions,
            "token_ids": targets.token_ids,
            "weights": targets.weights,
        }
        if batch.segments is not None:
            inputs["segments"] = batch.segments
        inputs |= seen_input(batch.media)
        return Prepared(inputs, targets.num_targets)

    def loss(
        self, network: Network, inputs: dict[str, Any], *, trains: bool = True
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Σ weight · −log p(target). Measured where nothing trains: the targets that are the likeliest token.

        A training step would pay for it with another pass over its logits.
        """
        if trains:
            return sum_loss(network, **inputs, trains=True), {}
        loss, hits = sum_loss_and_hits(network, **inputs)
        return loss, {TOKEN_ACCURACY: hits}

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """The share is a mean over targets already."""
        return means


def build(recipe: Recipe, reference: Reference) -> SFT:
    """The objective of a recipe."""
    return SFT(recipe.objective)
