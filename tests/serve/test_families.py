"""Each text family: its head runs apart from its layers, and rows in one batch match the family's own cache."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.errors import ModelError
from serve.model.loading import load
from serve.model.network import TextNetwork

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 259,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"model_type": "llama"},
    "phi3": {},
    "olmo2": {},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "mixtral": MOE,
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "gpt_oss": {
        **MOE,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": None,
    },
    "deepseek_v2": {
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
        "rope_scaling": {
            "type": "yarn",
            "factor": 1.0,
            "original_max_position_embeddings": 512,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
}
SSM = {
    "state_size": 8,
    "layer_norm_epsilon": 1e-5,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_bias": False,
    "use_conv_bias": True,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
RECURRENT = {
    "mamba": {**SSM, "time_step_rank": 8},
    "mamba2": {
        **SSM,
        "num_heads": 8,
        "num_hidden_layers": 2,
        "time_step_limit": [0.0, 10.0],
        "time_step_rank": "auto",
    },
    "qwen3_next": {
        **LINEAR,
        **FAMILIES["qwen3_moe"],
        "shared_expert_intermediate_size": 32,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 2,
    },
    "olmo_hybrid": {
        **LINEAR,
        "linear_allow_neg_eigval": True,
        "attention_bias": False,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 10000.0},
    },
    "falcon_h1": {
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "mamba_d_state": 8,
        "mamba_n_heads": 4,
        "mamba_chunk_size": 16,
    },
    "granitemoehybrid": {
        **FAMILIES["granite"],
        "layer_types": ["mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_proj_bias": False,
        "mamba_d_state": 8,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
    },
    "nemotron_h": {
        **SSM,
        "n_groups": 2,
        "ssm_state_size": 8,
        "attention_bias": False,
        "mlp_bias": False,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "hybrid_override_pattern": ["M", "*", "-", "M"],
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_multiple_of": 16,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "block_ff_dim": 96,
        "full_attn_idxs": [1],
    },
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    },
    "recurrent_gemma": {
        "attention_bias": False,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1],
            "full_attn_layers": [2],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 512,
        "num_experts": 0,
        "moe_intermediate_size": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "mla_use_nope": True,
    },
}
TEXTS = ["hi", "the quick brown fox jumps over the lazy dog and on", "tickets"]


@pytest.fixture(params=[*FAMILIES, *RECURRENT])
def family(request, make_model):
    config = {"model_type": request.param, **COMMON, **(FAMILIES | RECURRENT)[request.param]}
    return load(str(make_model(request.param, config)), name=request.param)


def test_rows_of_every_family_match_its_own_cache(family, make_request):
    requests = [make_request(str(i), text, max_tokens=20) for i, text in enumerate(TEXTS)]
    answers = generate(Engine(family, EngineLimits(prefill_chunk_tokens=16)), requests)
    for request, answer in zip(requests, answers, strict=True):
        prompt = list(request.prompt.token_ids)
        logits = family.network.module(
            mx.array([[*prompt, *answer.token_ids]]), cache=make_prompt_cache(family.network.module)
        )[0]
        for step, token in enumerate(answer.token_ids):
            row = logits[len(prompt) - 1 + step]
            # A near-tie may fall either way in another batch shape; nothing further from the top may be drawn.
            assert (mx.max(row) - row[token]).item() < 1e-3


def test_a_head_that_cannot_be_run_apart_is_noticed(model):
    class Shifted(type(model.network.module)):
        def __call__(self, inputs, cache=None, input_embeddings=None):
            return super().__call__(inputs + (inputs.dtype == mx.int32), cache, input_embeddings)

    model.network.module.__class__ = Shifted
    with pytest.raises(ModelError, match="cannot be run apart"):
        TextNetwork(model.network.module).check()
