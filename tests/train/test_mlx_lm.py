"""Beside mlx_lm.lora: the same losses, step by step, where it is right; and a test for each place where it is not."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
from mlx_lm.tuner.datasets import CacheDataset
from mlx_lm.tuner.trainer import default_loss, iterate_batches

from train.adapters.adapt import AdapterSettings, add_lora, train_all
from train.data.batches import Batch, BatchPlan, collate
from train.data.tokens import TokenizedExample
from train.loop.step import Stepper
from train.objectives.sft import SFT

STEPS = 5


def example(length: int, prompt: int, line: int = 0) -> TokenizedExample:
    tokens = np.random.default_rng(line).integers(1, 96, length).astype(np.int32)
    return TokenizedExample(tokens, np.arange(length) >= max(prompt, 1), "f", line)


def as_theirs(batch: Batch, prompts: list[int], lengths: list[int]) -> tuple[mx.array, mx.array]:
    return mx.array(batch.tokens), mx.array(list(zip(prompts, lengths, strict=True)))


@pytest.mark.parametrize("prompts", [[0, 0, 0], [5, 11, 2]], ids=["whole", "mask_prompt"])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "qwen3_moe"])
def test_losses_are_those_of_mlx_lm_step_by_step_where_no_row_is_padded(tiny_network, family, kind, prompts):
    batches = [collate([example(25, prompt, row) for row, prompt in enumerate(prompts)], range(3))] * STEPS
    assert batches[0].tokens.shape == (3, 25)

    def network():
        made = tiny_network(family)
        mx.random.seed(4)
        train_all(made) if kind == "full" else add_lora(made, AdapterSettings(rank=4, scale=4.0))
        made.module.train()
        return made

    theirs = network().module
    optimizer = mlx_optim.SGD(0.1, momentum=0.9)
    gradients_of = nn.value_and_grad(theirs, default_loss)
    expected = []
    for batch in batches:
        (loss, count), gradients = gradients_of(theirs, *as_theirs(batch, prompts, [25] * 3))
        optimizer.update(theirs, gradients)
        mx.eval(theirs.parameters(), optimizer.state)
        assert count.item() == batch.num_targets
        expected.append(loss.item())
    stepper = Stepper(network(), mlx_optim.SGD(0.1, momentum=0.9), SFT())
    losses = [stepper.step([batch], index).loss for index, batch in enumerate(batches)]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert expected[0] - expected[-1] > 0.05


def test_ours_leaves_the_pad_after_each_row_out_and_mlx_lm_counts_it(tiny_network):
    lengths = [25, 9, 17]
    batch = collate([example(length, 0, row) for row, length in enumerate(lengths)], range(3))
    network = tiny_network()
    _, count = default_loss(network.module, *as_theirs(batch, [0] * 3, lengths))
    assert batch.num_targets == sum(length - 1 for length in lengths)
    assert count.item() == batch.num_targets + 2  # one for each row with padding behind it


def test_a_row_without_targets_gives_mlx_lm_no_number_and_ours_no_weight(tiny_network):
    network = tiny_network()
    train_all(network)
    empty, full = example(9, 40, 0), example(9, 3, 1)
    theirs, _ = default_loss(network.module, *as_theirs(collate([empty], [0]), [40], [9]))
    assert math.isnan(theirs.item())
    alone = Stepper(tiny_network(), mlx_optim.SGD(0.0), SFT()).step([collate([full], [0])], 0)
    beside = Stepper(tiny_network(), mlx_optim.SGD(0.0), SFT()).step([collate([empty, full], [0, 1])], 0)
    assert beside.num_units == alone.num_units == 6
    assert beside.loss == pytest.approx(alone.loss, rel=1e-5)


def test_accumulation_weighs_targets_and_not_batches(tiny_network):
    batches = [collate([example(33, 0, 0)], [0]), collate([example(9, 6, 1)], [0])]
    counts = [batch.num_targets for batch in batches]
    assert counts == [32, 3]
    network = tiny_network()
    means = [
        default_loss(network.module, *as_theirs(batch, [prompt], [length]))[0].item()
        for batch, prompt, length in zip(batches, (0, 6), (33, 9), strict=True)
    ]
    found = Stepper(network, mlx_optim.SGD(0.0), SFT()).step(batches, 0)
    assert found.loss == pytest.approx(np.average(means, weights=counts), rel=1e-5)
    assert abs(found.loss - np.mean(means)) > 1e-3  # what mlx_lm.lora takes its gradient of


def test_sorting_by_length_pads_a_tenth_of_what_mlx_lm_pads():
    lengths = np.clip(np.exp(np.random.default_rng(0).normal(5, 0.8, 800)), 4, 2048).astype(int).tolist()

    class Rows:
        def __len__(self):
            return len(lengths)

        def __getitem__(self, index):
            return {"messages": [], "id": index}

        def process(self, row):
            return [1] * lengths[row["id"]], 0

    batches = list(iterate_batches(CacheDataset(Rows()), 8, 2048, seed=0))
    positions = sum(tokens.size for tokens, _ in batches)
    theirs = 1 - sum(int(np.array(spans)[:, 1].sum()) for _, spans in batches) / positions
    assert theirs > 0.5
    assert BatchPlan(lengths, 8, seed=0).padding_share < theirs / 5


def test_evaluating_moves_no_global_randomness_of_numpy(tiny_network):
    """mlx_lm draws the order of training and of validation from the same global generator."""
    from train.loop.step import mean_loss

    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    mean_loss(tiny_network(), [collate([example(9, 3)], [0])], SFT())
    assert np.random.random() == expected
