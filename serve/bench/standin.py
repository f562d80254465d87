"""Writes a random model of a real family, and random adapters for it, where no download is wanted.

The model is a qwen3 of one of SIZES. Its greedy answers are runs of different tokens that depend on all of the
prompt, and hold no stop token: every server generates as many tokens as it is asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from serve import device
from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.manifest import CONFIG_FILE, TENSORS_FILE, write_adapter
from serve.bench.prompts import WORDS, PromptMaker


@dataclass(frozen=True)
class Size:
    """How large the random model is, in qwen3's own words."""

    hidden: int
    num_layers: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    """Rows of embedding and head; those past the tokenizer's are never met in text."""

    def position_bytes(self, dtype: mx.Dtype) -> int:
        """Keys and values of one position, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.size

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(in, out) of each linear layer."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, queries),
            "self_attn.k_proj": (self.hidden, keys),
            "self_attn.v_proj": (self.hidden, keys),
            "self_attn.o_proj": (queries, self.hidden),
            "mlp.gate_proj": (self.hidden, self.intermediate),
            "mlp.up_proj": (self.hidden, self.intermediate),
            "mlp.down_proj": (self.intermediate, self.hidden),
        }


TOKENIZER_SIZE = 4096
SMALLEST = Size(512, 8, 1536, 8, 4, 64, TOKENIZER_SIZE)
TINY = Size(64, 2, 96, 4, 2, 16, 512)
"""So small that a step's time is the host's."""
SIZES: Mapping[str, Size] = {
    "tiny": TINY,
    "29M": SMALLEST,
    "0.6B": Size(1024, 28, 3072, 16, 8, 128, 151936),
    "1.7B": Size(2048, 28, 6144, 16, 8, 128, 151936),
}
"""By what the name says: one to try a benchmark with; parameters of the small one; the layers of Qwen3-0.6B and
Qwen3-1.7B. None ties its head."""

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADER_TOKENS = 3
"""What stands before a message's own words, and before an answer."""
MESSAGE_TOKENS = HEADER_TOKENS + 2
"""What stands around a message's words."""
MAX_CONTEXT = 32768
EOS_TOKEN_ID = 2


def default_dtype() -> mx.Dtype:
    """What servers compute in without being told: mlx's CPU backend is slow in half precision."""
    return mx.float32 if device.backend() == "cpu" else mx.bfloat16


def config_of(size: Size) -> dict[str, Any]:
    """config.json of a model of that size, without its dtype."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": size.hidden,
        "num_hidden_layers": size.num_layers,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": size.head_dim,
        "rms_norm_eps": 1e-6,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": MAX_CONTEXT,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
    }


def words_for(num_tokens: int) -> int:
    """Words of a message that is a prompt of so many tokens by itself."""
    return max(1, num_tokens - MESSAGE_TOKENS - HEADER_TOKENS)


def write_model(
    folder: Path,
    dtype: mx.Dtype,
    size: Size = SMALLEST,
    seed: int = 0,
    texts: Iterable[str] | None = None,
) -> None:
    """The model folder, as mlx-lm and mlx-vlm load it: config, weights, tokenizer with chat template.

    texts  what the tokenizer learns all of the vocabulary from; None: TOKENIZER_SIZE tokens at most, from WORDS
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = word_tokenizer(folder, size, texts=texts)
    config = config_of(size)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": str(dtype).split(".")[-1]}))
    weights = _weights(tokenizer, seed, config, dtype)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def word_tokenizer(
    folder: Path, size: Size, more_specials: Sequence[str] = (), texts: Iterable[str] | None = None
) -> Tokenizer:
    """The tokenizer of a model of that size, and its files in `folder`, with the tokens that end an answer."""
    count = size.vocabulary if texts is not None else min(size.vocabulary, TOKENIZER_SIZE)
    tokenizer = _tokenizer(count, (*SPECIALS, *more_specials), _made_up() if texts is None else texts)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_TOKEN_ID}))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "additional_special_tokens": [*SPECIALS, *more_specials],
                "model_max_length": MAX_CONTEXT,
                "clean_up_tokenization_spaces": False,
                "chat_template": CHAT_TEMPLATE,
            }
        )
    )
    return tokenizer


