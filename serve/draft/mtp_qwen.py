"""The multi-token prediction of qwen3_next and qwen3_5: a block that stands in the checkpoint as `mtp`.

The arithmetic is `NextToken`'s with names of its own, and its layer one of full attention. Norms of a checkpoint in
Hugging Face's layout are kept less 1. The names are made by mlx-vlm's code for its own drafters; the layer is that of
the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from serve.errors import ModelError
from serve.model.network import Network

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
PREFIX = "mtp."
NAMES = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "norm": "norm"}
"""What `NextToken` calls them."""
LAYER = "layers.0."


def qwen_weights(path: Path, name: str, prefix: str = PREFIX) -> dict[str, mx.array]:
    """The block's weights in a checkpoint, by `NextToken`'s names. ModelError where there are none, or not all.

    prefix  "": of a folder of its own, as mlx-vlm splits checkpoints
    """
    from mlx_vlm.speculative.drafters.qwen3_5_mtp.qwen3_5_mtp import Qwen3_5MTPDraftModel

    found: dict[str, mx.array] = {}
    for file in sorted(path.glob("*.safetensors")):
        loaded: Any = mx.load(str(file), return_metadata=True)
        arrays, about = loaded
        is_mlx = about.get("format") == "mlx"
        found |= {
            key.removeprefix(PREFIX) if is_mlx else key: weight
            for key, weight in arrays.items()
            if key.startswith(prefix)
        }
    if not found:
        raise ModelError(
            f"{name}: its checkpoint has no {PREFIX}…, which would guess tokens ahead; conversions often leave it out"
        )
    weights: dict[str, mx.array] = Qwen3_5MTPDraftModel.sanitize(None, found)
    others = sorted({key.split(".")[1] for key in weights if re.match(r"layers\.[1-9]", key)})
    if others:
        raise ModelError(
            f"{name}: {PREFIX}layers has {len(others) + 1} layers in its checkpoint; one is known"
        )
    missing = [part for part in NAMES if f"{part}.weight" not in weights]
    if missing or not any(key.startswith(LAYER) for key in weights):
        raise ModelError(
            f"{name}: {PREFIX}… of its checkpoint guesses no tokens: it has no {', '.join(missing or ['layers.0'])}"
        )
    return {_renamed(key): weight for key, weight in weights.items()}


def qwen_layer(network: Network, weights: Mapping[str, mx.array]) -> nn.Module:
    """A layer of the base's own kind, of full attention, with experts where these weights have them."""
    args: Any = network.text.args
    has_experts = any(".switch_mlp." in key for key in weights)
    changes: dict[str, Any] = {"full_attention_interval": 1, "mlp_only_layers": [], "decoder_sparse_step": 1}
    changes |= {} if has_experts else {"num_experts": 0}
    known = {name: value for name, value in changes.items() if hasattr(args, name)}
    layer: nn.Module = type(network.layers[-1])(replace(args, **known), 0)
    return layer


def _renamed(key: str) -> str:
    if key.startswith(LAYER):
        return f"layer.{key.removeprefix(LAYER)}"
    first, _, rest = key.partition(".")
    return f"{NAMES.get(first, first)}.{rest}"
