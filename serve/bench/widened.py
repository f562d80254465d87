"""A model many times the size of a small trained one that says nearly the same: what a draft model's target is where
none is at hand.

The small one stands in it as it is: its numbers are a block of the larger matrices, layers behind its last and all
other channels, heads and neurons are random, and what these write is noise of a chosen size. Without noise both say
the same (Chen, Goodfellow, Shlens 2016, "Net2Net": a wider network with a smaller one's function).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from serve.bench.standin import Size
from serve.errors import ModelError

WRITERS = ("o_proj", "down_proj")
"""Their outputs are what a token's vector is made of."""


def write_widened(base: Path, folder: Path, size: Size, noise: float, dtype: mx.Dtype, seed: int = 0) -> None:
    """The larger model's folder, with the tokenizer of `base`: a qwen3 with a tied head, whose heads share one group
    of keys. ModelError where it is not, or not smaller in every way.

    size   its vocabulary is the base's
    noise  of what the base's channels are given beside the base's own, as a share of what random layers write
    """
    config = json.loads((base / "config.json").read_text())
    _check(config, size)
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    wider = {
        **config,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.num_layers,
        "intermediate_size": size.intermediate,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "torch_dtype": str(dtype).split(".")[-1],
    }
    (folder / "config.json").write_text(json.dumps(wider))
    own: dict[str, mx.array] = {}
    for file in sorted(base.glob("*.safetensors")):
        held = mx.load(str(file))
        assert isinstance(held, dict)
        own |= held
    weights = _weights(own, config["hidden_size"], size, noise, seed)
    weights = {name: weight.astype(dtype) for name, weight in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def _check(config: Mapping[str, int], size: Size) -> None:
    group = size.num_heads // size.num_kv_heads
    fits = (
        config["model_type"] == "qwen3"
        and config["tie_word_embeddings"]
        and config["head_dim"] == size.head_dim
        and config["num_key_value_heads"] == 1
        and config["num_attention_heads"] == group
        and config["hidden_size"] <= size.hidden
        and config["intermediate_size"] <= size.intermediate
        and config["num_hidden_layers"] <= size.num_layers
    )
    if not fits:
        raise ModelError(
            f"a {config['model_type']} of {config['hidden_size']} channels cannot stand in one of {size.hidden}: it "
            f"must be a qwen3 with a tied head and {group} heads on one group of keys, smaller in every way"
        )


def _weights(
    own: Mapping[str, mx.array], hidden: int, size: Size, noise: float, seed: int
) -> dict[str, mx.array]:
    weights = {
        "model.embed_tokens.weight": _beside(
            own["model.embed_tokens.weight"], (size.vocabulary, size.hidden), 0.0, seed
        ),
        "model.norm.weight": _norm(own["model.norm.weight"], hidden, size),
    }
    for layer in range(size.num_layers):
        prefix = f"model.layers.{layer}"
        for number, (name, (inputs, outputs)) in enumerate(size.shapes.items()):
            path = f"{prefix}.{name}.weight"
            scale = inputs**-0.5 * (noise if name.endswith(WRITERS) else 1.0)
            key = seed + 1 + layer * len(size.shapes) + number
            weights[path] = _beside(own.get(path), (outputs, inputs), scale, key)
        for name in ("input_layernorm", "post_attention_layernorm"):
            path = f"{prefix}.{name}.weight"
            weights[path] = _norm(own.get(path), hidden, size)
        for name in ("q_norm", "k_norm"):
            path = f"{prefix}.self_attn.{name}.weight"
            weights[path] = own.get(path, mx.ones(size.head_dim))
    return weights


def _beside(own: mx.array | None, shape: tuple[int, int], scale: float, seed: int) -> mx.array:
    """[outputs, inputs] random numbers, the base's own in their corner; its outputs do not hear of other inputs but
    as noise does."""
    weight = mx.random.normal(shape, key=mx.random.key(seed)) * scale
    if own is not None:
        rows, columns = own.shape
        weight[:rows, :columns] = own.astype(mx.float32)
    return weight


def _norm(own: mx.array | None, hidden: int, size: Size) -> mx.array:
    """The mean square is over more channels than the base's, and those others are nearly nothing."""
    weight = mx.ones(size.hidden)
    if own is not None:
        weight[:hidden] = own.astype(mx.float32) * (hidden / size.hidden) ** 0.5
    return weight
