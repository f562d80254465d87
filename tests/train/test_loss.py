"""The loss over chunks of targets is the loss over all of them, in value, gradient and in what it holds in memory."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from serve import device
from train.adapters.adapt import AdapterSettings, add_lora, train_all
from train.loop import loss as loss_file
from train.loop.loss import chunk_rows, cross_entropy, find_targets, sum_loss, target_logprobs

FAMILIES = ("qwen3", "gemma2", "phi3")


@pytest.fixture
def small_chunks(monkeypatch):
    """Three targets a chunk, whatever the vocabulary."""
    monkeypatch.setattr(loss_file, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(loss_file, "MIN_CHUNK_ROWS", 3)


def arrays_of(batch):
    found = find_targets(batch.tokens, batch.is_target)
    return [mx.array(a) for a in (batch.tokens, found.positions, found.token_ids, found.weights)]


def in_one_piece(network, arrays):
    """The sum as MLX itself derives it, from all logits at once."""
    tokens, positions, token_ids, weights = arrays
    hidden = network.hidden(tokens)
    logits = network.logits(hidden.reshape(-1, hidden.shape[-1])[positions]).astype(mx.float32)
    return (nn.losses.cross_entropy(logits, token_ids) * weights).sum()


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_change_neither_the_loss_nor_a_gradient(tiny_network, make_batch, small_chunks, family, kind):
    network = tiny_network(family)
    if kind == "lora":
        add_lora(network, AdapterSettings(rank=4, scale=2.0))
        for name, value in tree_flatten(network.module.trainable_parameters()):
            network.module.load_weights([(name, value + 0.02)], strict=False)
    else:
        train_all(
            network
        )  # qwen3 and gemma2 tie the head to the embedding: both gradients meet in one tensor
    arrays = arrays_of(make_batch([9, 17, 5, 12, 30]))
    assert len(arrays[2]) > 4 * chunk_rows(96)
    arrays[3] = arrays[3] * mx.linspace(0.5, 2.0, len(arrays[3]))  # any weights, not only ones

    def by_logprobs():
        return -(target_logprobs(network, *arrays[:3]) * arrays[3]).sum()

    def summed():
        return sum_loss(network, *arrays)

    wanted, gradients = nn.value_and_grad(network.module, lambda: in_one_piece(network, arrays))()
    gradients = dict(tree_flatten(gradients))
    scale = max(float(mx.abs(g).max()) for g in gradients.values())
    assert scale > 0
    for way in (summed, by_logprobs):
        value, found = nn.value_and_grad(network.module, way)()
        assert float(value) == pytest.approx(float(wanted), rel=1e-5)
        for name, gradient in tree_flatten(found):
            assert float(mx.abs(gradient - gradients[name]).max()) < 1e-4 * scale, (way.__name__, name)
    assert float(sum_loss(network, *arrays, trains=False)) == pytest.approx(float(wanted), rel=1e-5)


def test_the_gradient_of_cross_entropy_is_the_derived_one():
    logits = mx.random.normal((7, 11), key=mx.random.key(0)) * 3
    ids, weights = mx.array([0, 10, 3, 3, 7, 1, 2]), mx.arange(7) / 3
    theirs = mx.value_and_grad(lambda x: (nn.losses.cross_entropy(x, ids) * weights).sum())(logits)
    ours = mx.value_and_grad(lambda x: (cross_entropy(x, ids) * weights).sum())(logits)
    for left, right in zip(ours, theirs, strict=True):
        assert np.allclose(left, right, atol=1e-6)


@pytest.mark.parametrize("trains", [True, False])
def test_peak_memory_holds_a_chunk_of_logits_and_not_all_of_them(tiny_network, trains, monkeypatch):
    if device.backend() == "cuda":
        pytest.skip(
            "MLX's CUDA backend gives memory back a graph of operations at a time, which all of these are in"
        )
    monkeypatch.setattr(loss_file, "MIN_CHUNK_ROWS", 16)
    monkeypatch.setattr(loss_file, "CHUNK_LOGITS", 1)
    network = tiny_network()
    network.module.freeze()
    vocab, targets = 16_384, 1024
    network.module.model.embed_tokens.weight = mx.random.normal((vocab, 64)) * 0.02
    network.layers[1].mlp.down_proj.unfreeze()
    tokens = np.random.default_rng(0).integers(1, vocab, (targets // 16, 17)).astype(np.int32)
    found = find_targets(tokens, np.ones_like(tokens, bool))
    arrays = [mx.array(a) for a in (tokens, found.positions, found.token_ids, found.weights)]
    mx.eval(network.module.parameters(), arrays)

    def peak_of(loss) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(nn.value_and_grad(network.module, loss)() if trains else loss())
        return mx.get_peak_memory() - before

    all_logits = targets * vocab * 4
    chunked = peak_of(lambda: sum_loss(network, *arrays, trains=trains))
    assert peak_of(lambda: in_one_piece(network, arrays)) > all_logits
    assert chunked < 0.5 * all_logits
    if trains:
        by_logprobs = peak_of(lambda: -(target_logprobs(network, *arrays[:3]) * arrays[3]).sum())
        assert by_logprobs < 0.5 * all_logits
