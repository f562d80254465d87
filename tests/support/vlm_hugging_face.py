"""The tiny models that see, in transformers' own classes on torch: the same weights under its names."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch


def hugging_face_gemma3(folder: Path) -> torch.nn.Module:
    """Its head is tied."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    pattern = text.pop("sliding_window_pattern")
    layers = range(text["num_hidden_layers"])
    text["layer_types"] = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in layers]
    text["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": text.pop("rope_global_base_freq")},
        "sliding_attention": {"rope_type": "default", "rope_theta": text.pop("rope_local_base_freq")},
    }
    del text["rope_theta"]
    text["tie_word_embeddings"] = True
    names = {"image_token_id": config["image_token_index"]}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=text,
            vision_config=config["vision_config"] | {"vision_use_head": False},
            mm_tokens_per_image=config["mm_tokens_per_image"],
            attn_implementation="eager",
            **names,
        )
    ).eval()
    weights = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        if value.ndim == 4:  # convolutions: mlx has the channels last
            value = value.transpose(0, 3, 1, 2)
        name = name.replace("language_model.model.", "model.language_model.")
        name = name.replace("language_model.lm_head", "lm_head")
        if not name.startswith(("model.", "lm_head")):
            name = f"model.{name}"
        weights[name] = torch.from_numpy(np.array(value))
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    own = set(model.state_dict())
    renamed = {
        name if name in own else name.replace("vision_tower.vision_model", "vision_tower"): value
        for name, value in weights.items()
    }
    assert set(renamed) == own, set(renamed) ^ own
    model.load_state_dict(renamed)
    return model


def hugging_face_qwen2_vl(folder: Path) -> torch.nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = json.loads((folder / "config.json").read_text())
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_dict(config)).eval()
    own = model.state_dict()
    weights = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        if value.ndim == 5:  # convolutions: mlx has the channels last
            value = value.transpose(0, 4, 1, 2, 3)
        name = name.replace("language_model.model.", "model.language_model.")
        name = name.replace("language_model.lm_head", "lm_head").replace("vision_tower.", "model.visual.")
        weights[name] = torch.from_numpy(np.array(value))
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    assert set(weights) == set(own), set(weights) ^ set(own)
    model.load_state_dict(weights)
    return model
