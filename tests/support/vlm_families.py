"""Tiny, lively, random checkpoints of mlx-vlm's families, and mlx-vlm's own code on one row alone.

`write_vlm(family, folder)` writes config, weights, tokenizer, chat template and processor files that a plain
`mlx_vlm.load` opens. `Reference(folder)` is what every other way of running such a model is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import serve as serve  # before mlx: it brings a real BLAS

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.manifest import write_adapter
from serve.model.prompt import Rope

HIDDEN = 128
PAD, START, END, BOS = "<|pad|>", "<|im_start|>", "<|im_end|>", "<|bos|>"
MERGES = [("Ċ", "Ċ"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("r", "e"), ("o", "n")]
"""Of the byte-level BPE: among them two newlines, which gemma3's pictures stand between."""

TEXT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
"""Of every family's language model."""
SIGLIP = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_channels": 3,
    "patch_size": 14,
    "image_size": 56,
}
"""Of every tower that takes pictures of one size."""
STATISTICS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True)
class Family:
    """How to write one.

    image, video, audio  what the chat template writes where such a part stands; None: the family takes none
    config               of config.json; gets the tokenizer
    named_tokens         special tokens the processor asks the tokenizer for by name
    other_tokens         further special tokens
    files                beside config, weights and tokenizer: name → content
    embeds_std           of the token embeddings; gemma multiplies them by √D
    louder               more of the language model's weights, by a part of the name
    projector            parts of the names of the layers whose outputs are features, and by how much they are louder
    is_causal            a token never moves what was computed before it
    max_pictures         in a prompt; 1: exactly one
    has_template         its folders hold a chat template
    """

    config: Callable[[PreTrainedTokenizerFast], dict[str, Any]]
    image: str | None
    files: Mapping[str, Any]
    video: str | None = None
    audio: str | None = None
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    other_tokens: Sequence[str] = ()
    embeds_std: float = 1.0
    louder: Mapping[str, float] = field(default_factory=dict)
    projector: Sequence[str] = ()
    projector_gain: float = 5.0
    is_causal: bool = True
    max_pictures: int | None = None
    has_template: bool = True


def _ids(tokenizer: PreTrainedTokenizerFast, **names: str) -> dict[str, int]:
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>")
QWEN_PARTS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "other_tokens": QWEN_TOKENS,
    "projector": ("merger.mlp.2", "linear_fc2"),
    "embeds_std": 0.4,
    "louder": {"q_norm": 3, "q_proj": 6},
}
"""Attention that is sharp, and more than the token itself: four tokens of a picture are few among a prompt's."""


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return _ids(
        tokenizer,
        image_token_id="<|image_pad|>",
        video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>",
        vision_end_token_id="<|vision_end|>",
        vision_token_id="<|vision_pad|>",
    )


def _qwen_files(patch_size: int, kind: str) -> dict[str, Any]:
    factor = 2 * patch_size
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": f"{kind}Processor",
            "patch_size": patch_size,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "min_pixels": factor**2,
            "max_pixels": (4 * factor) ** 2,
            "size": {"shortest_edge": factor**2, "longest_edge": (4 * factor) ** 2},
            **STATISTICS,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": f"{kind}VideoProcessor",
            "patch_size": patch_size,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "fps": 2,
            "min_frames": 2,
            "max_frames": 32,
            "min_pixels": factor**2,
            "max_pixels": 16 * (2 * factor) ** 2,
            "size": {"shortest_edge": factor**2, "longest_edge": 16 * (2 * factor) ** 2},
            **STATISTICS,
        },
    }


def _qwen2_vl(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **TEXT,
        **_qwen_ids(tokenizer),
        "vocab_size": len(tokenizer),
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vision_config": {
            "model_type": "qwen2_vl",
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": HIDDEN,
            "num_heads": 2,
            "patch_size": 14,
            "mlp_ratio": 2,
            "in_channels": 3,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def _qwen2_5_vl(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **_qwen2_vl(tokenizer),
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": HIDDEN,
            "num_heads": 2,
            "patch_size": 14,
            "in_channels": 3,
            "in_chans": 3,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
    }


QWEN3_TOWER = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "out_hidden_size": HIDDEN,
    "num_heads": 2,
    "patch_size": 16,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
}


