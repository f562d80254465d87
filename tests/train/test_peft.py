"""PEFT on CPU torch as the oracle: the same weights, the same input, the same output and gradients."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from serve.adapters.fitting.fit import check_fit
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.header import specs_of
from serve.adapters.layers.dora import DoRALinear
from serve.adapters.layers.lora import LoRALinear
from serve.errors import AdapterError
from serve.model.loading import load
from train.adapters.pissa import start_on_principal
from train.adapters.place import place_adapter
from train.recipe.recipe import LoRAParameters

torch = pytest.importorskip("torch", reason="PEFT runs on torch: pip install '.[dev]'")
peft = pytest.importorskip("peft", reason="the oracle: pip install '.[dev]'")

INPUTS, OUTPUTS, RANK = 24, 20, 4
ALPHA = 6.0
TIED = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(OUTPUTS, INPUTS)).astype(np.float32)
BIAS = RNG.normal(size=OUTPUTS).astype(np.float32)
X = RNG.normal(size=(3, 5, INPUTS)).astype(np.float32)
COTANGENT = RNG.normal(size=(3, 5, OUTPUTS)).astype(np.float32)
A = RNG.normal(size=(INPUTS, RANK)).astype(np.float32)
B = RNG.normal(size=(RANK, OUTPUTS)).astype(np.float32)
M = RNG.uniform(0.5, 2.0, OUTPUTS).astype(np.float32) * np.linalg.norm(WEIGHT, axis=1)


def theirs(**options) -> torch.nn.Module:
    """A PEFT model around one linear layer."""

    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(INPUTS, OUTPUTS)

        def forward(self, x):
            return self.q(x)

    model = One()
    with torch.no_grad():
        model.q.weight.copy_(torch.tensor(WEIGHT))
        model.q.bias.copy_(torch.tensor(BIAS))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q"], lora_dropout=0.0, **options)
    return peft.get_peft_model(model, config)


def base() -> nn.Linear:
    linear = nn.Linear(INPUTS, OUTPUTS)
    linear.weight, linear.bias = mx.array(WEIGHT), mx.array(BIAS)
    linear.freeze()
    return linear


def scale_of(**options) -> float:
    return LoRAParameters(rank=RANK, alpha=ALPHA, **options).effective_scale


def ours_and_gradients(layer: nn.Module) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    def loss(parameters, x):
        layer.update(parameters)
        return (layer(x) * mx.array(COTANGENT)).sum()

    of_parameters, of_x = mx.grad(loss, argnums=(0, 1))(layer.trainable_parameters(), mx.array(X))
    return (
        np.array(layer(mx.array(X))),
        {k: np.array(v) for k, v in of_parameters.items() if k not in ("linear", "dropout")},
        np.array(of_x),
    )


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "dora with rslora"])
def test_forward_and_gradients_are_pefts(method):
    use_dora, use_rslora = "dora" in method, "rslora" in method
    scale = scale_of(use_rslora=use_rslora)
    if use_dora:
        layer = DoRALinear(base(), mx.array(A), mx.array(B), mx.array(M), scale, 0.0)
    else:
        layer = LoRALinear(base(), mx.array(A), mx.array(B), scale)
    out, gradients, of_x = ours_and_gradients(layer)

    model = theirs(use_rslora=use_rslora, use_dora=use_dora)
    q = model.base_model.model.q
    with torch.no_grad():
        q.lora_A["default"].weight.copy_(torch.tensor(A.T))
        q.lora_B["default"].weight.copy_(torch.tensor(B.T))
        if use_dora:
            q.lora_magnitude_vector["default"].weight.copy_(torch.tensor(M))
    x = torch.tensor(X, requires_grad=True)
    expected = model(x)
    (expected * torch.tensor(COTANGENT)).sum().backward()
    wanted = {"lora_a": q.lora_A["default"].weight.grad.T, "lora_b": q.lora_B["default"].weight.grad.T}
    if use_dora:
        wanted["m"] = q.lora_magnitude_vector["default"].weight.grad
    assert np.abs(out - expected.detach().numpy()).max() < 1e-4 * np.abs(out).max()
    assert np.abs(of_x - x.grad.numpy()).max() < 1e-4 * np.abs(of_x).max()
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert np.abs(gradients[name] - gradient.numpy()).max() < 1e-4 * np.abs(gradient.numpy()).max(), name


def test_a_fresh_dora_has_pefts_lengths():
    q = theirs(use_dora=True).base_model.model.q
    made = DoRALinear.from_base(base(), rank=RANK, scale=scale_of())
    assert np.array(made.m) == pytest.approx(
        q.lora_magnitude_vector["default"].weight.detach().numpy(), rel=1e-6
    )


def test_dropout_under_dora_acts_where_pefts_does():
    """The two libraries draw differently, so both get the same inputs, dropped by hand."""
    scale, kept = scale_of(), np.array(RNG.random(X.shape) > 0.4, np.float32) / 0.6
    layer = DoRALinear(base(), mx.array(A), mx.array(B), mx.array(M), scale, 0.4)
    layer.dropout = lambda x: x * mx.array(kept)
    q = theirs(use_dora=True).base_model.model.q
    with torch.no_grad():
        q.lora_A["default"].weight.copy_(torch.tensor(A.T))
        q.lora_B["default"].weight.copy_(torch.tensor(B.T))
        q.lora_magnitude_vector["default"].weight.copy_(torch.tensor(M))
        extra = q.lora_magnitude_vector["default"](
            torch.tensor(X * kept),
            lora_A=q.lora_A["default"],
            lora_B=q.lora_B["default"],
            scaling=q.scaling["default"],
            base_layer=q.get_base_layer(),
        )
        expected = (q.get_base_layer()(torch.tensor(X)) + extra).numpy()
    out = np.array(layer(mx.array(X)))
    assert np.abs(out - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_300"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_begins_where_pefts_does_and_is_converted_to_the_same_update(init, use_rslora):
    scale = scale_of(use_rslora=use_rslora)
    layer = LoRALinear.from_base(base(), rank=RANK, scale=scale)
    start_on_principal("q", layer, init)
    q = theirs(init_lora_weights="pissa", use_rslora=use_rslora).base_model.model.q
    a0, b0 = (part["default"].weight.detach().numpy() for part in (q.lora_A, q.lora_B))
    principal = np.array(layer.lora_a @ layer.lora_b).T
    assert np.abs(principal - b0 @ a0).max() < 1e-4  # singular vectors may differ in sign, not their products
    assert np.array(base()(mx.array(X))) == pytest.approx(np.array(layer(mx.array(X))), abs=0)
    norms = np.linalg.norm(np.array(layer.lora_a), axis=0)
    assert norms == pytest.approx(np.linalg.norm(a0, axis=1), rel=1e-3)

    # Both move by the same step, with A and B turned to PEFT's signs first; then PEFT's conversion, by its formula.
    signs = np.sign(np.sum(np.array(layer.lora_a) * a0.T, axis=0))
    da, db = RNG.normal(size=A.shape) * 0.1, RNG.normal(size=B.shape) * 0.1
    layer.lora_a = layer.lora_a + mx.array((da * signs).astype(np.float32))
    layer.lora_b = layer.lora_b + mx.array((db * signs[:, None]).astype(np.float32))
    a1, b1 = a0 + da.T, b0 + db.T
    converted = np.concatenate([b1, -b0], axis=1) @ np.concatenate([a1, a0], axis=0)
    parts = {name: np.array(value) for name, value in layer.tensors().items()}
    assert (parts["lora_a"].shape, parts["lora_b"].shape) == ((INPUTS, 2 * RANK), (2 * RANK, OUTPUTS))
    assert np.abs((parts["lora_a"] @ parts["lora_b"]).T - converted).max() < 2e-3


def test_pefts_own_conversion_of_pissa_is_what_our_folder_holds(tmp_path):
    model = theirs(init_lora_weights="pissa")
    model.save_pretrained(tmp_path / "start")
    q = model.base_model.model.q
    with torch.no_grad():
        start = [part["default"].weight.numpy().copy() for part in (q.lora_A, q.lora_B)]
        q.lora_A["default"].weight.add_(0.1 * torch.tensor(A.T))
        q.lora_B["default"].weight.add_(0.1 * torch.tensor(B.T))
        moved = [part["default"].weight.numpy() for part in (q.lora_A, q.lora_B)]
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide has it, before the conversion
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    converted = peft.utils.load_peft_weights(str(tmp_path / "lora"), device="cpu")
    layer = LoRALinear.from_base(base(), rank=RANK, scale=scale_of())
    layer.start_from(mx.array(start[0].T), mx.array(start[1].T))
    layer.lora_a, layer.lora_b = mx.array(moved[0].T), mx.array(moved[1].T)
    ours = {name: np.array(value).T for name, value in layer.tensors().items()}
    theirs_by_name = {name.split(".")[-2]: value.numpy() for name, value in converted.items()}
    assert np.array_equal(ours["lora_a"], theirs_by_name["lora_A"])
    assert np.array_equal(ours["lora_b"], theirs_by_name["lora_B"])


def test_an_adapter_of_a_tied_head_is_not_put_into_the_embeddings(make_model):
    network = load(str(make_model("tied", TIED))).network
    tensors = {"lm_head.lora_a": mx.ones((32, 3)), "lm_head.lora_b": mx.ones((3, TIED["vocab_size"]))}
    config = AdapterConfig("lora", -1, 3, 1.0)
    assert check_fit("x", specs_of(tensors), config, network, max_rank=8).keys() == {"lm_head"}
    with pytest.raises(AdapterError, match="adapts lm_head, which is the embeddings in this model"):
        place_adapter(network, tensors, config, "x")
