"""Tiny random models twice over: transformers' on torch for PEFT to adapt, and the same weights in mlx-lm's code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import torch
import transformers
from mlx_lm.utils import _get_classes

from serve.model.network import Network

transformers.utils.logging.set_verbosity(logging.ERROR)

SIZES: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = [[1, 5, 9, 33, 2, 7, 40, 41], [3, 3, 80, 12, 60, 61, 17, 4]]

Weights = dict[str, mx.array]


@dataclass(frozen=True)
class Base:
    """A family: transformers' class and config, and how its weights get into the other library's module."""

    model: str
    config: str
    options: Mapping[str, Any]
    theirs: Mapping[str, Any] = field(default_factory=dict)
    """What mlx-lm's config has beside the same."""
    renamed: Callable[[Weights], Weights] = lambda weights: weights
    """From transformers' state to what a checkpoint of the family holds."""


def _prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {f"{prefix}{name}": value for name, value in weights.items()}


def _gpt2(weights: Weights) -> Weights:
    return {
        name.removeprefix("transformer."): value
        for name, value in weights.items()
        if name != "lm_head.weight"
    }


def _one_by_one(names: Mapping[str, str], block: str = "mlp.experts") -> Callable[[Weights], Weights]:
    """Experts as checkpoints have them: each by itself, gate and up apart."""

    def renamed(weights: Weights) -> Weights:
        made = {}
        for name, value in weights.items():
            prefix, _, leaf = name.partition("mlp.experts.")
            if not leaf:
                made[name.replace("mlp.", f"{block.rpartition('.')[0]}.") if ".gate." in name else name] = (
                    value
                )
                continue
            parts = (
                dict(zip(("gate", "up"), mx.split(value, 2, axis=1), strict=True))
                if "gate" in leaf
                else {"down": value}
            )
            for part, stack in parts.items():
                for number in range(stack.shape[0]):
                    made[f"{prefix}{block}.{number}.{names[part]}.weight"] = stack[number]
        return made

    return renamed


def _gpt_oss(weights: Weights) -> Weights:
    made = {}
    for name, value in weights.items():
        for leaf in ("gate_up_proj", "down_proj"):
            if name.endswith(f"experts.{leaf}"):
                value = value.swapaxes(1, 2)
                name = f"{name}.weight" if leaf == "down_proj" else name
        if "gate_up_proj" in name:
            bias = name.endswith("_bias")
            stem = name.removesuffix("_bias").removesuffix("gate_up_proj")
            for which, leaf in enumerate(("gate_proj", "up_proj")):
                made[f"{stem}{leaf}.{'bias' if bias else 'weight'}"] = value[:, which::2]
        else:
            made[name.replace("down_proj_bias", "down_proj.bias")] = value
    return made


QWEN_EXPERTS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
BASES: Mapping[str, Base] = {
    "qwen3": Base("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8, "tie_word_embeddings": False}),
    "llama": Base(
        "LlamaForCausalLM",
        "LlamaConfig",
        {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "phi3": Base("Phi3ForCausalLM", "Phi3Config", {"pad_token_id": 0, "tie_word_embeddings": False}),
    "gpt2": Base(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"n_ctx": 64, "layer_norm_epsilon": 1e-5},
        _gpt2,
    ),
    "qwen3_moe": Base(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **{"head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
            **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
            "tie_word_embeddings": False,
        },
        {"num_experts": 4},
        _one_by_one(QWEN_EXPERTS),
    ),
    "square_moe": Base(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **{"head_dim": 8, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
            **{"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
            "tie_word_embeddings": False,
        },
        {"num_experts": 4},
        _one_by_one(QWEN_EXPERTS),
    ),
    "mixtral": Base(
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
        {},
        _one_by_one({"gate": "w1", "up": "w3", "down": "w2"}, "block_sparse_moe.experts"),
    ),
    "gpt_oss": Base(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **{"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
            **{"layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {},
        _gpt_oss,
    ),
    "llama4": Base(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **{"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1},
            **{"interleave_moe_layer_step": 1, "tie_word_embeddings": False, "use_qk_norm": False},
            **{"attention_chunk_size": 64, "num_hidden_layers": 4, "attn_temperature_tuning": False},
        },
        {},
        _prefixed("language_model."),
    ),
}


def adaptable(family: str, seed: int = 0) -> Any:
    """transformers' model on torch, evaluating, lively."""
    base = BASES[family]
    torch.manual_seed(seed)
    sizes = {} if family == "gpt2" else SIZES
    config = getattr(transformers, base.config)(**{**sizes, "vocab_size": 96, **base.options})
    config._attn_implementation = "eager"
    model = getattr(transformers, base.model)(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def network_of(family: str, model: Any) -> Network:
    """The same weights in the other library's code."""
    base = BASES[family]
    config = model.config.to_dict()
    rope = config.get("rope_parameters") or {}
    config |= {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": None, **base.theirs}
    if family == "llama4":
        config = {"model_type": "llama4", "text_config": config, "vision_config": {}}
    weights = base.renamed({name: mx.array(value.numpy()) for name, value in model.state_dict().items()})
    model_class, args_class = _get_classes(config)
    module = model_class(args_class.from_dict(config))
    weights = module.sanitize(weights) if hasattr(module, "sanitize") else weights
    module.load_weights(list(weights.items()))
    module.eval()
    return Network(module)


def logits_of(network: Network) -> np.ndarray:
    """Of TOKENS."""
    return np.array(network.logits(network.hidden(mx.array(TOKENS))).astype(mx.float32))


def torch_logits_of(model: Any) -> np.ndarray:
    """Of TOKENS."""
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()
