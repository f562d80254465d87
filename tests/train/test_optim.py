"""Schedules mean what they mean in mlx-lm; optimizers take mlx-lm's arguments."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as mlx_optim
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import build_schedule as mlx_lm_build_schedule

from serve.errors import ConfigError
from train.adapters.adapt import embedding_names, train_all
from train.loop.optim import build_optimizer, build_schedule, current_rate

STEPS = (0, 1, 5, 9, 10, 11, 12, 50, 99, 200)


def rates(schedule) -> list[float]:
    return [float(mx.array(schedule(mx.array(step)))) for step in STEPS]


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "cosine_decay", "warmup": 10, "warmup_init": 1e-7, "arguments": [1e-5, 100, 1e-7]},
        {"name": "linear_schedule", "arguments": [1e-4, 0.0, 50]},
        {"name": "exponential_decay", "warmup": 4, "arguments": [1e-3, 0.99]},
        {"name": "step_decay", "arguments": [1e-3, 0.5, 20]},
    ],
)
def test_a_schedule_with_arguments_is_mlx_lms(spec):
    ours = build_schedule(spec, learning_rate=123.0, num_steps=7)
    assert rates(ours) == pytest.approx(rates(mlx_lm_build_schedule(spec)), rel=1e-6)


def test_arguments_left_out_come_from_the_rate_and_the_length_of_the_run():
    filled = build_schedule(
        {"name": "cosine_decay", "final_ratio": 0.1}, learning_rate=1e-3, num_steps=100, warmup_ratio=0.1
    )
    said = {"name": "cosine_decay", "warmup": 10, "arguments": [1e-3, 90, 1e-4]}
    assert rates(filled) == pytest.approx(rates(mlx_lm_build_schedule(said)), rel=1e-6)
    assert rates(build_schedule(None, learning_rate=1e-3, num_steps=100)) == pytest.approx(
        [1e-3] * len(STEPS)
    )


def test_an_unknown_schedule_optimizer_or_argument_is_named():
    with pytest.raises(
        ConfigError, match="found 'cosine'; expected one of constant, linear_schedule, cosine_decay"
    ):
        build_schedule({"name": "cosine"}, learning_rate=1e-3, num_steps=10)
    schedule = build_schedule(None, learning_rate=1e-3, num_steps=10)
    with pytest.raises(ConfigError, match="optimizer: found 'lion'"):
        build_optimizer("lion", {}, schedule, learning_rate=1e-3)
    with pytest.raises(ConfigError, match="found beta; adam takes betas, eps, bias_correction"):
        build_optimizer("adam", {"adam": {"beta": 1}}, schedule, learning_rate=1e-3)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon", "sgd", "adafactor"])
def test_the_schedule_drives_every_optimizer(name, tiny_network):
    network = tiny_network()
    train_all(network)
    weights = network.module.trainable_parameters()
    schedule = build_schedule({"name": "linear_schedule"}, learning_rate=1e-2, num_steps=10)
    optimizer = build_optimizer(name, {}, schedule, learning_rate=1e-2)
    for step in range(3):
        optimizer.apply_gradients(weights, weights)
        assert current_rate(optimizer) == pytest.approx(float(schedule(mx.array(step))), rel=1e-5)


def test_muon_takes_hidden_matrices_at_ten_times_the_rate_and_adamw_the_rest(tiny_network):
    network = tiny_network()
    train_all(network)
    schedule = build_schedule(None, learning_rate=1e-3, num_steps=10)
    names = embedding_names(network)
    assert names == {"model.embed_tokens.weight"}
    config = {"muon": {"momentum": 0.9}, "adamw": {"betas": (0.9, 0.98)}}
    optimizer = build_optimizer("muon", config, schedule, learning_rate=1e-3, embedding_names=names)
    optimizer.init(network.module.trainable_parameters())
    muon, rest = optimizer.optimizers
    assert isinstance(muon, mlx_optim.Muon)
    assert float(muon.learning_rate) == pytest.approx(1e-2)
    assert "q_proj" in muon.state["model"]["layers"][0]["self_attn"]
    assert "embed_tokens" not in muon.state["model"]
    assert "embed_tokens" in rest.state["model"]
    assert rest.state["model"]["layers"][0]["self_attn"].keys() == {"q_norm", "k_norm"}


@pytest.mark.parametrize("name", ["adam", "adamw", "muon", "sgd", "adafactor"])
def test_at_rate_zero_nothing_moves_and_at_half_the_rate_half_as_much(name, tiny_network):
    network = tiny_network()
    train_all(network)
    weights = network.module.trainable_parameters()
    gradients = tree_map(lambda w: w * 0 + 1e-3, weights)
    moves = []
    for rate in (0.0, 1e-3, 2e-3):
        schedule = build_schedule({"name": "constant", "arguments": [rate]}, learning_rate=1e-3, num_steps=10)
        optimizer = build_optimizer(name, {}, schedule, learning_rate=1e-3)
        moved = optimizer.apply_gradients(gradients, weights)
        before, after = dict(tree_flatten(weights)), dict(tree_flatten(moved))
        moves.append(max(float(mx.abs(after[path] - before[path]).max()) for path in before))
    assert moves[0] == 0
    assert moves[2] == pytest.approx(2 * moves[1], rel=1e-2)
