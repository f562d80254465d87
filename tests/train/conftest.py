"""Tiny random text models of real families, and batches for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import _get_classes

from serve.model.network import Network
from train.data.batches import Batch

VOCAB = 96
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
EXTRAS: dict[str, dict] = {
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "gemma2": {"query_pre_attn_scalar": 16.0},
    "phi3": {"tie_word_embeddings": False},
    "mamba2": {
        "num_heads": 4,
        "state_size": 8,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": [0.001, 100.0],
        "time_step_rank": "auto",
        "layer_norm_epsilon": 1e-5,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}
FAMILIES = ("qwen3", "llama", "gemma3_text", "gemma2", "phi3", "olmo2")


def tiny_config(family: str) -> dict:
    return {"model_type": family, **SHAPE, **EXTRAS.get(family, {})}


@pytest.fixture
def build_network() -> Callable[..., Network]:
    """config of an mlx-lm family, seed → a random float32 network; nothing of it is on disk."""

    def build(config: dict, seed: int = 0) -> Network:
        model_class, args_class = _get_classes(config)
        mx.random.seed(seed)
        module = model_class(args_class.from_dict(config))
        module.set_dtype(mx.float32)
        mx.eval(module.parameters())
        return Network(module)

    return build


@pytest.fixture
def tiny_network(build_network: Callable[..., Network]) -> Callable[..., Network]:
    """family, seed, **changes to its config → a random float32 network; weights large enough to be lively."""

    def build(family: str = "qwen3", seed: int = 0, **changes: object) -> Network:
        return build_network({**tiny_config(family), **changes}, seed)

    return build


@pytest.fixture(scope="session")
def make_rows(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """make_rows(train=9, valid=3, …) → folder of short prompts with their completions, a file a split."""

    def make(**counts: int) -> Path:
        folder = tmp_path_factory.mktemp("rows")
        for split, count in counts.items():
            rows = [
                {"prompt": f"{split} {'ab' * (i % 4)} {i}?", "completion": f"no {i % 3}"}
                for i in range(count)
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Rows of random tokens with the given lengths; the last third of each row is the target."""

    def make(lengths: Sequence[int], seed: int = 0, first_id: int = 0) -> Batch:
        rng = np.random.default_rng(seed)
        tokens = np.zeros((len(lengths), max(lengths)), np.int32)
        is_target = np.zeros(tokens.shape, bool)
        for row, length in enumerate(lengths):
            tokens[row, :length] = rng.integers(1, VOCAB, length)
            is_target[row, length - max(length // 3, 1) : length] = True
        ids = tuple(range(first_id, first_id + len(lengths)))
        return Batch(tokens, is_target, int(is_target.sum()), sum(lengths), ids)

    return make
