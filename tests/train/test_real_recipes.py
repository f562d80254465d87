"""Recipes for real models that see: what their headers say of weights follows from public configurations."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from serve.model.loading import cast
from serve.model.towers import build_with_towers
from train.recipe.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
CONFIGS = {
    "qwen2.5-vl-3b": {
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 151936,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": True,
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "out_hidden_size": 2048,
            "num_heads": 16,
        },
    },
    "qwen3-vl-4b": {
        "model_type": "qwen3_vl",
        "image_token_id": 151655,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "rope_theta": 5e6,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2560,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "gemma-3-4b": {
        "model_type": "gemma3",
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "hidden_size": 2560,
        "vocab_size": 262208,
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262208,
            "query_pre_attn_scalar": 256,
        },
        "vision_config": {"model_type": "siglip_vision_model", **SIGLIP, "image_size": 896, "patch_size": 14},
    },
    "smolvlm2": {
        "model_type": "smolvlm",
        "image_token_id": 49190,
        "scale_factor": 3,
        "vocab_size": 49280,
        "text_config": {
            "model_type": "llama",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 64,
            "vocab_size": 49280,
        },
        "vision_config": {"model_type": "smolvlm_vision", **SIGLIP, "image_size": 384, "patch_size": 14},
    },
}
"""What counts for sizes, as the hub's config.json has it."""
TIED = frozenset({"gemma-3-4b"})
"""mlx-vlm holds the embeddings a second time as their head; the same array."""
SAID = re.compile(
    r"weights ([\d.]+) GB \(([\d.]+) billion of the language part in 4 bits\) and "
    r"([\d.]+) GB \(([\d.]+) billion of the tower in bfloat16\)"
)


@pytest.mark.large
@pytest.mark.parametrize("name", CONFIGS)
def test_the_weights_a_header_names_are_those_of_the_public_configuration(name):
    header = " ".join(line.lstrip("# ") for line in (RECIPES / f"{name}.yaml").read_text().splitlines())
    assert "Needs the hub" in header
    said = [float(number) for number in SAID.search(header).groups()]
    module = build_with_towers(CONFIGS[name])  # whose arrays nobody evaluates
    of_language, of_tower = _parts(module, name)
    assert said[1] == pytest.approx(sum(value.size for value in of_language) / 1e9, abs=0.006)
    assert said[3] == pytest.approx(sum(value.size for value in of_tower) / 1e9, abs=0.006)
    cast(module, mx.bfloat16)
    nn.quantize(module.language_model, group_size=64, bits=4)
    of_language, of_tower = _parts(module, name)
    assert said[0] == pytest.approx(sum(value.nbytes for value in of_language) / 1e9, abs=0.006)
    assert said[2] == pytest.approx(sum(value.nbytes for value in of_tower) / 1e9, abs=0.006)


def _parts(module: nn.Module, name: str) -> tuple[list[mx.array], list[mx.array]]:
    """Arrays of (the language part, everything else)."""
    named = dict(tree_flatten(module.parameters()))
    if name in TIED:
        named = {key: value for key, value in named.items() if "lm_head" not in key}
    inside = [value for key, value in named.items() if key.startswith("language_model.")]
    return inside, [value for key, value in named.items() if not key.startswith("language_model.")]


@pytest.mark.parametrize("name", CONFIGS)
def test_recipes_for_models_that_see_keep_pictures_whole(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    assert recipe.excess_length_strategy == "drop"
    assert recipe.lora_parameters.keys == "all-linear"
    assert recipe.grad_checkpoint
    assert "my-pictures" in recipe.datasets[0].path
    assert "/" in recipe.model
