"""Writes a random model that sees: a small language model behind a deep tower, where no download is wanted.

A qwen2_vl, as `mlx_vlm.load` opens it. Its greedy answers hold no stop token, as the text stand-in's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from serve.bench import standin

PATCH, MERGE = 14, 2
MAX_FRAMES = 32
SIGHT_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """How large the model is. The language model's own sizes are small."""

    tower_layers: int = 24
    tower_hidden: int = 256
    tower_heads: int = 4
    hidden: int = 128
    num_layers: int = 2
    max_pixels: int = 448 * 448
    """Of a picture and of a frame; larger ones are made smaller."""


def write_model(folder: Path, dtype: mx.Dtype, size: Size, seed: int = 0) -> None:
    """The model folder: config, weights, tokenizer with chat template, processor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = standin.word_tokenizer(folder, standin.SMALLEST, SIGHT_TOKENS)
    config = _config(tokenizer, size)
    files = {
        "config.json": {**config, "torch_dtype": str(dtype).split(".")[-1]},
        "tokenizer_config.json": {
            **json.loads((folder / "tokenizer_config.json").read_text()),
            "chat_template": CHAT_TEMPLATE,
        },
        "preprocessor_config.json": _preprocessor("image", size),
        "video_preprocessor_config.json": _preprocessor("video", size),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    speakable = standin.speakable(tokenizer, config["vocab_size"], dtype)
    weights = random_weights(module_of(config), seed, dtype, speakable)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def _config(tokenizer: Tokenizer, size: Size) -> dict[str, Any]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    head_dim = 32
    return {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "hidden_size": size.hidden,
        "num_hidden_layers": size.num_layers,
        "intermediate_size": 2 * size.hidden,
        "num_attention_heads": size.hidden // head_dim,
        "num_key_value_heads": size.hidden // head_dim,
        "rms_norm_eps": 1e-6,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": standin.MAX_CONTEXT,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": standin.EOS_TOKEN_ID,
        **{name: tokenizer.token_to_id(token) for name, token in zip(names, SIGHT_TOKENS, strict=True)},
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": size.tower_layers,
            "embed_dim": size.tower_hidden,
            "hidden_size": size.hidden,
            "num_heads": size.tower_heads,
            "patch_size": PATCH,
            "mlp_ratio": 2,
            "in_channels": 3,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
    }


def _preprocessor(kind: str, size: Size) -> dict[str, Any]:
    edge = MERGE * PATCH
    is_video = kind == "video"
    frames = {"fps": 2, "min_frames": 2, "max_frames": MAX_FRAMES} if is_video else {}
    # Of a clip's, all frames together.
    max_pixels = size.max_pixels * (MAX_FRAMES if is_video else 1)
    return {
        f"{kind}_processor_type": f"Qwen2VL{kind.capitalize()}Processor",
        "processor_class": "Qwen2VLProcessor",
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "min_pixels": edge**2,
        "max_pixels": max_pixels,
        "size": {"shortest_edge": edge**2, "longest_edge": max_pixels},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        **frames,
    }


def module_of(config: Mapping[str, Any]) -> nn.Module:
    """The family's module for a config.json, as mlx-vlm's loader makes it."""
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    told = json.loads(json.dumps(config))
    for part in ("text_config", "audio_config"):
        told.setdefault(part, {})
    family, _ = get_model_and_args(told)
    parts = ["text", "vision", "perceiver", "projector", "audio"]
    made: nn.Module = family.Model(
        update_module_configs(family.ModelConfig.from_dict(told), family, told, parts)
    )
    return made


def random_weights(module: nn.Module, seed: int, dtype: mx.Dtype, speakable: mx.array) -> dict[str, mx.array]:
    """Of every matrix columns of unit length on average, so that what a picture adds is as loud as a word.

    speakable  [V]  1 for tokens that answers may hold, 0 for those that the head gives none of
    """
    shapes = {name: tensor.shape for name, tensor in tree_flatten(module.parameters())}
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    weights = {}
    for key, (name, shape) in zip(keys, sorted(shapes.items()), strict=True):
        if len(shape) == 1:
            weights[name] = mx.zeros(shape, dtype) if name.endswith("bias") else mx.ones(shape, dtype)
        else:
            num_inputs = prod(shape[1:])
            weights[name] = (mx.random.normal(shape, key=key) * num_inputs**-0.5).astype(dtype)
    head = next(name for name in weights if name.endswith("lm_head.weight"))
    weights[head] = weights[head] * speakable[:, None]
    return weights
