"""What trains is what was asked for, and every refusal says why."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from serve.errors import AdapterError, ConfigError
from train.adapters.adapt import AdapterSettings, add_lora, set_tensors, train_all, trainable_tensors
from train.loop.step import Stepper
from train.objectives.sft import SFT


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text", "phi3", "olmo2", "qwen3_moe"])
@pytest.mark.parametrize("num_layers", [-1, 1])
def test_names_and_shapes_are_mlx_lms(tiny_network, family, num_layers):
    ours, theirs = tiny_network(family), tiny_network(family)
    add_lora(ours, AdapterSettings(rank=4, scale=2.0, num_layers=num_layers))
    theirs.module.freeze()
    linear_to_lora_layers(theirs.module, num_layers, {"rank": 4, "scale": 2.0, "dropout": 0.0})
    shapes = {name: tensor.shape for name, tensor in trainable_tensors(ours).items()}
    assert shapes == {name: tensor.shape for name, tensor in trainable_tensors(theirs).items()}


def test_only_the_named_layers_of_the_last_blocks_train(tiny_network):
    network = tiny_network()
    adapted = add_lora(network, AdapterSettings(rank=4, scale=2.0, keys=["self_attn.q_proj"], num_layers=1))
    prefix = "model.layers.1.self_attn.q_proj"
    assert set(trainable_tensors(network)) == {f"{prefix}.lora_a", f"{prefix}.lora_b"}
    assert adapted.keys == ("self_attn.q_proj",)
    assert adapted.num_trainable == 2 * 64 * 4


def test_a_key_that_is_not_there_is_answered_with_what_is(tiny_network):
    with pytest.raises(
        ConfigError, match=r"q_porj: no layer has it; did you mean self_attn\.q_proj\?"
    ) as caught:
        add_lora(
            tiny_network(), AdapterSettings(rank=4, scale=2.0, keys=["self_attn.q_porj", "self_attn.k_proj"])
        )
    assert "mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.k_proj" in str(caught.value)
    with pytest.raises(ConfigError, match=r"v_porj: no layer has it; did you mean v_proj\?"):
        add_lora(tiny_network(), AdapterSettings(rank=4, scale=2.0, keys=["v_porj"]))
    with pytest.raises(ConfigError, match=r"input_layernorm is a RMSNorm; an adapter goes on linear layers"):
        add_lora(tiny_network(), AdapterSettings(rank=4, scale=2.0, keys=["input_layernorm"]))
    with pytest.raises(ConfigError, match=r"\*\.gate: no layer's name matches"):
        add_lora(tiny_network(), AdapterSettings(rank=4, scale=2.0, keys=["*.gate"]))
    with pytest.raises(ConfigError, match=r"re:\(: not a regular expression"):
        add_lora(tiny_network(), AdapterSettings(rank=4, scale=2.0, keys=["re:("]))


ATTENTION = tuple(f"self_attn.{name}_proj" for name in "koqv")
MLP = ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["q_proj"], ("self_attn.q_proj",)),
        (["self_attn.*"], ATTENTION),
        ([r"re:.*\.(up|q)_proj"], ("mlp.up_proj", "self_attn.q_proj")),
        (["self_attn.?_proj", "lm_head"], ("lm_head", *ATTENTION)),
        (["all-linear", "lm_head"], ("lm_head", *MLP, *ATTENTION)),
        ("all-linear", (*MLP, *ATTENTION)),
        (None, (*MLP, *ATTENTION)),
    ],
)
def test_keys_are_names_their_ends_or_patterns(tiny_network, keys, expected):
    network = tiny_network(tie_word_embeddings=False)
    adapted = add_lora(network, AdapterSettings(rank=4, scale=2.0, keys=keys, num_layers=1))
    assert adapted.keys == expected
    modules = {name.rpartition(".")[0].removeprefix("model.layers.1.") for name in trainable_tensors(network)}
    assert modules == set(expected)


def test_a_tied_head_and_embeddings_are_refused_with_the_reason(tiny_network):
    with pytest.raises(ConfigError, match="lm_head is tied to the embeddings in this model"):
        add_lora(tiny_network(), AdapterSettings(rank=4, scale=2.0, keys=["q_proj", "lm_head"]))
    with pytest.raises(ConfigError, match="embed_tokens is an embedding"):
        add_lora(tiny_network(), AdapterSettings(rank=4, scale=2.0, keys=["embed_tokens"]))


def test_dora_leaves_experts_out_and_refuses_them_by_name(tiny_network):
    with pytest.raises(ConfigError, match=r"up_proj holds MoE experts; DoRA has no form for them"):
        add_lora(
            tiny_network("qwen3_moe"),
            AdapterSettings(rank=4, scale=2.0, keys=["q_proj", "up_proj"], fine_tune_type="dora"),
        )
    adapted = add_lora(tiny_network("qwen3_moe"), AdapterSettings(rank=4, scale=2.0, fine_tune_type="dora"))
    assert not any("switch_mlp" in key for key in adapted.keys)
    assert any("mlp.switch_mlp.up_proj" in note for note in adapted.notes)


def test_more_layers_than_there_are_means_all_and_says_so(tiny_network):
    adapted = add_lora(tiny_network(), AdapterSettings(rank=4, scale=2.0, num_layers=16))
    assert adapted.notes == ("num_layers 16: the model has 2, all are adapted",)


def test_a_quantized_base_trains_and_stays_quantized(tiny_network, make_batch):
    network = tiny_network()
    nn.quantize(network.module, group_size=32, bits=4)
    add_lora(network, AdapterSettings(rank=4, scale=2.0))
    trained = set(trainable_tensors(network))
    before = {name: np.array(value) for name, value in tree_flatten(network.module.parameters())}
    stepper = Stepper(network, mlx_optim.Adam(1e-2), SFT())
    for step in range(2):
        stepper.step([make_batch([9, 14])], step)
    for name, value in tree_flatten(network.module.parameters()):
        assert np.array_equal(before[name], np.array(value)) == (name not in trained), name
    assert isinstance(network.layers[0].self_attn.q_proj.linear, nn.QuantizedLinear)


def test_full_training_of_a_quantized_base_is_refused(tiny_network):
    network = tiny_network()
    nn.quantize(network.module, group_size=32, bits=4)
    with pytest.raises(ConfigError, match="cannot train a quantized base"):
        train_all(network)


def test_full_training_of_the_last_blocks_leaves_the_rest(tiny_network):
    network = tiny_network()
    train_all(network, num_layers=1)
    assert all(name.startswith("model.layers.1.") for name in trainable_tensors(network))
    train_all(network)
    assert set(trainable_tensors(network)) == set(dict(tree_flatten(network.module.parameters())))


def test_tensors_that_do_not_fit_are_named(tiny_network):
    network = tiny_network()
    add_lora(network, AdapterSettings(rank=4, scale=2.0, keys=["self_attn.q_proj"], num_layers=1))
    name = "model.layers.1.self_attn.q_proj.lora_a"
    with pytest.raises(AdapterError, match=r"lora_a: is \(64, 8\), the model needs \(64, 4\)"):
        set_tensors(network, {**trainable_tensors(network), name: mx.zeros((64, 8))}, "there")
    with pytest.raises(AdapterError, match=r"lora_b: missing"):
        set_tensors(network, {name: mx.zeros((64, 4))}, "there")
