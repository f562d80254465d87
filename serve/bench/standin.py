"""Writes a random model of a real family, and random adapters for it, where no download is wanted.

The model is 29M parameters of qwen3: 512 wide, 8 layers. Its greedy answers are runs of different tokens that
depend on all of the prompt, and hold no stop token: every server generates as many tokens as it is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from serve.adapters.manifest import AdapterConfig, write_adapter
from serve.bench.prompts import WORDS, PromptMaker

NUM_LAYERS = 8
HIDDEN = 512
VOCABULARY = 4096
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, 512),
    "self_attn.k_proj": (HIDDEN, 256),
    "self_attn.v_proj": (HIDDEN, 256),
    "self_attn.o_proj": (512, HIDDEN),
    "mlp.gate_proj": (HIDDEN, 1536),
    "mlp.up_proj": (HIDDEN, 1536),
    "mlp.down_proj": (1536, HIDDEN),
}
"""(in, out) of each linear layer, as CONFIG makes them."""


def write_model(folder: Path, dtype: mx.Dtype, seed: int = 0, vocabulary: int = VOCABULARY) -> None:
    """The model folder, as mlx-lm and mlx-vlm load it: config, weights, tokenizer with chat template.

    vocabulary  rows of embedding and head; those past the tokenizer's 4,096 are never met in text
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    config = {**CONFIG, "vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": str(dtype).split(".")[-1]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": CONFIG["eos_token_id"]}))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "additional_special_tokens": list(SPECIALS),
                "model_max_length": CONFIG["max_position_embeddings"],
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
    weights = {name: tensor.astype(dtype) for name, tensor in _weights(tokenizer, seed, config).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def write_adapters(folder: Path, count: int, rank: int = 16, seed: int = 1) -> dict[str, Path]:
    """`count` random adapters of all linear layers, each in its own folder: name -> folder."""
    config = AdapterConfig("lora", NUM_LAYERS, rank=rank, scale=2.0, keys=tuple(SHAPES))
    paths = {f"adapter-{number}": folder / f"adapter-{number}" for number in range(count)}
    for number, path in enumerate(paths.values()):
        keys = iter(mx.random.split(mx.random.key(seed + number), 2 * NUM_LAYERS * len(SHAPES)))
        tensors: dict[str, mx.array] = {}
        for layer in range(NUM_LAYERS):
            for name, (num_in, num_out) in SHAPES.items():
                prefix = f"model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_a"] = mx.random.normal((num_in, rank), key=next(keys)) * num_in**-0.5
                tensors[f"{prefix}.lora_b"] = mx.random.normal((rank, num_out), key=next(keys)) * 0.02
        write_adapter(path, tensors, config)
    return paths


def _tokenizer() -> Tokenizer:
    """Byte-level BPE in which each of the benchmark's words is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    maker = PromptMaker(0, syllables)
    made_up = [maker.prompt(3).replace(" ", "") for _ in range(4000)]
    roles = ["user", "assistant", "system"]
    tokenizer.train_from_iterator(
        [*(WORDS * 50), *([f" {w}" for w in WORDS] * 50), *(roles * 50), *made_up], trainer
    )
    return tokenizer


def _weights(tokenizer: Tokenizer, seed: int, config: dict[str, Any]) -> dict[str, mx.array]:
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    shapes = {name: tensor.shape for name, tensor in tree_flatten(model.parameters())}
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    weights = {}
    for key, (name, shape) in zip(keys, sorted(shapes.items()), strict=True):
        if len(shape) == 1:
            weights[name] = mx.ones(shape)
            continue
        weights[name] = mx.random.normal(shape, key=key) * shape[1] ** -0.5
    speakable = mx.array([_is_speakable(tokenizer, token) for token in range(config["vocab_size"])])
    # A zero row's logit is 0, which the largest of 4,000 random ones always passes.
    weights["lm_head.weight"] = weights["lm_head.weight"] * speakable[:, None]
    return weights


def _is_speakable(tokenizer: Tokenizer, token: int) -> bool:
    """Plain ASCII text: a stream can send it at once, and no server takes it for a stop."""
    text = tokenizer.decode([token], skip_special_tokens=True)
    return bool(text) and text.isascii() and text.isprintable()
