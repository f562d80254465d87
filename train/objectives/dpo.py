"""Direct preference optimization: pairs of answers in, a loss that falls as the chosen one gains on the rejected one.

A gain is measured against the reference, computed inside the same step. Formulas: Rafailov et al. 2023, and TRL's
DPOTrainer (trl 1.16, trainer/dpo_trainer.py, `_compute_loss`), to which tests hold them.
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from serve.model.network import Network
from train.loop.objective import Prepared, seen_input
from train.objectives.answers import answer_inputs, answer_logprobs
from train.objectives.reference import Reference, base
from train.recipe.dpo import ENTRY, DPOConfig
from train.recipe.recipe import Recipe


class DPO:
    """Objective dpo. A batch of n pairs is one forward of 2n rows, and one more for the reference."""

    name = "dpo"
    unit = "pair"
    splits_by: Literal["row", "pair"] | None = ENTRY.splits_by

    def __init__(self, config: DPOConfig, reference: Reference = base) -> None:
        self.config = config
        self.reference = reference

    def prepare(self, batch: Any, *, pad: bool = False) -> Prepared:
        """Host arrays of a preference batch: chosen rows first, rejected rows after them, in the same order."""
        inputs = answer_inputs(batch.tokens, batch.is_target, pad=pad)
        num_pairs = len(batch.tokens) // 2
        inputs |= seen_input(batch.media)
        return Prepared({**inputs, "weights": np.ones(num_pairs, np.float32)}, num_pairs)

    def loss(
        self, network: Network, inputs: dict[str, Any], *, trains: bool = True
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Sum of the pairs' losses by weight, and TRL's measures, summed alike."""
        logprobs = answer_logprobs(network, inputs)  # [2n]
        if self.config.reference_free:
            reference = mx.zeros_like(logprobs)
        else:
            with self.reference(network):
                reference = mx.stop_gradient(answer_logprobs(network, inputs))
        lengths, weights = inputs["num_answer_tokens"], inputs["weights"]
        losses = pair_losses(logprobs - reference, lengths, self.config)  # [n]
        if self.config.rpo_alpha is not None:
            chosen, _ = halves(logprobs / lengths)
            losses = losses - self.config.rpo_alpha * chosen
        return (losses * weights).sum(), pair_measures(
            logprobs, self.config.beta * (logprobs - reference), weights
        )

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """The measures are means over pairs already."""
        return means


def build(recipe: Recipe, reference: Reference) -> DPO:
    """The objective of a recipe."""
    assert isinstance(recipe.block, DPOConfig)
    return DPO(recipe.block, reference)


def pair_losses(gains: mx.array, lengths: mx.array, config: DPOConfig) -> mx.array:
    """The loss of each pair, [n] float32.

    gains    [2n]  log p(answer) under the model less that under the reference, chosen rows first
    lengths  [2n]  tokens of the answers; ipo compares means (TRL, after the paper's authors)
    """
    beta, smoothing = config.beta, config.label_smoothing
    if config.loss_type == "ipo":
        chosen, rejected = halves(gains / lengths)
        return (chosen - rejected - 1 / (2 * beta)).square()
    chosen, rejected = halves(gains)
    logits = beta * (chosen - rejected)
    if config.loss_type == "hinge":
        return mx.maximum(1 - logits, 0)
    right, wrong = -nn.log_sigmoid(logits), -nn.log_sigmoid(-logits)
    if config.loss_type == "robust":
        return ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing)
    return (1 - smoothing) * right + smoothing * wrong


def pair_measures(logprobs: mx.array, rewards: mx.array, weights: mx.array) -> dict[str, mx.array]:
    """TRL's measures of pairs, each a weighted sum over pairs: logprobs and rewards [2n], weights [n]."""
    chosen, rejected = halves(rewards)
    chosen_logprobs, rejected_logprobs = halves(logprobs)
    measures = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(mx.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": chosen_logprobs,
        "logps/rejected": rejected_logprobs,
    }
    return {name: mx.stop_gradient((values * weights).sum()) for name, values in measures.items()}


def halves(values: mx.array) -> tuple[mx.array, mx.array]:
    """[2n] -> those of the chosen rows [n], and of the rejected rows [n]."""
    half = values.shape[0] // 2
    return values[:half], values[half:]