def write_adapters(
    folder: Path,
    count: int,
    size: Size = SMALLEST,
    *,
    ranks: Sequence[int] = (16,),
    seed: int = 1,
    strength: float = 1.0,
) -> dict[str, Path]:
    """`count` random adapters of all linear layers, each in its own folder: name -> folder.

    ranks     they take turns at these
    strength  by how much their updates are larger
    """
    paths = {f"adapter-{number}": folder / f"adapter-{number}" for number in range(count)}
    for number, path in enumerate(paths.values()):
        rank = ranks[number % len(ranks)]
        keys = iter(mx.random.split(mx.random.key(seed + number), 2 * size.num_layers * len(size.shapes)))
        tensors = {
            name: mx.random.normal(shape, key=next(keys)) * (scale * strength**0.5)
            for name, shape, scale in _adapter_tensors(size, rank)
        }
        write_adapter(path, tensors, _adapter_config(size, rank))
    return paths


def write_many_adapters(
    folder: Path, count: int, size: Size = SMALLEST, *, rank: int = 8, seed: int = 1
) -> dict[str, Path]:
    """As `write_adapters`, many a second: none is synced to the disk, and only the first one's header is made."""
    paths = write_adapters(folder, 1, size, ranks=(rank,), seed=seed)
    ((name, first),) = paths.items()
    written = (first / TENSORS_FILE).read_bytes()
    tensors_at = 8 + int.from_bytes(written[:8], "little")  # behind the header and its length
    # MLX writes tensors in an order of its own, all of one type: only their scales tell them apart.
    shapes = {name: (math.prod(shape), scale) for name, shape, scale in _adapter_tensors(size, rank)}
    header = json.loads(written[8:tensors_at])
    order = sorted(shapes, key=lambda each: header[each]["data_offsets"][0])
    scales = np.concatenate([np.full(*shapes[each], np.float32) for each in order])
    drawn = np.random.default_rng(seed)
    for number in range(1, count):
        name = f"adapter-{number}"
        paths[name] = folder / name
        paths[name].mkdir()
        (paths[name] / CONFIG_FILE).write_bytes((first / CONFIG_FILE).read_bytes())
        values = drawn.standard_normal(len(scales), np.float32) * scales
        (paths[name] / TENSORS_FILE).write_bytes(written[:tensors_at] + values.tobytes())
    return paths


def _adapter_config(size: Size, rank: int) -> AdapterConfig:
    return AdapterConfig("lora", size.num_layers, rank=rank, scale=2.0, keys=tuple(size.shapes))


def _adapter_tensors(size: Size, rank: int) -> Iterator[tuple[str, tuple[int, int], float]]:
    """Name, shape and scale of each of a random adapter's tensors."""
    for layer in range(size.num_layers):
        for name, (num_in, num_out) in size.shapes.items():
            prefix = f"model.layers.{layer}.{name}"
            yield f"{prefix}.lora_a", (num_in, rank), num_in**-0.5
            yield f"{prefix}.lora_b", (rank, num_out), 0.02


def _tokenizer(num_tokens: int, specials: Sequence[str], texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE, learned from these."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _made_up() -> list[str]:
    """From which each of the benchmark's words is one token, if there is room for them."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    maker = PromptMaker(0, syllables)
    made_up = [maker.prompt(3).replace(" ", "") for _ in range(4000)]
    roles = ["user", "assistant", "system"]
    return [*(WORDS * 50), *([f" {w}" for w in WORDS] * 50), *(roles * 50), *made_up]


def _weights(tokenizer: Tokenizer, seed: int, config: dict[str, Any], dtype: mx.Dtype) -> dict[str, mx.array]:
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    shapes = {name: tensor.shape for name, tensor in tree_flatten(model.parameters())}
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    weights = {}
    for key, (name, shape) in zip(keys, sorted(shapes.items()), strict=True):
        if len(shape) == 1:
            weights[name] = mx.ones(shape, dtype)
            continue
        weights[name] = (mx.random.normal(shape, key=key) * shape[1] ** -0.5).astype(dtype)
    head = weights["lm_head.weight"]
    weights["lm_head.weight"] = head * speakable(tokenizer, head.shape[0], dtype)[:, None]
    return weights


def speakable(tokenizer: Tokenizer, num_tokens: int, dtype: mx.Dtype) -> mx.array:
    """[num_tokens] 1 for tokens that answers may hold, 0 for others.

    A head's row times 0 has the logit 0, which the largest of 4,000 random ones always passes.
    """
    return mx.array([_is_speakable(tokenizer, token) for token in range(num_tokens)], dtype)


def _is_speakable(tokenizer: Tokenizer, token: int) -> bool:
    """Plain ASCII text: a stream can send it at once, and no server takes it for a stop."""
    text = tokenizer.decode([token], skip_special_tokens=True)
    return bool(text) and text.isascii() and text.isprintable()
