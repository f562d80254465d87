"""Writes random vision-language models of real families, as mlx-vlm loads them, where no download is wanted.

Two: `qwen2_5_vl`, whose positions are three-fold and whose pictures keep their shape, and `smolvlm`, whose pictures
are made square and whose layers take any mask in place of their own. The text part is `lathe bench train`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from serve.bench.standin import EOS_TOKEN_ID, MAX_CONTEXT, Size, word_tokenizer
from serve.bench.standin_vlm import module_of, random_weights

SPECIALS: Mapping[str, str] = {
    "image_token": "<image>",
    "video_token": "<video>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
"""By the names that processors ask the tokenizer for."""
SQUARE = 224
"""Side of smolvlm's pictures."""


@dataclass(frozen=True)
class Tower:
    """How large what looks at pictures is."""

    width: int
    num_layers: int
    num_heads: int


MIDDLE = Tower(384, 8, 6)
SMALL = Tower(64, 2, 2)

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content if part.type == 'image' %}PLACEHOLDER{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n' }}<|im_start|>assistant\n{% endif %}"
)
"""Pictures before words, wherever a message has them; nothing stands behind a turn's last token."""


def write_model(
    family: str, folder: Path, dtype: mx.Dtype, size: Size, tower: Tower = MIDDLE, seed: int = 0
) -> None:
    """The model folder: config, weights, tokenizer with chat template, processor. `family`: one of FAMILIES."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer(folder, size, tuple(SPECIALS.values()))
    ids = {name: tokenizer.get_vocab()[token] for name, token in SPECIALS.items()}
    make, placeholder = FAMILIES[family]
    config, files = make(size, tower, ids)
    config |= {"model_type": family, "eos_token_id": EOS_TOKEN_ID, "torch_dtype": str(dtype).split(".")[-1]}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {
        "chat_template": CHAT_TEMPLATE.replace("PLACEHOLDER", placeholder),
        "extra_special_tokens": dict(SPECIALS),
    }
    for name, written in {"config.json": config, "tokenizer_config.json": settings, **files}.items():
        (folder / name).write_text(json.dumps(written, indent=2) + "\n")
    in_tokenizer = (mx.arange(size.vocabulary) < tokenizer.get_vocab_size()).astype(dtype)
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        random_weights(module_of(config), seed, dtype, in_tokenizer),
        metadata={"format": "mlx"},
    )


def _text(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.num_layers,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": MAX_CONTEXT,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }


def _rope_sections(head_dim: int) -> list[int]:
    """Of half a head's channels: by time, height and width."""
    return [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16]


def _qwen2_5_vl(size: Size, tower: Tower, ids: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": tower.num_layers,
        "hidden_size": tower.width,
        "intermediate_size": 3 * tower.width,
        "out_hidden_size": size.hidden,
        "num_heads": tower.num_heads,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [tower.num_layers // 2 - 1, tower.num_layers - 1],
    }
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        **_text(size),
        "rope_scaling": {"type": "mrope", "mrope_section": _rope_sections(size.head_dim)},
        "vision_config": vision,
        "image_token_id": ids["image_token"],
        "video_token_id": ids["video_token"],
        "vision_start_token_id": ids["vision_start_token"],
        "vision_end_token_id": ids["vision_end_token"],
    }
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 28 * 28,
        "max_pixels": 448 * 448,
    }
    return config, {"preprocessor_config.json": processor}


def _smolvlm(size: Size, tower: Tower, ids: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    vision = {
        "model_type": "smolvlm_vision",
        "hidden_size": tower.width,
        "intermediate_size": 3 * tower.width,
        "num_hidden_layers": tower.num_layers,
        "num_attention_heads": tower.num_heads,
        "patch_size": 14,
        "image_size": SQUARE,
    }
    config = {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "text_config": {"model_type": "llama", **_text(size), "head_dim": size.head_dim},
        "vision_config": vision,
        "scale_factor": 2,
        "image_token_id": ids["image_token"],
        "vocab_size": size.vocabulary,
    }
    processor = {
        "image_processor_type": "SmolVLMImageProcessor",
        "processor_class": "SmolVLMProcessor",
        "do_image_splitting": False,
        "size": {"longest_edge": SQUARE},
        "max_image_size": {"longest_edge": SQUARE},
    }
    pieces = {"processor_class": "SmolVLMProcessor", "image_seq_len": (SQUARE // 14 // 2) ** 2}
    return config, {"preprocessor_config.json": processor, "processor_config.json": pieces}


Maker = Callable[[Size, Tower, Mapping[str, int]], tuple[dict[str, Any], dict[str, Any]]]
"""(config.json, other files by name) of a size, with the ids of SPECIALS."""
FAMILIES: Mapping[str, tuple[Maker, str]] = {
    "qwen2_5_vl": (_qwen2_5_vl, "<|vision_start|><image><|vision_end|>"),
    "smolvlm": (_smolvlm, "<image>"),
}
"""Each with what its chat template writes for a picture."""