def _qwen3_vl(
    tokenizer: PreTrainedTokenizerFast, model_type: str = "qwen3_vl", **text: object
) -> dict[str, Any]:
    return {
        **_qwen_ids(tokenizer),
        "vocab_size": len(tokenizer),
        "text_config": {
            **TEXT,
            "model_type": f"{model_type}_text",
            "vocab_size": len(tokenizer),
            "head_dim": 32,
            "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
            **text,
        },
        "vision_config": {**QWEN3_TOWER, "model_type": model_type, "deepstack_visual_indexes": [0, 1]},
    }


def _qwen3_vl_moe(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return _qwen3_vl(
        tokenizer,
        "qwen3_vl_moe",
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=64,
        norm_topk_prob=True,
    )


def _qwen3_5(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **_qwen_ids(tokenizer),
        "vocab_size": len(tokenizer),
        "text_config": {
            **TEXT,
            "model_type": "qwen3_5_text",
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 4,
            "head_dim": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 2,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 1, 1],
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        },
        "vision_config": {**QWEN3_TOWER, "model_type": "qwen3_5", "deepstack_visual_indexes": []},
    }


def _gemma3(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **_ids(
            tokenizer,
            image_token_index="<image_soft_token>",
            boi_token_index="<start_of_image>",
            eoi_token_index="<end_of_image>",
        ),
        "hidden_size": HIDDEN,
        "mm_tokens_per_image": 4,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "text_config": {
            **TEXT,
            "model_type": "gemma3_text",
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 4,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "sliding_window_pattern": 2,
            "rope_theta": 1000000.0,
            "rope_global_base_freq": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "mm_tokens_per_image": 4,
        },
        "vision_config": {**SIGLIP, "model_type": "siglip_vision_model"},
    }


