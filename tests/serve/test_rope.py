"""Folders of transformers 5 say how positions turn by one key, which few classes know; torch is the oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from vlm_families import LARGE_VLM_FAMILIES

from serve.model.loading import load
from serve.model.rope import in_older_words

torch = pytest.importorskip("torch")

THETA = 777.0
SIZES = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = (
    *("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3", "stablelm"),
    *("glm4", "cohere", "olmo2", "starcoder2", "granite", "smollm3", "helium", "nemotron", "gpt_neox"),
    *("ernie4_5", "seed_oss", "mixtral", "qwen2_moe", "olmoe", "hunyuan_v1_dense", "dots1", "granitemoe"),
)
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
TOKENS = np.arange(48)[None] % 100


def saved(family: str, folder: Path, **positions: object) -> np.ndarray:
    """A tiny random model of transformers', saved by it, whose positions are not its family's own; its logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = AutoConfig.for_model(family)
    told = {**own.rope_parameters, "rope_theta": THETA, **positions}
    if "partial_rotary_factor" in told and told["partial_rotary_factor"] == 0.25:
        told["partial_rotary_factor"] = 0.5
    sizes = {name: size for name, size in SIZES.items() if hasattr(own, name)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(own)(**sizes, rope_parameters=told)).eval().float()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * 0.2 if value.ndim > 1 else value + 0.1)
        logits = model(torch.from_numpy(TOKENS)).logits[0].numpy()
    model.save_pretrained(folder)
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())
    return logits


def logits_of(folder: Path, tokenizer_folder: Path) -> np.ndarray:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer_folder / name).read_bytes())
    return np.array(load(str(folder)).network.module(mx.array(TOKENS))[0])


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_5_turns_positions_as_it_says(family, tmp_path, model_folder):
    expected = saved(family, tmp_path / family)
    assert_close(logits_of(tmp_path / family, model_folder), expected)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_positions_are_scaled(family, scaling, tmp_path, model_folder):
    expected = saved(family, tmp_path / family, **SCALINGS[scaling])
    assert_close(logits_of(tmp_path / family, model_folder), expected)


def test_what_stands_under_the_older_keys_stays(tmp_path):
    told = {
        "rope_theta": 10.0,
        "rope_parameters": {"rope_theta": 20.0, "rope_type": "default"},
        "a": {"b": [1]},
    }
    assert in_older_words(told) == told | {"rotary_emb_base": 20.0, "rope_scaling": None}
    plain = {"rope_theta": 10.0, "text_config": {"hidden_size": 3}}
    assert in_older_words(plain) == plain


def test_parts_of_a_model_that_sees_are_told_too():
    sections = {"rope_type": "default", "rope_theta": 7.0, "mrope_section": [2, 3, 3]}
    (text,) = in_older_words({"text_config": {"rope_parameters": sections}}).values()
    assert text["rope_theta"] == 7.0
    assert text["rope_scaling"] == {"type": "default", **sections}
    kinds = {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 6.0}}
    (text,) = in_older_words({"text_config": {"rope_parameters": kinds}}).values()
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (5.0, 6.0)


@pytest.mark.parametrize("family", LARGE_VLM_FAMILIES)
def test_a_folder_that_sees_is_the_same_model_in_either_words(family, tmp_path, vlm_folder):
    """Other positions than its family's own, by the older keys, and as transformers 5 writes them."""
    logits = []
    for name in ("older", "newer"):
        folder = tmp_path / name
        shutil.copytree(vlm_folder(family), folder)
        config = json.loads((folder / "config.json").read_text())
        text = config.get("text_config") or config
        if "rope_theta" not in text or "rope_parameters" in text:
            pytest.skip("this family knows the newer words, or turns nothing")
        text["rope_theta"] = THETA
        if name == "newer":
            text["rope_parameters"] = {
                "rope_type": "default",
                **(text.pop("rope_scaling", None) or {}),
                "rope_theta": text.pop("rope_theta"),
            }
        (folder / "config.json").write_text(json.dumps(config))
        network = load(str(folder)).network
        tokens = mx.array(TOKENS)
        logits.append(np.array(network.logits(network.hidden(tokens))[0]))
    np.testing.assert_array_equal(*logits)
