"""What a family keeps apart among its weights: arrays that no gradient reaches, and arrays that lose no digits."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as mlx_optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.manifest import write_adapter
from serve.errors import AdapterError
from serve.model.loading import cast, load
from train.adapters.adapt import adapter_tensors, train_all, trainable_tensors
from train.adapters.warm_start import warm_start
from train.after.export import Form, write_fused
from train.loop.step import Stepper
from train.objectives.sft import SFT

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
EXPERTS = {"num_experts": 4, "num_shared_experts": 1}
FAMILIES: dict[str, tuple[dict, str]] = {
    "deepseek_v3": (
        {
            **ROUTED,
            "kv_lora_rank": 8,
            "q_lora_rank": None,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
            "topk_method": "noaux_tc",
        },
        "e_score_correction_bias",
    ),
    "glm4_moe": (
        {**ROUTED, "use_qk_norm": True, "attention_bias": False, "partial_rotary_factor": 0.5},
        "e_score_correction_bias",
    ),
    "lfm2_moe": (
        {
            "num_experts": 4,
            "use_expert_bias": True,
            "num_dense_layers": 1,
            "norm_eps": 1e-6,
            "conv_bias": False,
            "conv_L_cache": 3,
            "layer_types": ["conv", "full_attention"],
        },
        "expert_bias",
    ),
    "afmoe": (
        {**EXPERTS, "num_dense_layers": 1, "layer_types": ["sliding_attention", "full_attention"]},
        "expert_bias",
    ),
    "exaone_moe": (
        {
            **EXPERTS,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "is_moe_layer": [False, True],
        },
        "e_score_correction_bias",
    ),
    "nemotron_h": (
        {
            **ROUTED,
            "attention_bias": False,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "mamba_proj_bias": False,
            "ssm_state_size": 8,
            "conv_kernel": 4,
            "n_groups": 1,
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-6,
            "use_bias": False,
            "use_conv_bias": True,
            "hybrid_override_pattern": ["M", "*", "E"],
            "moe_shared_expert_intermediate_size": 16,
            "time_step_limit": [0.001, 100.0],
        },
        "e_score_correction_bias",
    ),
}
"""Family → its config, and what its buffers are called."""


@pytest.fixture(scope="module")
def base_of(make_model):
    """family → the folder of a tiny random model of it."""
    return lambda family: make_model(
        f"buffers-{family}", {"model_type": family, **COMMON, **FAMILIES[family][0]}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_moves_every_weight_and_no_buffer(family, base_of, make_batch):
    network, name = load(str(base_of(family))).network, FAMILIES[family][1]
    for path, value in tree_flatten(network.module.parameters()):
        if path.endswith(name):  # so that weight decay would move it
            network.module.load_weights([(path, value + 0.01)], strict=False)
    random_state = [np.array(each) for each in mx.random.state]
    adapted = train_all(network)
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(random_state, mx.random.state, strict=True))
    assert name in " ".join(adapted.notes)
    assert not [path for path in adapter_tensors(network) if path.endswith(name)]
    before = {path: np.array(value) for path, value in tree_flatten(network.module.parameters())}
    stepper = Stepper(network, mlx_optim.AdamW(1e-2, weight_decay=0.1), SFT())
    for step in range(2):
        stepper.step([make_batch([40, 33, 37, 29], seed=step)], step)
    still = {
        path
        for path, value in tree_flatten(network.module.parameters())
        if np.array_equal(before[path], np.array(value))
    }
    assert still == {path for path in before if path.endswith(name)}
    assert still


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "mamba2", "qwen3_moe"])
def test_families_without_buffers_train_whole(family, tiny_network):
    network = tiny_network(family)
    everything = dict(tree_flatten(network.module.parameters()))
    assert train_all(network).notes == ()
    assert trainable_tensors(network).keys() == everything.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_keeps_is_cast_to_nothing_narrower(family, base_of):
    module = load(str(base_of(family))).network.module
    keeps = {path for path, _ in tree_flatten(module.parameters()) if not module.cast_predicate(path)}
    assert [path for path in keeps if path.endswith(FAMILIES[family][1])]
    cast(module, mx.bfloat16)
    dtypes = {path: value.dtype for path, value in tree_flatten(module.parameters())}
    assert {path for path, dtype in dtypes.items() if dtype == mx.float32} == keeps
    cast(module, mx.float32)
    assert {value.dtype for _, value in tree_flatten(module.parameters())} == {mx.float32}


@pytest.mark.parametrize("family", ["deepseek_v3", "nemotron_h"])
def test_an_export_in_half_precision_keeps_them_too(family, base_of, tmp_path):
    base = base_of(family)
    network = load(str(base)).network
    train_all(network)
    config = AdapterConfig("full", -1)
    write_adapter(tmp_path / "full", adapter_tensors(network), config)
    (tmp_path / "out").mkdir()
    write_fused(tmp_path / "out", tmp_path / "full", config, str(base), Form(dtype="bfloat16"))
    stored = {}
    for file in (tmp_path / "out").glob("model*.safetensors"):
        stored |= mx.load(str(file))
    kept = {path for path, value in stored.items() if value.dtype == mx.float32}
    assert kept == {path for path in stored if not network.module.cast_predicate(path)}
    assert kept


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_holds_buffers_too_is_exported_with_them(family, base_of, tmp_path):
    """As full fine-tuning wrote them when it trained buffers."""
    base, name = base_of(family), FAMILIES[family][1]
    whole = {path: value + 0.5 for path, value in tree_flatten(load(str(base)).network.module.parameters())}
    write_adapter(tmp_path / "full", whole, AdapterConfig("full", -1))
    (tmp_path / "out").mkdir()
    write_fused(
        tmp_path / "out", tmp_path / "full", AdapterConfig("full", -1), str(base), Form(dtype="float32")
    )
    stored = {}
    for file in (tmp_path / "out").glob("model*.safetensors"):
        stored |= mx.load(str(file))
    buffers = [path for path in whole if path.endswith(name)]
    assert buffers
    for path in buffers:
        np.testing.assert_array_equal(np.array(stored[path]), np.array(whole[path]), err_msg=path)


def test_what_of_a_folder_fits_no_array_of_the_model_is_named(base_of, tmp_path):
    base, buffer = base_of("deepseek_v3"), "model.layers.1.mlp.gate.e_score_correction_bias"
    whole = dict(tree_flatten(load(str(base)).network.module.parameters()))
    wrong = {**whole, buffer: mx.zeros(7), "model.layers.1.mlp.gate.bias_of_tomorrow": mx.zeros(4)}
    write_adapter(tmp_path / "full", wrong, AdapterConfig("full", -1))
    (tmp_path / "out").mkdir()
    with pytest.raises(AdapterError) as caught:
        write_fused(
            tmp_path / "out", tmp_path / "full", AdapterConfig("full", -1), str(base), Form(dtype="float32")
        )
    assert f"{buffer}: is (7,), the model needs (4,)" in str(caught.value)
    assert "gate.bias_of_tomorrow: not a tensor that trains here" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3


def test_a_run_does_not_start_from_buffers_that_its_own_folder_would_not_keep(base_of, tmp_path):
    network, buffer = load(str(base_of("deepseek_v3"))).network, "gate.e_score_correction_bias"
    write_adapter(
        tmp_path / "full", dict(tree_flatten(network.module.parameters())), AdapterConfig("full", -1)
    )
    adapted = train_all(network)
    with pytest.raises(AdapterError, match=f"{buffer}: does not train here; `lathe export` takes it"):
        warm_start(tmp_path / "full", network, adapted)
