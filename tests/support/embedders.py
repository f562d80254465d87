"""Tiny embedding models and rerankers of real families, written by transformers and sentence-transformers, which are
their oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

ENDS = ["<pad>", "<s>", "</s>", "<unk>"]
"""Special tokens, 0 to 3."""
VOCABULARY = 260
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LANGUAGE = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}


def ended_tokenizer(*, begins: bool = True, ends: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, with tokens around every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*ENDS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(ENDS)
    first, last = "<s> " * begins, " </s>" * ends
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first}$A{last}".strip(),
        pair=f"{first}$A{last} $B:1{' </s>:1' * ends}".strip(),
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def loud(module: torch.nn.Module, times: float = 6.0) -> torch.nn.Module:
    """Weights by which texts differ: transformers begins with ones that hardly do."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, times * 0.02)
            elif "bias" in name:
                weight.normal_(0, 0.1)
    return module.eval()


FAMILIES: Mapping[str, tuple[type, Callable[[], Any], bool]] = {
    "bert": (transformers.BertModel, lambda: transformers.BertConfig(**SIZES), True),
    "roberta": (
        transformers.RobertaModel,
        lambda: transformers.RobertaConfig(**SIZES, type_vocab_size=1),
        True,
    ),
    "xlm-roberta": (
        transformers.XLMRobertaModel,
        lambda: transformers.XLMRobertaConfig(**SIZES, type_vocab_size=1),
        True,
    ),
    "modernbert": (
        transformers.ModernBertModel,
        lambda: transformers.ModernBertConfig(
            **SIZES,
            local_attention=8,
            global_attn_every_n_layers=2,
            global_rope_theta=5000.0,
            local_rope_theta=700.0,
            cls_token_id=1,
            sep_token_id=2,
        ),
        True,
    ),
    "qwen3": (transformers.Qwen3Model, lambda: transformers.Qwen3Config(**LANGUAGE), False),
    "qwen2": (transformers.Qwen2Model, lambda: transformers.Qwen2Config(**{**LANGUAGE}), False),
    "llama": (transformers.LlamaModel, lambda: transformers.LlamaConfig(**LANGUAGE), False),
    "gemma3": (
        transformers.Gemma3TextModel,
        lambda: transformers.Gemma3TextConfig(
            **LANGUAGE,
            use_bidirectional_attention=True,
            sliding_window=8,
            sliding_window_pattern=3,
            query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        ),
        True,
    ),
}
"""Network, configuration, and whether texts begin with a token too."""


def write_backbone(folder: Path, family: str) -> Path:
    """Weights and tokenizer alone."""
    network, config, begins = FAMILIES[family]
    torch.manual_seed(0)
    loud(network(config())).save_pretrained(folder)
    ended_tokenizer(begins=begins).save_pretrained(folder)
    return folder


def write_embedder(
    folder: Path,
    family: str = "bert",
    *,
    pooling: str | tuple[str, ...] = "mean",
    dense: Sequence[tuple[int, Any]] = (),
    normalize: bool = True,
    prompts: Mapping[str, str] | None = None,
    default_prompt: str | None = None,
    include_prompt: bool = True,
    **config: Any,
) -> SentenceTransformer:
    """A folder of sentence-transformers, and what it opens of it. dense: width and activation of layers behind the
    pooling; config: keys that are added to the backbone's config.json."""
    backbone = write_backbone(folder.with_name(f"{folder.name}-backbone"), family)
    first = modules.Transformer(str(backbone), max_seq_length=64)
    parts: list[Any] = [
        first,
        modules.Pooling(first.get_embedding_dimension(), pooling, include_prompt=include_prompt),
    ]
    width = parts[1].pooling_output_dimension
    torch.manual_seed(1)
    for outputs, activation in dense:
        parts.append(modules.Dense(width, outputs, activation_function=activation))
        width = outputs
    if normalize:
        parts.append(modules.Normalize())
    made = SentenceTransformer(
        modules=parts, prompts=dict(prompts or {}), default_prompt_name=default_prompt, device="cpu"
    )
    made.save(str(folder))
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return made


CLASSIFIERS: Mapping[str, tuple[type, bool]] = {
    "bert": (transformers.BertForSequenceClassification, True),
    "xlm-roberta": (transformers.XLMRobertaForSequenceClassification, True),
    "modernbert": (transformers.ModernBertForSequenceClassification, True),
    "qwen3": (transformers.Qwen3ForSequenceClassification, False),
}


def write_classifier(folder: Path, family: str, *, num_labels: int = 1, **config: Any) -> Path:
    """A cross-encoder's folder."""
    network, begins = CLASSIFIERS[family]
    told = FAMILIES[family][1]()
    told.num_labels = num_labels
    for key, value in config.items():
        setattr(told, key, value)
    torch.manual_seed(0)
    loud(network(told)).save_pretrained(folder)
    ended_tokenizer(begins=begins).save_pretrained(folder)
    return folder
