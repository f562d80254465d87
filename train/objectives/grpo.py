"""Group-relative policy optimization: answers the model gave, with their advantages, in; a loss that makes the better
ones likelier out.

Each batch is answered by the weights that learn from it, and serves one update: the ratio to the policy that wrote it
is 1 in value, and only its gradient counts, so there is nothing to clip. Shao et al. 2024, eq. 3 and 4; TRL's
GRPOTrainer (trl 1.16, trainer/grpo_trainer.py, `_compute_loss`) with num_iterations 1.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from serve.model.network import Network
from train.loop.loss import beside, find_targets, target_logprobs
from train.loop.objective import Prepared, seen_input
from train.objectives.answers import sum_by_row
from train.objectives.reference import Reference, base
from train.recipe.grpo import ENTRY, GRPOConfig
from train.recipe.recipe import Recipe

SCORE = "score/"
"""Inputs that measure rows and take no part in the loss: score/name, [B] float32."""


class GRPO:
    """Objective grpo. A batch is B answers of one forward, and one more for the reference where beta is not 0."""

    name = "grpo"
    splits_by: Literal["row", "pair"] | None = ENTRY.splits_by

    def __init__(self, config: GRPOConfig, reference: Reference = base) -> None:
        self.config = config
        self.reference = reference
        self.unit = "target" if config.loss_type == "dapo" else "row"

    def prepare(self, batch: Any, *, pad: bool = False) -> Prepared:
        """Host arrays of a batch with advantages and, from `train.objectives.rollouts`, scores.

        rows [N] int32, the row of each target · advantages [N] float32
        ones [N] float32, 1 for each target, whatever its weight · kept [N] float32, 0 where its row is masked
        shares [N] float32, a row's 1 spread over its targets
        """
        targets = find_targets(batch.tokens, batch.is_target, pad=pad)
        rows = targets.positions // batch.tokens.shape[1]
        lengths = np.maximum(np.bincount(rows, weights=targets.weights, minlength=len(batch.tokens)), 1)[rows]
        weight = {
            "dapo": np.ones_like(lengths),
            "grpo": 1 / lengths,
            "dr_grpo": np.full_like(lengths, 1 / self.config.max_completion_length),
        }[self.config.loss_type]
        masked = getattr(batch, "is_masked", None)
        kept = np.ones_like(lengths) if masked is None else 1.0 - masked[rows]
        floats = {
            "advantages": batch.advantages[rows],
            "weights": targets.weights * weight * kept,
            "ones": targets.weights,
            "kept": kept,
            "shares": targets.weights / lengths,
            **{SCORE + name: values for name, values in getattr(batch, "scores", {}).items()},
        }
        return Prepared(
            {
                "tokens": batch.tokens,
                **seen_input(batch.media),
                "positions": targets.positions,
                "token_ids": targets.token_ids,
                "rows": rows.astype(np.int32),
                **{name: values.astype(np.float32) for name, values in floats.items()},
            },
            int((targets.weights * kept).sum()) if self.unit == "target" else len(batch.tokens),
            scaled=("weights", "ones", "shares"),
            is_measured=True,
        )

    def loss(
        self, network: Network, inputs: dict[str, Any], *, trains: bool = True
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Sum of the targets' losses by weight, and what `summarize` makes measures of."""
        logprobs = self._logprobs(network, inputs)
        ratio = mx.exp(logprobs - mx.stop_gradient(logprobs))
        losses = -inputs["advantages"] * ratio
        weights, ones, shares = inputs["weights"], inputs["ones"], inputs["shares"]
        counted = ones * inputs["kept"]
        by_row = sum_by_row(shares, inputs["rows"], len(inputs["tokens"]))  # [B]
        sums = {"rows": shares.sum(), "targets": ones.sum()}
        sums |= {name: (by_row * values).sum() for name, values in inputs.items() if name.startswith(SCORE)}
        if self.config.beta:
            with self.reference(network):
                reference = mx.stop_gradient(self._logprobs(network, inputs))
            kl = kl_divergence(logprobs, reference)
            losses = losses + self.config.beta * kl
            sums["kl"] = mx.stop_gradient((counted * kl).sum())
            sums["counted"] = counted.sum()
        return (losses * weights).sum(), sums

    def _logprobs(self, network: Network, inputs: dict[str, Any]) -> mx.array:
        return target_logprobs(
            network,
            inputs["tokens"],
            inputs["positions"],
            inputs["token_ids"],
            **beside(inputs),
            temperature=self.config.temperature,
        )

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """TRL's measures, from `loss`'s means over units; those over rows and over targets are told apart."""
        rows, targets = means["rows"], means["targets"]
        scores = {n.removeprefix(SCORE): value / rows for n, value in means.items() if n.startswith(SCORE)}
        measures = summary_of_scores(scores) | {"completions/mean_length": targets / rows}
        return measures | ({"kl": means["kl"] / (means["counted"] or 1.0)} if "kl" in means else {})


def build(recipe: Recipe, reference: Reference) -> GRPO:
    """The objective of a recipe."""
    assert isinstance(recipe.block, GRPOConfig)
    return GRPO(recipe.block, reference)


def kl_divergence(logprobs: mx.array, reference: mx.array) -> mx.array:
    """e^(r - p) - (r - p) - 1, [N], at least 0: an estimate of KL(model || reference) on the model's own tokens.

    Schulman's k3; eq. 4. logprobs, reference [N], in nats.
    """
    difference = reference - logprobs
    return mx.exp(difference) - difference - 1


def summary_of_scores(means: dict[str, float]) -> dict[str, float]:
    """Means over answers -> measures: the rewards' spread from their mean square, and each reward's mean over the
    answers that it scored, whose share is under `scored/`."""
    measures = {}
    for name, value in means.items():
        if name == "reward_squared":
            measures["reward_std"] = math.sqrt(max(value - means["reward"] ** 2, 0.0))
        elif name.startswith("rewards/"):
            share = means["scored/" + name.removeprefix("rewards/")]
            measures[name] = value / share if share else 0.0
        elif not name.startswith("scored/"):
            measures[name] = value
    return measures
