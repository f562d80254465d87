"""Odds-ratio preference optimization: pairs of answers in, one loss without a reference.

The chosen answer's negative log-likelihood, plus β times -log σ of the log odds ratio of chosen over rejected, both
by mean log-probability a token. Hong et al. 2024, eq. 6 and 7; TRL's ORPOTrainer (trl 1.16,
experimental/orpo/orpo_trainer.py). The likelihood is a mean over each pair's own tokens and then over pairs, so that
batch 8 ≡ 4×2; TRL's is over the tokens of its micro-batch, which is the same where chosen rows are equally long.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from serve.model.network import Network
from train.loop.loss import beside, target_logprobs
from train.loop.objective import Prepared, seen_input
from train.objectives.answers import answer_inputs, sum_by_row
from train.objectives.dpo import halves, pair_measures
from train.objectives.reference import Reference
from train.recipe.orpo import ENTRY, ORPOConfig
from train.recipe.recipe import Recipe


class ORPO:
    """Objective orpo. A batch of n pairs is one forward of 2n rows."""

    name = "orpo"
    unit = "pair"
    splits_by: Literal["row", "pair"] | None = ENTRY.splits_by

    def __init__(self, config: ORPOConfig) -> None:
        self.config = config

    def prepare(self, batch: Any, *, pad: bool = False) -> Prepared:
        """Host arrays of a preference batch.

        Beside those of `answer_inputs`, here over all counted tokens: in_answer [N] float32, those the odds are of;
        in_nll [N] float32, those the likelihood is of, divided by their number in the pair.
        """
        num_pairs = len(batch.tokens) // 2
        counted = batch.is_target.copy()
        if self.config.nll_over == "sequence":
            counted[:num_pairs] |= _up_to_last(batch.is_target[:num_pairs])
        inputs = answer_inputs(batch.tokens, counted, pad=pad)
        places = inputs["positions"] + 1  # of the counted tokens themselves
        in_answer = batch.is_target.reshape(-1)[places] * inputs["is_real"]
        in_nll = (
            (inputs["rows"] < num_pairs) * inputs["is_real"] / inputs["num_answer_tokens"][inputs["rows"]]
        )
        answer_lengths = np.maximum(batch.is_target[:, 1:].sum(axis=1), 1)
        return Prepared(
            {
                **inputs,
                **seen_input(batch.media),
                "num_answer_tokens": answer_lengths.astype(np.float32),
                "in_answer": in_answer.astype(np.float32),
                "in_nll": in_nll.astype(np.float32),
                "weights": np.ones(num_pairs, np.float32),
            },
            num_pairs,
        )

    def loss(
        self, network: Network, inputs: dict[str, Any], *, trains: bool = True
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Sum of the pairs' losses by weight, and TRL's measures, summed alike."""
        rows, weights, num_rows = inputs["rows"], inputs["weights"], len(inputs["tokens"])
        tokens = target_logprobs(
            network, inputs["tokens"], inputs["positions"], inputs["token_ids"], **beside(inputs)
        )  # [N]
        means = sum_by_row(tokens * inputs["in_answer"], rows, num_rows) / inputs["num_answer_tokens"]  # [2n]
        nll, _ = halves(-sum_by_row(tokens * inputs["in_nll"], rows, num_rows))  # [n]
        log_odds = log_odds_ratio(means)
        ratio = nn.log_sigmoid(log_odds)
        losses = nll - self.config.beta * ratio
        measures = {
            **pair_measures(means, self.config.beta * means, weights),
            **{
                name: mx.stop_gradient((values * weights).sum())
                for name, values in (
                    ("nll_loss", nll),
                    ("log_odds_ratio", ratio),
                    ("log_odds_chosen", log_odds),
                )
            },
        }
        return (losses * weights).sum(), measures

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """The measures are means over pairs already."""
        return means


def build(recipe: Recipe, reference: Reference) -> ORPO:
    """The objective of a recipe."""
    assert isinstance(recipe.block, ORPOConfig)
    return ORPO(recipe.block)


def log_odds_ratio(means: mx.array) -> mx.array:
    """log of odds(chosen) / odds(rejected), [n]; means [2n] are mean log-probabilities, chosen rows first."""
    chosen, rejected = halves(means - log1mexp(means))
    return chosen - rejected


def log1mexp(x: mx.array) -> mx.array:
    """log(1 - e^x) for x < 0, without cancellation on either side of -log 2 (Mächler 2012)."""
    # Either branch sees an argument it is good for, so that the other's infinity never meets a zero gradient. A model
    # that is certain of an answer has mean 0 in float32; the bound keeps its odds finite.
    x = mx.minimum(x, -1e-7)
    is_far = x < -math.log(2)
    far = mx.log1p(-mx.exp(mx.where(is_far, x, -1.0)))
    near = mx.log(-mx.expm1(mx.where(is_far, -0.5, x)))
    return mx.where(is_far, far, near)


def _up_to_last(is_target: np.ndarray) -> np.ndarray:
    """[B, T] bool: the tokens of each row up to its last target, the first token aside, which nothing predicts."""
    columns = np.arange(is_target.shape[1])
    ends = np.where(is_target, columns, -1).max(axis=1)
    return (columns >= 1) & (columns <= ends[:, None])
