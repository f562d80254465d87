"""Learning to guess another model's tokens: its answers go in, a loss that makes them likelier out.

Cross entropy of its tokens (sequence-level distillation: Kim and Rush 2016), KL(teacher ‖ drafter) at them (Hinton,
Vinyals and Dean 2015), or both; at the temperature at which it answered.
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx

from serve.model.network import Network
from train.loop.loss import Losses, cross_entropy, find_targets, hidden_at, sum_of_losses
from train.loop.objective import Prepared
from train.objectives.reference import Reference
from train.objectives.teacher import Teacher
from train.recipe.draft import ENTRY, DraftConfig
from train.recipe.recipe import Recipe


class Draft:
    """Objective draft. A batch is B answers of the teacher; where kd_alpha is not 0, it reads them too."""

    name = "draft"
    unit = "target"
    splits_by: Literal["row", "pair"] | None = ENTRY.splits_by

    def __init__(self, config: DraftConfig, teacher: Teacher) -> None:
        self.config = config
        self.teacher = teacher

    def prepare(self, batch: Any, *, pad: bool = False) -> Prepared:
        """tokens [B, T], positions, token_ids and weights [N]."""
        targets = find_targets(batch.tokens, batch.is_target, pad=pad)
        inputs = {
            "tokens": batch.tokens,
            "positions": targets.positions,
            "token_ids": targets.token_ids,
            "weights": targets.weights,
        }
        return Prepared(inputs, targets.num_targets)

    def loss(
        self, network: Network, inputs: dict[str, Any], *, trains: bool = True
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """Σ weight · loss of the teacher's tokens. What a validation measures is `acceptance`'s."""
        hidden = hidden_at(network, inputs["tokens"], inputs["positions"])
        return sum_of_losses(network, hidden, inputs["weights"], self.losses(inputs), trains=trains), {}

    def losses(self, inputs: dict[str, Any]) -> Losses:
        """Of the drafter's logits at these inputs' targets, in nats."""
        config, token_ids = self.config, inputs["token_ids"]
        temperature = config.temperature or 1.0  # of greedy answers, the likeliest token is what counts
        taught = self._taught(inputs) if config.kd_alpha else None

        def losses(logits: mx.array, rows: slice) -> mx.array:
            logits = logits / temperature
            found = mx.zeros(len(logits))
            if config.kd_ce_alpha:
                found = found + config.kd_ce_alpha * cross_entropy(logits, token_ids[rows])  # type: ignore[operator]
            if taught is not None:
                logits_taught = self.teacher.network.logits(taught[rows]).astype(mx.float32) / temperature
                found = found + config.kd_alpha * kl_divergence(logits_taught, logits)
            return found

        return losses

    def _taught(self, inputs: dict[str, Any]) -> mx.array:
        """The teacher's hidden states at the targets, [N, D]."""
        return mx.stop_gradient(hidden_at(self.teacher.network, inputs["tokens"], inputs["positions"]))

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """Nothing is measured in training but the loss."""
        return means


def kl_divergence(of_teacher: mx.array, logits: mx.array) -> mx.array:
    """KL(teacher ‖ drafter), [n] in nats, of logits [n, V] each. Logits that only one has stand for no token."""
    width = min(of_teacher.shape[-1], logits.shape[-1])
    p, q = (
        each[:, :width] - mx.logsumexp(each[:, :width], axis=-1, keepdims=True)
        for each in (of_teacher, logits)
    )
    return (mx.exp(p) * (p - q)).sum(axis=-1)


def build(recipe: Recipe, reference: Reference) -> Draft:
    """The objective of a recipe."""
    teacher = Teacher.of(recipe)
    assert isinstance(recipe.block, DraftConfig)
    assert teacher is not None
    return Draft(recipe.block, teacher)
