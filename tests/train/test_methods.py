"""Every way to adapt a model: the maths against its definition, what moves, and the folder against mlx-lm."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from serve import device
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.manifest import write_adapter
from serve.adapters.layers.dora import DoRALinear, adapted_norms
from serve.adapters.layers.lora import AdaptedLayer, LoRALinear
from serve.errors import ConfigError
from serve.model.weights import dense_weight, linear_shape
from train.adapters.adapt import (
    AdapterSettings,
    adapted_layers,
    adapter_tensors,
    adapters_off,
    add_lora,
    set_tensors,
    train_all,
    trainable_tensors,
)
from train.adapters.pissa import start_on_principal
from train.after.export import fuse
from train.loop import checkpoint
from train.loop.optim import build_optimizer, build_schedule
from train.loop.step import Stepper, StepSettings
from train.loop.trainer import TrainState
from train.objectives.sft import SFT

PACKINGS = [("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)] + [
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
    ("mxfp8", 8, 32),
]
HEAD = {"tie_word_embeddings": False}
METHODS = {
    "lora": ("qwen3", {}, {}),
    "dora": ("qwen3", {}, {"fine_tune_type": "dora"}),
    "pissa": ("qwen3", {}, {"init": "pissa"}),
    "pissa_niter": ("qwen3", {}, {"init": "pissa_niter_4"}),
    "head": ("qwen3", HEAD, {"keys": ["lm_head", "q_proj"]}),
    "dora head": ("qwen3", HEAD, {"keys": ["lm_head", "q_proj"], "fine_tune_type": "dora"}),
    "experts": ("qwen3_moe", {}, {}),
    "pissa experts": ("qwen3_moe", {}, {"init": "pissa", "keys": ["switch_mlp.*", "q_proj"]}),
    "dora bias": ("qwen2", {}, {"fine_tune_type": "dora"}),
}


@pytest.fixture
def adapt(tiny_network):
    """adapt(method, seed=0, packing=None) → (network, what was adapted), freshly begun."""

    def make(method: str, *, packing=None, rank=3, dropout=0.0):
        family, changes, options = METHODS[method]
        network = tiny_network(family, **changes)
        if packing is not None:
            mode, bits, group_size = packing
            nn.quantize(
                network.module,
                group_size,
                bits,
                mode=mode,
                class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0,
            )
        mx.random.seed(7)
        return network, add_lora(network, AdapterSettings(rank=rank, scale=2.0, dropout=dropout, **options))

    return make


def moved(network, size=0.1):
    """Every trainable tensor somewhere else."""
    mx.random.seed(11)
    for name, tensor in trainable_tensors(network).items():
        step = size * mx.random.normal(tensor.shape) * (mx.abs(tensor).mean() + 0.1)
        network.module.load_weights([(name, tensor + step)], strict=False)
    return network


def logits(network, batch) -> np.ndarray:
    return np.array(network.module(mx.array(batch.tokens)))


@pytest.mark.parametrize("packing", [None, *PACKINGS])
@pytest.mark.parametrize("has_bias", [True, False])
def test_dora_is_its_definition_on_every_kind_of_base(packing, has_bias):
    mx.random.seed(0)
    linear = nn.Linear(64, 48, bias=has_bias)
    if packing is not None:
        mode, bits, group_size = packing
        linear = linear.to_quantized(group_size, bits, mode=mode)
    layer = DoRALinear.from_base(linear, rank=5, scale=3.0)
    assert linear_shape(linear) == (64, 48)
    w = np.array(dense_weight(linear).astype(mx.float32), np.float64)
    assert np.array(layer.m) == pytest.approx(np.linalg.norm(w, axis=1), rel=1e-5)
    x = mx.random.normal((2, 7, 64))
    assert np.abs(np.array(layer(x)) - np.array(linear(x))).max() < 1e-6, "it starts unchanged"

    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    layer.m = layer.m * mx.random.uniform(0.5, 2, layer.m.shape)
    a, b, m = (np.array(part, np.float64) for part in (layer.lora_a, layer.lora_b, layer.m))
    adapted = w + 3.0 * (a @ b).T
    norms = adapted_norms(linear, layer._squared, layer.lora_a, layer.lora_b, 3.0)
    assert np.array(norms) == pytest.approx(np.linalg.norm(adapted, axis=1), rel=1e-5)
    whole = (m / np.linalg.norm(adapted, axis=1))[:, None] * adapted
    bias = np.array(linear.bias, np.float64) if has_bias else 0.0
    expected = np.array(x, np.float64) @ whole.T + bias
    assert np.abs(np.array(layer(x)) - expected).max() < 1e-4 * np.abs(expected).max()
    fused = layer.fuse()
    # Small floats dequantize to bfloat16, and so does what is fused over them.
    tolerance = 1e-4 if fused.weight.dtype == mx.float32 else 2e-2
    assert np.abs(np.array(fused(x)) - expected).max() < tolerance * np.abs(expected).max()


def test_a_dora_row_of_zeros_stays_finite():
    linear = nn.Linear(8, 4, bias=False)
    linear.weight[1] = 0
    layer = DoRALinear.from_base(linear, rank=2, scale=1.0)

    def loss(parameters):
        layer.update(parameters)
        return layer(mx.ones((1, 8))).sum()

    gradients = mx.grad(loss)(layer.trainable_parameters())
    assert all(bool(mx.isfinite(g).all()) for _, g in tree_flatten(gradients))
    assert layer(mx.ones((1, 8)))[0, 1].item() == 0


def test_a_small_change_of_length_survives_half_precision():
    """Near 1, bfloat16 has steps of 0.8 %: m / norm itself would be 1.0078 or 1, its difference to 1 is not."""
    mx.random.seed(0)
    linear = nn.Linear(64, 48, bias=False)
    linear.weight = linear.weight.astype(mx.bfloat16)
    layer = DoRALinear.from_base(linear, rank=4, scale=1.0)
    layer.m = layer.m * 1.0055
    x = mx.random.normal((256, 64)).astype(mx.bfloat16)
    plain, longer = (np.array(f(x).astype(mx.float32), np.float64) for f in (linear, layer))
    assert (plain * longer).sum() / (plain * plain).sum() == pytest.approx(1.0055, abs=7e-4)


@pytest.mark.parametrize("packing", [None, ("affine", 4, 32), ("mxfp4", 4, 32)])
@pytest.mark.parametrize("method", METHODS)
def test_every_trainable_tensor_moves_and_no_frozen_one_does(adapt, make_batch, method, packing):
    network, adapted = adapt(method, packing=packing, dropout=0.1)
    batch = make_batch([9, 14])
    trained = set(trainable_tensors(network))
    assert trained
    assert adapted.num_trainable == sum(t.size for t in trainable_tensors(network).values())
    before = {
        name: np.array(value.view(mx.uint8)) for name, value in tree_flatten(network.module.parameters())
    }
    frozen = [np.array(layer.get("_a0")) for layer in adapted_layers(network).values() if layer.has_principal]
    stepper = Stepper(network, mlx_optim.Adam(1e-2), SFT())
    for step in range(2):
        stepper.step([batch], step)
    for name, value in tree_flatten(network.module.parameters()):
        is_same = np.array_equal(before[name], np.array(value.view(mx.uint8)))
        assert is_same == (name not in trained), name
    after = [np.array(layer.get("_a0")) for layer in adapted_layers(network).values() if layer.has_principal]
    assert all(np.array_equal(a, b) for a, b in zip(frozen, after, strict=True))
    assert bool(frozen) == ("pissa" in method)


@pytest.mark.parametrize("method", ["dora", "pissa", "experts", "dora head"])
def test_recomputed_activations_give_the_same_step(adapt, make_batch, method):
    after = []
    for recompute in (False, True):
        network, _ = adapt(method, dropout=0.0)
        moved(network)
        Stepper(network, mlx_optim.SGD(1.0), SFT(), StepSettings(recompute=recompute)).step(
            [make_batch([9, 14])], 0
        )
        after.append({name: np.array(value) for name, value in trainable_tensors(network).items()})
    for name, value in after[0].items():
        assert np.abs(after[1][name] - value).max() <= 1e-5 * np.abs(value).max(), name


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_and_one_switched_off_change_nothing(tiny_network, adapt, make_batch, method):
    family, changes, _ = METHODS[method]
    batch = make_batch([9, 17])
    plain = logits(tiny_network(family, **changes), batch)
    network, _ = adapt(method)
    assert np.abs(logits(network, batch) - plain).max() <= 1e-5 * np.abs(plain).max()
    moved(network)
    assert np.abs(logits(network, batch) - plain).max() > 1e-3 * np.abs(plain).max()
    with adapters_off(network):
        assert np.array_equal(logits(network, batch), plain)
    assert np.abs(logits(network, batch) - plain).max() > 1e-3 * np.abs(plain).max()


def test_a_full_fine_tune_has_no_reference_to_fall_back_on(tiny_network):
    network = tiny_network()
    train_all(network)
    with pytest.raises(ConfigError, match="full keeps no reference model"), adapters_off(network):
        pass


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_of_every_method_reloads_in_mlx_lm_with_the_same_logits(
    tiny_network, adapt, make_batch, tmp_path, method
):
    family, changes, options = METHODS[method]
    network, adapted = adapt(method)
    moved(network)
    config = AdapterConfig(
        adapted.fine_tune_type,
        adapted.num_layers,
        adapted.rank,
        2.0,
        keys=adapted.keys,
        init_lora_weights=options.get("init", "default"),
    )
    write_adapter(tmp_path, adapter_tensors(network), config)
    theirs = tiny_network(family, **changes)
    load_adapters(theirs.module, str(tmp_path))
    theirs.module.eval()
    ours, expected = (logits(n, make_batch([9, 17, 5])) for n in (network, theirs))
    assert np.abs(ours - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("packing", [None, ("affine", 4, 32)])
@pytest.mark.parametrize("method", METHODS)
def test_fused_weights_of_every_method_answer_as_the_adapter_does(adapt, make_batch, method, packing):
    network, _ = adapt(method, packing=packing)
    moved(network)
    batch = make_batch([9, 17, 5])
    wanted = logits(network, batch)
    fuse(network)
    assert not any(isinstance(module, AdaptedLayer) for module in network.module.modules())
    assert np.abs(logits(network, batch) - wanted).max() < 1e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("method", METHODS)
def test_tensors_of_a_folder_put_a_network_back_bit_for_bit(adapt, method):
    network, adapted = adapt(method)
    moved(network)
    kept = {name: np.array(value) for name, value in adapter_tensors(network).items()}
    train = {name: np.array(value) for name, value in trainable_tensors(network).items()}
    other, _ = adapt(method)
    set_tensors(other, {name: mx.array(value) for name, value in kept.items()}, "there")
    assert all(
        np.array_equal(value, np.array(trainable_tensors(other)[name])) for name, value in train.items()
    )
    assert all(np.array_equal(value, np.array(adapter_tensors(other)[name])) for name, value in kept.items())
    assert adapted.rank == (6 if "pissa" in method else 3)


def test_a_restored_pissa_computes_no_singular_values_and_is_the_same(tiny_network, adapt, make_batch):
    network, _ = adapt("pissa")
    moved(network)
    other = tiny_network()
    add_lora(other, AdapterSettings(rank=3, scale=2.0, init="pissa"), is_restored=True)
    set_tensors(other, adapter_tensors(network), "there")
    assert np.array_equal(logits(other, make_batch([9])), logits(network, make_batch([9])))


def test_pissa_of_more_than_the_weight_has_is_refused(tiny_network):
    with pytest.raises(ConfigError, match=r"found 33; init_lora_weights: pissa needs at most 32, .*k_proj"):
        add_lora(tiny_network(), AdapterSettings(rank=33, scale=2.0, keys=["k_proj"], init="pissa"))


def test_power_iterations_find_the_principal_part_of_a_weight_that_has_one():
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 16)))[0] for n in (48, 64))
    weight = (u * 0.5 ** np.arange(16)) @ v.T
    linear = nn.Linear(64, 48, bias=False)
    linear.weight = mx.array(weight.astype(np.float32))
    layer = LoRALinear.from_base(linear, rank=4, scale=2.0)
    start_on_principal("it", layer, "pissa_niter_8")
    rest = weight - 2.0 * np.array(layer.lora_a @ layer.lora_b).T
    assert np.linalg.norm(rest, 2) == pytest.approx(0.5**4, rel=1e-3)


def loraplus(network, name, ratio, rate=1e-3):
    schedule = build_schedule({"name": "linear_schedule"}, learning_rate=rate, num_steps=10)
    return build_optimizer(name, {}, schedule, learning_rate=rate, loraplus_ratio=ratio)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon", "sgd"])
def test_loraplus_moves_b_at_its_own_rate_all_along_the_schedule(adapt, name):
    network, _ = adapt("dora")
    moved(network)
    weights = network.module.trainable_parameters()
    gradients = mx.grad(lambda w: sum((t * t).sum() for _, t in tree_flatten(w)))(weights)

    def steps(ratio):
        optimizer, out = loraplus(network, name, ratio), []
        for _ in range(3):
            new = dict(tree_flatten(optimizer.apply_gradients(gradients, weights)))
            old = dict(tree_flatten(weights))
            out.append({k: np.abs(np.array(new[k] - old[k])).max() for k in new})
        return out

    for plain, fast in zip(steps(None), steps(16.0), strict=True):
        for path in plain:
            factor = 16 if path.endswith(".lora_b") else 1
            assert fast[path] == pytest.approx(factor * plain[path], rel=0.02), path


@pytest.mark.parametrize("name", ["adam", "muon", "adafactor"])
@pytest.mark.parametrize("method", ["dora", "pissa", "experts"])
def test_a_run_resumed_with_any_method_and_loraplus_is_bit_for_bit(adapt, make_batch, tmp_path, method, name):
    if method == "experts" and device.backend() == "cuda":
        pytest.skip("MLX's CUDA backend adds up the experts' gradients in no fixed order")

    batches = [make_batch([9, 12 + i], seed=i) for i in range(4)]

    def run(start=None, end=4):
        network, adapted = adapt(method, dropout=0.1)
        network.module.train()
        optimizer = loraplus(network, name, 8.0)
        stepper = Stepper(network, optimizer, SFT(), StepSettings(seed=1))
        if start is not None:
            saved = checkpoint.load(start)
            set_tensors(network, saved.tensors, str(start))
            checkpoint.restore_optimizer(optimizer, saved.optimizer)
        for i in range(2 if start else 0, end):
            stepper.step([batches[i]], i)
        config = AdapterConfig(adapted.fine_tune_type, -1, adapted.rank, 2.0, keys=adapted.keys)
        folder = tmp_path / f"{start is not None}-{end}"
        state = dataclasses.replace(TrainState(), step=end, iteration=end)
        return checkpoint.save(folder, adapter_tensors(network), optimizer, config, state, {}, 0)

    straight = checkpoint.load(run())
    resumed = checkpoint.load(run(start=run(end=2)))
    for ours, theirs in ((resumed.tensors, straight.tensors), (resumed.optimizer, straight.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(np.array(ours[key]), np.array(theirs[key])) for key in ours)
