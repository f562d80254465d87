"""Kahneman-Tversky optimization: single answers, each wanted or not, in; a loss that parts them from the reference.

Ethayarajh et al. 2024, eq. 7 and 8, as TRL's KTOTrainer computes them (trl 1.16, trainer/kto_trainer.py). The KL term
is estimated on mismatched pairs, each row's prompt with the answer of the row before it in the batch, and is one
number a batch: unlike the other objectives, batch 8 is therefore not 4×2, and larger batches estimate it better. A
batch of one row, which the end of an epoch may be, has no mismatched pair; its estimate is 0, the least there is.
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx
import numpy as np

from serve.model.network import Network
from train.data.batches import padded_length
from train.data.row_media import media_array
from train.loop.objective import Prepared, seen_input
from train.objectives.answers import answer_inputs, answer_logprobs
from train.objectives.reference import Reference, base
from train.recipe.kto import ENTRY, KTOConfig
from train.recipe.recipe import Recipe

MISMATCHED = "mismatched_"


class KTO:
    """Objective kto. A batch of B rows is two forwards, the second of the mismatched pairs, each also for the
    reference. `max_length` bounds a mismatched pair in tokens."""

    name = "kto"
    unit = "row"
    splits_by: Literal["row", "pair"] | None = ENTRY.splits_by

    def __init__(self, config: KTOConfig, reference: Reference = base, *, max_length: int) -> None:
        self.config = config
        self.reference = reference
        self.max_length = max_length

    def prepare(self, batch: Any, *, pad: bool = False) -> Prepared:
        """Host arrays of a batch with labels, and under `mismatched_…` those of its mismatched pairs."""
        assert batch.labels is not None, "kto reads batches with labels"
        num_rows = len(batch.tokens)
        tokens, is_target = mismatched(batch.tokens, batch.is_target, self.max_length)
        inputs = answer_inputs(batch.tokens, batch.is_target, pad=pad)
        others = answer_inputs(tokens, is_target, pad=pad)
        inputs |= {MISMATCHED + name: values for name, values in others.items()}
        if batch.media is not None:
            inputs |= seen_input(batch.media)
            inputs |= seen_input(_of_prompts(batch.media, tokens.shape[1]), MISMATCHED)
        inputs["labels"] = batch.labels.astype(np.float32)
        inputs["weights"] = np.ones(num_rows, np.float32)
        return Prepared(inputs, num_rows)

    def loss(
        self, network: Network, inputs: dict[str, Any], *, trains: bool = True
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Sum of the rows' losses by weight, and TRL's measures, summed alike."""
        others = {
            name.removeprefix(MISMATCHED): v for name, v in inputs.items() if name.startswith(MISMATCHED)
        }
        logprobs = answer_logprobs(network, inputs)  # [B]
        drift = answer_logprobs(network, others)
        with self.reference(network):
            gains = logprobs - mx.stop_gradient(answer_logprobs(network, inputs))
            drift = drift - answer_logprobs(network, others)
        kl = mx.maximum(mx.stop_gradient(drift).mean(), 0)
        losses = row_losses(gains, kl, inputs["labels"], self.config)
        return (losses * inputs["weights"]).sum(), self._measures(logprobs, gains, kl, inputs)

    def _measures(
        self, logprobs: mx.array, gains: mx.array, kl: mx.array, inputs: dict[str, Any]
    ) -> dict[str, mx.array]:
        wanted, weights = inputs["labels"], inputs["weights"]
        values = {"kl": mx.broadcast_to(kl, weights.shape), "chosen": wanted, "rejected": 1 - wanted}
        for name in ("chosen", "rejected"):
            values[f"rewards/{name}"] = self.config.beta * gains * values[name]
            values[f"logps/{name}"] = logprobs * values[name]
        return {name: mx.stop_gradient((value * weights).sum()) for name, value in values.items()}

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """TRL's measures: those of wanted and of unwanted answers are means over such answers alone."""
        measures = {"kl": means["kl"]}
        for name in ("chosen", "rejected"):
            if means[name] > 0:
                measures[f"rewards/{name}"] = means[f"rewards/{name}"] / means[name]
                measures[f"logps/{name}"] = means[f"logps/{name}"] / means[name]
        if "rewards/chosen" in measures and "rewards/rejected" in measures:
            measures["rewards/margins"] = measures["rewards/chosen"] - measures["rewards/rejected"]
        return measures


def build(recipe: Recipe, reference: Reference) -> KTO:
    """The objective of a recipe."""
    assert isinstance(recipe.block, KTOConfig)
    return KTO(recipe.block, reference, max_length=recipe.max_seq_length)


def row_losses(gains: mx.array, kl: mx.array, labels: mx.array, config: KTOConfig) -> mx.array:
    """The loss of each row, [B] float32: weight · (1 - σ(±β (gain - kl))), + where the answer is wanted.

    gains   [B]  log p(answer) under the model less that under the reference
    kl      []   the batch's estimate of the divergence, at least 0, no gradient
    labels  [B]  1 wanted, 0 not
    """
    sign = 2 * labels - 1
    value = mx.sigmoid(config.beta * sign * (gains - kl))
    weight = mx.where(labels > 0, config.desirable_weight, config.undesirable_weight)
    return weight * (1 - value)


def mismatched(tokens: np.ndarray, is_target: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Each row's prompt with the answer of the row before it; the first takes the last one's. TRL's rotation.

    tokens [B, T] int32 and is_target [B, T] bool, right-padded; the same of the new rows, cut at `max_length` tokens.
    A row's answer is what stands from its first target to its last. A row alone comes back without targets.
    """
    if len(tokens) == 1:
        return tokens, np.zeros_like(is_target)
    spans = [np.flatnonzero(row)[[0, -1]] + [0, 1] for row in is_target]
    rows = []
    for index, (start, _) in enumerate(spans):
        other_start, other_stop = spans[index - 1]
        prompt, answer = tokens[index, :start], tokens[index - 1, other_start:other_stop]
        marks = np.concatenate([np.zeros(start, bool), is_target[index - 1, other_start:other_stop]])
        rows.append((np.concatenate([prompt, answer])[:max_length], marks[:max_length]))
    width = int(padded_length(np.array([len(row) for row, _ in rows]).max(), 8))
    new_tokens = np.zeros((len(rows), width), np.int32)
    new_marks = np.zeros((len(rows), width), bool)
    for index, (row, marks) in enumerate(rows):
        new_tokens[index, : len(row)] = row
        new_marks[index, : len(row)] = marks
    return new_tokens, new_marks


def _of_prompts(media: np.ndarray, width: int) -> np.ndarray | None:
    """What mismatched pairs show: their own prompts' media, which stand where they stood."""
    return media_array([[one._replace(stop=width) for one in standing] for standing in media])
