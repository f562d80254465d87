"""How a step works, whole, in the plainest words: the losses of `lathe train`, without what makes it fast and safe.

    python recipes/plain_loop.py recipes/tickets-all.yaml 20

Left out, and where it is: the head on targets only, a chunk at a time (train/loop/loss.py); parts, accumulation,
processes, steps that are not finite (train/loop/step.py); validation, reports, checkpoints (train/loop/trainer.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from serve.model.network import Network
from train.adapters.base import load_base
from train.adapters.build import build_adapted
from train.foresee.preflight import prepare
from train.loop.build import optimizer_of
from train.recipe.recipe import Recipe, load_recipe


def mean_loss(network: Network, tokens: mx.array, is_target: mx.array) -> mx.array:
    """Negative log-likelihood of a batch's targets, in nats each: tokens, is_target [B, T]. A scalar."""
    logits = network.module(tokens[:, :-1]).astype(
        mx.float32
    )  # [B, T - 1, V]: each scores the token after it
    losses = nn.losses.cross_entropy(logits, tokens[:, 1:])  # [B, T - 1]
    return (losses * is_target[:, 1:]).sum() / is_target[:, 1:].sum()


def train(recipe: Recipe, num_steps: int) -> Iterator[float]:
    """The loss of each of the first steps of a recipe (objective sft, one batch a step)."""
    run = prepare(recipe)  # rows read, tokenized, and planned into batches
    model = load_base(recipe)
    mx.random.seed(recipe.seed)
    network = model.network
    build_adapted(recipe, network)  # freezes the base and puts A and B beside its matrices
    optimizer = optimizer_of(recipe, network, run.num_steps)
    loss_and_gradients = nn.value_and_grad(network.module, mean_loss)
    network.module.train()
    for step in range(num_steps):
        batch = run.batch_at(step)
        loss, gradients = loss_and_gradients(network, mx.array(batch.tokens), mx.array(batch.is_target))
        if recipe.max_grad_norm is not None:
            norm = mx.sqrt(sum(gradient.square().sum() for _, gradient in tree_flatten(gradients)))
            shrink = mx.minimum(recipe.max_grad_norm / (norm + 1e-6), 1.0)
            gradients = tree_map(lambda gradient, shrink=shrink: gradient * shrink, gradients)
        optimizer.update(network.module, gradients)
        mx.eval(
            loss, network.module.parameters(), optimizer.state
        )  # the one place where anything is computed
        yield loss.item()


if __name__ == "__main__":
    for number, value in enumerate(train(load_recipe(Path(sys.argv[1])), int(sys.argv[2])), 1):
        sys.stdout.write(f"step {number}: loss {value:.4f}\n")