def _idefics3(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **_ids(tokenizer, image_token_id="<image>"),
        "scale_factor": 2,
        "vocab_size": len(tokenizer),
        "text_config": {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        "vision_config": {**SIGLIP, "model_type": "idefics3"},
    }


def _smolvlm(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {**_idefics3(tokenizer), "vision_config": {**SIGLIP, "model_type": "smolvlm_vision"}}


def _idefics_files(kind: str) -> dict[str, Any]:
    return {
        "preprocessor_config.json": {
            "image_processor_type": f"{kind}ImageProcessor",
            "processor_class": f"{kind}Processor",
            "do_image_splitting": False,
            "size": {"longest_edge": 56},
            "max_image_size": {"longest_edge": 56},
            **STATISTICS,
        },
        "processor_config.json": {"processor_class": f"{kind}Processor", "image_seq_len": 4},
    }


IDEFICS_TOKENS = (
    *("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"),
    *(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)),
)


def _paligemma(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    from mlx_vlm.models.paligemma.processing_paligemma import EXTRA_TOKENS

    vocab_size = len(tokenizer) + len(EXTRA_TOKENS)
    return {
        **_ids(tokenizer, image_token_index="<image>"),
        "hidden_size": HIDDEN,
        "vocab_size": vocab_size,
        "pad_token_id": tokenizer.pad_token_id,
        "text_config": {**TEXT, "model_type": "gemma", "vocab_size": vocab_size, "head_dim": 32},
        "vision_config": {**SIGLIP, "model_type": "siglip_vision_model", "projection_dim": HIDDEN},
    }


def _pixtral(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **_ids(tokenizer, image_token_index="[IMG]"),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vocab_size": len(tokenizer),
        "text_config": {**TEXT, "model_type": "mistral", "vocab_size": len(tokenizer), "head_dim": 32},
        "vision_config": {
            **SIGLIP,
            "model_type": "pixtral",
            "head_dim": 32,
            "image_size": 112,
            "rope_theta": 10000.0,
        },
    }


def _internvl_chat(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **_ids(tokenizer, image_token_index="<IMG_CONTEXT>"),
        "downsample_ratio": 0.5,
        "force_image_size": 56,
        "max_dynamic_patch": 4,
        "vocab_size": len(tokenizer),
        "text_config": {**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        "vision_config": {**SIGLIP, "model_type": "intern_vit_6b"},
    }


def _llava(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        **_ids(tokenizer, image_token_index="<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": len(tokenizer),
        "text_config": {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        "vision_config": {**SIGLIP, "model_type": "clip_vision_model"},
    }


OMNI_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}


def _qwen3_omni_moe(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    shared = _qwen3_vl_moe(tokenizer)
    thinker = {
        **_qwen_ids(tokenizer),
        **_ids(
            tokenizer,
            audio_token_id="<|audio_pad|>",
            audio_start_token_id="<|audio_start|>",
            audio_end_token_id="<|audio_end|>",
        ),
        "model_type": "qwen3_omni_moe_thinker",
        "text_config": {**shared["text_config"], "model_type": "qwen3_omni_moe_text"},
        "vision_config": {**shared["vision_config"], "model_type": "qwen3_omni_moe_vision_encoder"},
        "audio_config": {
            "model_type": "qwen3_omni_moe_audio_encoder",
            "d_model": 64,
            "encoder_layers": 2,
            "num_hidden_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 96,
            "num_mel_bins": 16,
            "output_dim": HIDDEN,
            "downsample_hidden_size": 16,
            "max_source_positions": 200,
        },
    }
    return {
        "enable_audio_output": False,
        "vocab_size": len(tokenizer),
        "thinker_config": thinker,
        "talker_config": {"text_config": thinker["text_config"]},  # read, though there is no talker
    }


def _omni_files() -> dict[str, Any]:
    files = _qwen_files(16, "Qwen3OmniMoe")
    sound = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 16,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 4,
        "return_attention_mask": True,
    }
    return {**files, "preprocessor_config.json": files["preprocessor_config.json"] | sound}


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(_qwen2_vl, files=_qwen_files(14, "Qwen2VL"), **QWEN_PARTS),
    "qwen2_5_vl": Family(_qwen2_5_vl, files=_qwen_files(14, "Qwen2VL"), **QWEN_PARTS),
    "qwen3_vl": Family(_qwen3_vl, files=_qwen_files(16, "Qwen3VL"), **QWEN_PARTS),
    "qwen3_5": Family(_qwen3_5, files=_qwen_files(16, "Qwen3VL"), **QWEN_PARTS),
    "gemma3": Family(
        _gemma3,
        image="<start_of_image>",
        named_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
        files={
            "preprocessor_config.json": {
                "image_processor_type": "Gemma3ImageProcessor",
                "processor_class": "Gemma3Processor",
                "image_seq_length": 4,
                "size": {"height": 56, "width": 56},
                **STATISTICS,
            },
            "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        },
        embeds_std=HIDDEN**-0.5,
        louder={"post_attention_layernorm": 3.0, "post_feedforward": 3.0},
        projector=("mm_soft_emb_norm",),
        projector_gain=1.0,
    ),
    "idefics3": Family(
        _idefics3,
        image="<image>",
        other_tokens=IDEFICS_TOKENS,
        files=_idefics_files("Idefics3"),
        projector=("modality_projection",),
        projector_gain=2.0,
    ),
    "smolvlm": Family(
        _smolvlm,
        image="<image>",
        named_tokens={
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "end_of_utterance_token": "<end_of_utterance>",
            "global_image_token": "<global-img>",
        },
        other_tokens=IDEFICS_TOKENS,
        embeds_std=0.4,
        louder={"q_proj": 6},
        files=_idefics_files("SmolVLM"),
        projector=("modality_projection",),
        projector_gain=2.0,
    ),
    "paligemma": Family(
        _paligemma,
        image="<image>",
        named_tokens={"image_token": "<image>"},
        files={
            "preprocessor_config.json": {
                "image_processor_type": "SiglipImageProcessor",
                "processor_class": "PaliGemmaProcessor",
                "image_seq_length": 16,
                "size": {"height": 56, "width": 56},
                **STATISTICS,
            },
            "processor_config.json": {"processor_class": "PaliGemmaProcessor", "image_seq_length": 16},
        },
        embeds_std=HIDDEN**-0.5,
        projector=("multi_modal_projector",),
        projector_gain=2.0,
        is_causal=False,
        max_pictures=1,
        has_template=False,
    ),
    "pixtral": Family(
        _pixtral,
        image="[IMG]",
        other_tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        files={
            "preprocessor_config.json": {
                "image_processor_type": "PixtralImageProcessor",
                "processor_class": "PixtralProcessor",
                "patch_size": {"height": 14, "width": 14},
                "size": {"longest_edge": 56},
                **STATISTICS,
            },
            "processor_config.json": {"processor_class": "PixtralProcessor", "patch_size": 14},
        },
        projector=("linear_2",),
    ),
    "internvl_chat": Family(
        _internvl_chat,
        image="<image>\n",
        other_tokens=("<img>", "</img>", "<IMG_CONTEXT>"),
        files={},
        projector=("mlp1.3",),
    ),
    "llava": Family(
        _llava,
        image="<image>",
        named_tokens={"image_token": "<image>"},
        files={
            "preprocessor_config.json": {
                "image_processor_type": "CLIPImageProcessor",
                "processor_class": "LlavaProcessor",
                "size": {"shortest_edge": 56},
                "crop_size": {"height": 56, "width": 56},
                **STATISTICS,
            },
            "processor_config.json": {
                "processor_class": "LlavaProcessor",
                "patch_size": 14,
                "num_additional_image_tokens": 1,
                "vision_feature_select_strategy": "default",
            },
        },
        projector=("multi_modal_projector.linear_2",),
        projector_gain=10.0,
    ),
    "qwen3_vl_moe": Family(_qwen3_vl_moe, files=_qwen_files(16, "Qwen3VL"), **QWEN_PARTS),
    "qwen3_omni_moe": Family(
        _qwen3_omni_moe,
        files=_omni_files(),
        audio="<|audio_start|><|audio_pad|><|audio_end|>",
        named_tokens=OMNI_NAMES,
        **{**QWEN_PARTS, "projector": ("merger.mlp.2", "linear_fc2", "audio_tower.proj2")},
    ),
}
VLM_FAMILIES = tuple(FAMILIES)
LARGE_VLM_FAMILIES = [
    pytest.param(family, marks=() if family in ("qwen3_vl", "gemma3") else pytest.mark.large)
    for family in FAMILIES
]
"""For `parametrize`: two always run (positions, deepstack; windows, blocks), the others under the marker large."""


def write_vlm(family: str, folder: Path, *, seed: int = 0) -> Path:
    """A lively random model of a family, as a folder that `mlx_vlm.load` opens; another seed, other weights."""
    kind = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(kind)
    tokenizer.save_pretrained(folder)
    config = {
        "model_type": family,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **kind.config(tokenizer),
    }
    for name, content in {**kind.files, "config.json": config}.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    mx.random.seed(seed)
    module = build(json.loads(json.dumps(config)))
    _enliven(module, kind)
    weights = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def build(config: dict[str, Any]) -> nn.Module:
    """The family's module with random weights, made as mlx-vlm's loader makes it; it may change `config`."""
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    arch, _ = get_model_and_args(config)
    config.setdefault("text_config", {})
    config.setdefault("vision_config", {})
    config.setdefault("audio_config", {})
    parts = ["text", "vision", "perceiver", "projector", "audio"]
    return arch.Model(update_module_configs(arch.ModelConfig.from_dict(config), arch, config, parts))


def _tokenizer(kind: Family) -> PreTrainedTokenizerFast:
    special = [PAD, START, END, BOS, *dict.fromkeys([*kind.named_tokens.values(), *kind.other_tokens])]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*special, *alphabet, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=dict(kind.named_tokens),
        chat_template=_chat_template(kind) if kind.has_template else None,
        clean_up_tokenization_spaces=False,
    )


def _chat_template(kind: Family) -> str:
    """Content is a text or a list of parts; a part of a kind that the family does not take is left out."""
    parts = "".join(
        f"{{% elif part.type == '{name}' %}}{{{{ {json.dumps(text)} }}}}"
        for name, text in (("image", kind.image), ("video", kind.video), ("audio", kind.audio))
        if text is not None
    )
    return (
        "{% for m in messages %}"
        f"{START}{{{{ m.role }}}}\n"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}" + parts + "{% endif %}"
        "{% endfor %}{% endif %}"
        f"{END}\n"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{START}assistant\n{{% endif %}}"
    )


def _enliven(module: nn.Module, kind: Family) -> None:
    """Weights whose greedy text depends on every token and every picture before it: a plain random model repeats one
    token, and so hides faults of masks, positions and features."""
    scales = {"o_proj": 4, "down_proj": 4, "out_proj": 4, "q_proj": 2, "k_proj": 2, **kind.louder}
    changed: list[tuple[str, mx.array]] = []
    for path, weight in tree_flatten(module.parameters()):
        if "mm_input_projection_weight" in path:  # it is born all ones, which makes every feature nothing
            changed.append((path, mx.random.normal(weight.shape) * weight.shape[0] ** -0.5))
        elif "language_model" not in path:
            if any(part in path for part in kind.projector):
                changed.append((path, weight * kind.projector_gain))
        elif path.endswith("embed_tokens.weight"):
            changed.append((path, mx.random.normal(weight.shape) * kind.embeds_std))
        elif path.endswith("lm_head.weight"):
            changed.append((path, mx.random.normal(weight.shape) * 1.5 * weight.shape[-1] ** -0.5))
        elif factor := next((scale for part, scale in scales.items() if part in path), None):
            changed.append((path, weight * factor))
    module.load_weights(changed, strict=False)


def picture(seed: int, width: int = 56, height: int = 56) -> Image.Image:
    """Coarse random colours, so that resizing keeps what tells pictures apart."""
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST)


def sound(seed: int, seconds: float = 1.0, rate: int = 16000) -> np.ndarray:
    """[n] float32: a few tones that begin one after another."""
    pitches = np.random.default_rng(seed).uniform(100, 3000, 4)
    times = np.arange(round(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * p * times) * (times >= i * seconds / 4) for i, p in enumerate(pitches)]
    return (sum(tones) / 4).astype(np.float32)


def clip(seed: int, num_frames: int = 4, width: int = 56, height: int = 56) -> np.ndarray:
    """[T, 3, H, W] uint8: one picture after another."""
    frames = [np.asarray(picture(1000 * seed + i, width, height)) for i in range(num_frames)]
    return np.stack(frames).transpose(0, 3, 1, 2)


def message(*parts: str | Image.Image | np.ndarray, role: str = "user") -> dict[str, Any]:
    """A chat message: texts, pictures, clips [T, 3, H, W] and sounds [n] in their order."""

    def typed(part: str | Image.Image | np.ndarray) -> tuple[str, object]:
        if isinstance(part, np.ndarray):
            return ("audio" if part.ndim == 1 else "video"), part
        return ("text" if isinstance(part, str) else "image"), part

    return {
        "role": role,
        "content": [{"type": kind, kind: value} for kind, value in map(typed, parts)],
    }


def chats_of(family: str) -> dict[str, list[dict[str, Any]]]:
    """A chat of each kind that the family takes, by its name."""
    kind = FAMILIES[family]
    chats = {
        "text": [message("hello there, how are you?")],
        "picture": [message(picture(1, 56, 80), "what is this?")],
        "pictures": [message(picture(1), "a", picture(2, 80, 56), "b", picture(3), "which is second?")],
        "clip": [message("look: ", clip(1, 5), "what is this?")],
        "sounds": [message(sound(1, 1.3), "and", sound(2, 0.7), "what do you hear?")],
    }
    if kind.max_pictures == 1:
        del chats["text"], chats["pictures"]
        chats["another picture"] = [message(picture(2), "is it the same as before?")]
    if kind.video is None:
        del chats["clip"]
    if kind.audio is None:
        del chats["sounds"]
    return chats


@dataclass(frozen=True)
class Row:
    """What mlx-vlm's processor makes of one prompt.

    token_ids  with every placeholder expanded
    inputs     what `get_input_embeddings` takes besides ids; "pixel_values" may be among them
    rope       where tokens stand instead: mlx-vlm's own rule counts no seconds of clips (test_clip_steps)
    """

    token_ids: tuple[int, ...]
    inputs: dict[str, Any] = field(default_factory=dict)
    rope: Rope | None = None


class Reference:
    """mlx-vlm's own code over one checkpoint: one row alone, the whole prompt at once, its own cache."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        """`adapter`: a LoRA folder that is merged into the weights."""
        from mlx_vlm import load

        self.model, self.processor = load(str(folder))
        self.model.eval()
        if self.model.config.model_type == "paligemma":
            _put_features_at_placeholders(self.model)
        if adapter is not None:
            merge_lora(self.model, adapter)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return getattr(self.processor, "tokenizer", self.processor)

    def row(self, messages: Sequence[Mapping[str, Any]]) -> Row:
        """A chat whose media parts carry what they show: {"type": "image", "image": PIL picture}, {"type": "video",
        "video": [T, 3, H, W] uint8}; by the checkpoint's template and the family's processor."""
        parts = [
            part
            for m in messages
            for part in (
                [{"type": "text", "text": m["content"]}] if isinstance(m["content"], str) else m["content"]
            )
        ]
        if (
            self.tokenizer.chat_template is None
        ):  # paligemma: its processor adds beginning and new line to pictures
            text = "".join(part["text"] if part["type"] == "text" else "<image>" for part in parts)
            text = text if "<image>" in text else f"{BOS}{text}\n"
        else:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        media = {
            name: found
            for name, kind in (("images", "image"), ("videos", "video"), ("audio", "audio"))
            if (found := [part[kind] for part in parts if part["type"] == kind])
        }
        return self.row_of_text(text, **media)

    def row_of_text(self, text: str, **media: list[Any]) -> Row:
        """Of a text that holds each medium's placeholder once."""
        if not media:
            return Row(tuple(self.tokenizer(text)["input_ids"]))
        # No `padding`: llava's processor hands it on to its image processor, which knows no such word.
        made = dict(self.processor(text=[text], **media))
        ids = np.array(made.pop("input_ids")).reshape(-1)
        without = {"attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "image_token_index"}
        inputs = {name: value for name, value in made.items() if name not in without}
        return Row(tuple(ids.tolist()), {name: _array(value) for name, value in inputs.items()})

    def logits(self, row: Row, answer: Sequence[int] = ()) -> mx.array:
        """[len(answer) + 1, V]: after the prompt, and after each token of an answer that is fed one by one."""
        cache, last = self._prefill(row)
        found = [last]
        for token in answer:
            found.append(self.model.language_model(mx.array([[token]]), cache=cache).logits[0, -1])
        return mx.stack(found).astype(mx.float32)

    def greedy(self, row: Row, max_tokens: int) -> list[int]:
        """The likeliest token, time and again; no end is heeded."""
        cache, logits = self._prefill(row)
        tokens: list[int] = []
        while True:
            tokens.append(int(mx.argmax(logits).item()))
            if len(tokens) == max_tokens:
                return tokens
            logits = self.model.language_model(mx.array([[tokens[-1]]]), cache=cache).logits[0, -1]

    def _prefill(self, row: Row) -> tuple[list[Any], mx.array]:
        """The cache, and logits [V] behind the prompt: as `mlx_vlm.generate.generate_step` goes without chunks."""
        from mlx_vlm.models.cache import make_prompt_cache

        language = self.model.language_model
        for name in ("_position_ids", "_rope_deltas"):  # of the row before
            if hasattr(language, name):
                setattr(language, name, None)
        ids = mx.array([row.token_ids])
        inputs = dict(row.inputs)
        features = self.model.get_input_embeddings(
            ids, inputs.pop("pixel_values", None), mask=mx.ones_like(ids), **inputs
        ).to_dict()
        extras = {name: value for name, value in features.items() if value is not None}
        if row.rope is not None:
            positions, delta = row.rope
            extras |= {"position_ids": mx.array(positions[:, None]), "rope_deltas": mx.array([[delta]])}
        cache = make_prompt_cache(language)
        with self._seeing_blocks(row, cache):
            out = language(ids, inputs_embeds=extras.pop("inputs_embeds"), cache=cache, **extras)
        return cache, out.logits[0, -1]

    @contextmanager
    def _seeing_blocks(self, row: Row, cache: list[Any]) -> Iterator[None]:
        """gemma3's pictures see themselves both ways, as in Hugging Face's code; mlx-vlm's leaves that out, so here
        its layers get such masks from their caches."""
        if self.model.config.model_type != "gemma3":
            yield
            return
        is_picture = np.array(row.token_ids) == self.model.config.image_token_index
        number = np.cumsum(np.diff(is_picture.astype(int), prepend=0) == 1)  # of the picture, from 1 on
        queries, keys = np.indices((len(number),) * 2)
        both = is_picture[queries] & is_picture[keys] & (number[queries] == number[keys])
        seen = (keys <= queries) | both

        def mask(*_: object, window_size: int | None = None, **__: object) -> mx.array:
            return mx.array(seen if window_size is None else seen & (keys > queries - window_size))

        for layer in cache:
            layer.make_mask = mask
        try:
            yield
        finally:
            for layer in cache:
                del layer.make_mask


def _put_features_at_placeholders(model: nn.Module) -> None:
    """mlx-vlm's paligemma puts them at the prompt's beginning, wherever its placeholders are. Here that is so while
    they are put: the prompt is turned until its placeholders come first, and back."""
    put = model._prepare_inputs_for_multimodal

    def turned(features: mx.array, embeds: mx.array, ids: mx.array, mask: mx.array) -> tuple[mx.array, ...]:
        start = int(np.argmax(np.array(ids)[0] == model.config.image_token_index))
        made, mask = put(features, mx.roll(embeds, -start, axis=1), mx.roll(ids, -start, axis=1), mask)
        return mx.roll(made, start, axis=1), mask

    model._prepare_inputs_for_multimodal = turned


def write_random_lora(
    model_folder: Path,
    folder: Path,
    *,
    seed: int,
    rank: int = 4,
    scale: float = 2.0,
    size: float = 0.2,
    parts: Sequence[str] = ("language_model",),
    keys: Sequence[str] = (),
) -> Path:
    """A LoRA of all linear layers, named as mlx-vlm names them, in mlx-lm's layout.

    parts  of the names of layers that get one: ("vision_tower",) is a tower's
    keys   last parts of the names, as "q_proj"; empty: all
    """
    from mlx_vlm.utils import load_model

    linears = {
        path: layer
        for path, layer in load_model(model_folder).named_modules()
        if isinstance(layer, nn.Linear)
        and any(part in path for part in parts)
        and (not keys or path.rsplit(".", 1)[-1] in keys)
    }
    mx.random.seed(seed)
    tensors = {}
    for path, layer in sorted(linears.items()):
        outputs, inputs = layer.weight.shape
        tensors[f"{path}.lora_a"] = mx.random.normal((inputs, rank)) * inputs**-0.5
        tensors[f"{path}.lora_b"] = mx.random.normal((rank, outputs)) * size
    write_adapter(folder, tensors, AdapterConfig("lora", -1, rank, scale))
    return folder


def merge_lora(module: nn.Module, adapter: Path) -> None:
    """Adds scale · (a b)ᵀ to the weights, in mlx-lm's layout of adapter folders."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = mx.load(str(adapter / "adapters.safetensors"))
    weights = dict(tree_flatten(module.parameters()))
    for name, a in tensors.items():
        if name.endswith(".lora_a"):
            path = name.removesuffix(".lora_a")
            weight = f"{path}.weight"
            delta = config["lora_parameters"]["scale"] * (a @ tensors[f"{path}.lora_b"])
            module.load_weights([(weight, weights[weight] + delta.T)], strict=False)


def _array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return mx.array(value)
    if isinstance(value, list) and value and isinstance(value[0], np.ndarray):
        return [mx.array(item) for item in value]
    return value
