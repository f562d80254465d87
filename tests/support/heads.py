"""Tiny random drafters that read a target's states, and what mlx-vlm's own code guesses with them on one row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import KVCache as LmKVCache
from mlx_lm.utils import _get_classes
from mlx_vlm.models.cache import CacheList
from mlx_vlm.speculative.drafters.eagle3 import Model as Eagle3Model
from mlx_vlm.speculative.drafters.eagle3 import ModelConfig as Eagle3Config
from mlx_vlm.speculative.drafters.gemma4_assistant import Model as Gemma4Model
from mlx_vlm.speculative.drafters.gemma4_assistant import ModelConfig as Gemma4Config
from mlx_vlm.speculative.drafters.glm_moe_dsa_mtp.glm_moe_dsa_mtp import GlmMoeDsaMTPDraftModel
from mlx_vlm.speculative.drafters.qwen3_5_mtp.config import Qwen3_5MTPConfig
from mlx_vlm.speculative.drafters.qwen3_5_mtp.qwen3_5_mtp import Qwen3_5MTPDraftModel
from mlx_vlm.speculative.drafters.qwen3_dflash import Model as DFlashModel
from mlx_vlm.speculative.drafters.qwen3_dflash import ModelConfig as DFlashConfig
from mlx_vlm.utils import load_model
from tiny import QWEN3

from serve.model.network import Network

Pick = Callable[[mx.array], int]
"""Logits [V] of the head in, the id of its output out."""
DEEP = {**QWEN3, "num_hidden_layers": 4}
GLM4 = {
    "model_type": "glm4_moe",
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "n_group": 1,
    "head_dim": 16,
    "topk_group": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "routed_scaling_factor": 1.0,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "partial_rotary_factor": 0.5,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24,
    "v_head_dim": 32,
}
GLM4_LITE = {**GLM4, **LATENT, "model_type": "glm4_moe_lite"}


DEEPSEEK_V3 = {
    **GLM4_LITE,
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "first_k_dense_replace": 61,
}
"""mlx-lm leaves out layer 61, by its name: the head of a model of so many layers and no other."""
HYBRID = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "norm_topk_prob": True,
}
ROPE = {"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 0, 0]}
QWEN3_NEXT = {**HYBRID, "model_type": "qwen3_next", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
QWEN3_5 = {
    "model_type": "qwen3_5",
    "text_config": {**HYBRID, "model_type": "qwen3_5_text", "num_experts": 0, "rope_parameters": ROPE},
}
QWEN3_5_MOE = {
    "model_type": "qwen3_5_moe",
    "text_config": {**HYBRID, "model_type": "qwen3_5_moe_text", "rope_parameters": ROPE},
}


class Tokens(NamedTuple):
    """A row as an oracle is given it: all tokens, of which the last has not run."""

    ids: Sequence[int]
    count: int
    """Guesses that are wanted."""


def lively(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Random weights by which a head's guesses depend on all of the row's past."""
    scales = {"o_proj": 4.0, "down_proj": 4.0, "q_proj": 4.0, "k_proj": 4.0, "embed_q": 4.0}
    return {
        path: weight * next((scale for part, scale in scales.items() if part in path), 1.0)
        for path, weight in weights.items()
    }


def layer_outputs(network: Network, ids: Sequence[int]) -> list[mx.array]:
    """[1, T, D] of each layer, and after the final norm, by the family's layers one by one."""
    backbone = network.backbone
    hidden = backbone.embed_tokens(mx.array([list(ids)]))
    mask = mx.tril(mx.ones((len(ids), len(ids)), dtype=mx.bool_))
    found = []
    for layer in backbone.layers:
        hidden = layer(hidden, mask, None)
        found.append(hidden)
    return [*found, backbone.norm(hidden)]


def write_eagle3(
    folder: Path,
    *,
    vocab: int = 259,
    draft_vocab: int | None = None,
    layers: int = 1,
    inputs: Sequence[int],
    width: int = 64,
    seed: int = 1,
) -> Path:
    """A random EAGLE-3 head of a target of `width` numbers a state, as a folder."""
    draft_vocab = draft_vocab or vocab
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
    }
    config = {
        "model_type": "eagle3",
        "transformer_layer_config": text,
        "draft_vocab_size": draft_vocab,
        "target_hidden_size": width,
        "eagle_aux_hidden_state_layer_ids": list(inputs),
    }
    mx.random.seed(seed)
    module = Eagle3Model(Eagle3Config.from_dict(config))
    weights = lively(dict(tree_flatten(module.parameters())))
    if draft_vocab != vocab:
        kept = sorted(mx.random.permutation(vocab)[:draft_vocab].tolist())
        weights["d2t"] = mx.array(kept) - mx.arange(draft_vocab)
    _write(folder, config, weights)
    return folder


def eagle3_guesses(folder: Path, network: Network, row: Tokens, pick: Pick) -> list[int]:
    """What mlx-vlm's EAGLE-3 says on one row, `pick` choosing among its logits."""
    drafter = load_model(folder)
    drafter.reset(network.module)
    outputs = layer_outputs(network, row.ids[:-1])
    inputs = json.loads((folder / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"]
    states = mx.concatenate([outputs[number - 1] for number in inputs], axis=-1)
    return _guesses(drafter, states, row, pick)


def write_dflash(
    folder: Path,
    *,
    taps: Sequence[int],
    num_target_layers: int,
    seed: int = 5,
    kind: str = "qwen3",
    **options: Any,
) -> Path:
    """A random DFlash drafter of a target of 64 numbers a state and 259 tokens, as a folder."""
    config = {
        "model_type": kind,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 259,
        "rope_theta": 10000.0,
        "block_size": 6,
        "num_target_layers": num_target_layers,
        "dflash_config": {"target_layer_ids": list(taps)}
        | ({} if kind == "gemma4" else {"mask_token_id": 258}),
        **options,
    }
    mx.random.seed(seed)
    module = DFlashModel(DFlashConfig.from_dict(config))
    weights = dict(tree_flatten(module.parameters()))
    weights = {p: 1 + mx.random.normal(w.shape) if "q_norm" in p else w for p, w in lively(weights).items()}
    _write(folder, config, weights)
    return folder


def dflash_guesses(folder: Path, network: Network, row: Tokens, pick: Pick) -> list[int]:
    """What mlx-vlm's DFlash says on one row."""
    drafter = load_model(folder)
    cache = drafter.reset(network.module)
    taps = drafter.config.target_layer_ids
    with network.tapped(taps) as outputs:  # of gemma's layers, none runs by itself
        network.hidden(mx.array([list(row.ids[:-1])]), network.make_cache())
    states = mx.concatenate([outputs[number] for number in taps], axis=-1)

    cap = getattr(network.text.args, "final_logit_softcapping", None)  # which theirs leaves out

    def sampler(logits: mx.array) -> mx.array:
        logits = logits if cap is None else mx.tanh(logits / cap) * cap
        return mx.array([[pick(each) for each in logits[0]]])

    return drafter.draft_block(row.ids[-1], states, cache, row.count + 1, sampler)[0].tolist()


GEMMA4 = {
    "model_type": "gemma4_text",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "vocab_size": 259,
    "vocab_size_per_layer_input": 259,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
    "max_position_embeddings": 1024,
}


GEMMA4_LOUDER = {"embed_tokens": 1.0, "post_attention_layernorm": 4.0, "post_feedforward_layernorm": 4.0}
"""What makes that family lively: its logits are bounded, and tied to its embeddings."""


def write_gemma4(folder: Path, *, seed: int = 7, **options: Any) -> Path:
    """A random assistant of GEMMA4, as a folder."""
    shared = ("num_attention_heads", "num_key_value_heads", "head_dim", "global_head_dim", "vocab_size")
    text = {name: GEMMA4[name] for name in (*shared, "sliding_window")}
    text |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_kv_shared_layers": 2}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0}
    config = {"model_type": "gemma4_assistant", "backbone_hidden_size": 64, "text_config": text, **options}
    mx.random.seed(seed)
    module = Gemma4Model(Gemma4Config.from_dict(config))
    weights = dict(tree_flatten(module.parameters()))
    louder = {"q_norm": 4.0, "o_proj": 4.0, "post_attention_layernorm": 3.0, "embed_tokens": 8.0}
    weights = {
        path: weight * next((scale for part, scale in louder.items() if part in path), 1.0)
        for path, weight in weights.items()
    }
    if options.get("use_ordered_embeddings"):
        weights["masked_embedding.token_ordering"] = mx.random.permutation(259)
    _write(folder, config, weights)
    return folder


def gemma4_guesses(folder: Path, network: Network, row: Tokens, pick: Pick) -> list[int]:
    """What mlx-vlm's assistant says on one row, over keys and values of the family's own cache."""
    drafter = load_model(folder)
    drafter.reset(network.module)
    cache = [LmKVCache() for _ in network.make_cache()]
    hidden = network.hidden(mx.array([list(row.ids[:-1])]), cache)
    kinds = [layer.layer_type for layer in network.layers]
    shared = {kind: (each.keys, each.values) for kind, each in zip(kinds, map(_trimmed, cache), strict=False)}
    count = len(row.ids) - 1
    drafter.set_shared_kv(shared, count, position=count - 1, kv_valid_len=count)

    def sampler(logits: mx.array) -> mx.array:
        return mx.array([[pick(logits.reshape(-1))]])

    return drafter.draft_block(row.ids[-1], hidden[:, -1:], None, row.count + 1, sampler)[0].tolist()


def _trimmed(cache: LmKVCache) -> LmKVCache:
    cache.keys, cache.values = (part[..., : cache.offset, :] for part in (cache.keys, cache.values))
    return cache


def write_mtp(
    folder: Path, config: Mapping[str, Any], seed: int = 3, *, repeats_words: bool = False
) -> nn.Module:
    """Add a random layer behind the last one to a model's folder, as Hugging Face's checkpoints name it. Returns
    mlx-vlm's module over the same weights.

    repeats_words  it hands the token's embedding on: of a base that does little else, it guesses most tokens
    """
    model_class, args_class = _get_classes(dict(config))
    args, width = args_class.from_dict(dict(config)), config["hidden_size"]
    mx.random.seed(seed)
    number = config["num_hidden_layers"]
    layer = type(model_class(args).layers[-1])(args, number)
    layer.load_weights(list(lively(dict(tree_flatten(layer.parameters()))).items()))
    layer.mlp.gate.weight = mx.random.normal(layer.mlp.gate.weight.shape) / width**0.5
    theirs = _TheirMtp(layer, width, config["rms_norm_eps"])
    if repeats_words:
        theirs.eh_proj.weight = mx.concatenate([mx.eye(width), mx.zeros((width, width))], axis=1)
        for name in ("enorm", "shared_head_norm"):
            theirs[name].weight = mx.ones((width,))
        layer.update(tree_map(lambda weight: weight * 0.1, layer.parameters()))
    beside = {name: theirs[name].weight for name in ("enorm", "hnorm", "eh_proj")}
    weights = {f"{name}.weight": weight for name, weight in beside.items()}
    weights["shared_head.norm.weight"] = theirs.shared_head_norm.weight
    weights |= _as_published(dict(tree_flatten(layer.parameters())), args)
    mx.save_safetensors(
        str(folder / "model-mtp.safetensors"),
        {f"model.layers.{number}.{name}": weight for name, weight in weights.items()},
        metadata={"format": "mlx"},
    )
    return theirs


def mtp_guesses(theirs: nn.Module, network: Network, row: Tokens, pick: Pick) -> list[int]:
    """What mlx-vlm's loop says on one row, over its own arithmetic."""
    drafter = GlmMoeDsaMTPDraftModel.__new__(GlmMoeDsaMTPDraftModel)
    nn.Module.__init__(drafter)
    drafter.mtp = theirs
    drafter.reset(network.module)
    return _guesses(drafter, layer_outputs(network, row.ids[:-1])[-1], row, pick)


LESS_ONE = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")
"""Ends of names of norms that Qwen's checkpoints keep less 1; of the block's own, all."""


def write_qwen_mtp(folder: Path, config: Mapping[str, Any], seed: int = 3, *, is_mlx: bool = False) -> Any:
    """Add a random `mtp` block to the folder of a Qwen that keeps a state. Returns mlx-vlm's drafter over the same
    weights. `is_mlx`: with the names and norms of mlx-vlm's own conversions, not Hugging Face's."""
    text = {"rope_parameters": ROPE, "num_experts": 0, **config.get("text_config", config)}
    drafter = Qwen3_5MTPDraftModel(Qwen3_5MTPConfig.from_dict({"text_config": text}))
    mx.random.seed(seed)
    weights = lively(dict(tree_flatten(drafter.parameters())))
    weights = {
        name: 1 + 0.3 * mx.random.normal(weight.shape)
        if weight.ndim == 1
        else mx.random.normal(weight.shape) / weight.shape[-1] ** 0.5
        if "fc" in name or name.endswith("mlp.gate.weight")
        else weight
        for name, weight in weights.items()
    }
    drafter.load_weights(list(weights.items()))
    published = (
        weights
        if is_mlx
        else {
            name: weight - 1 if weight.ndim == 1 else weight
            for name, weight in _expert_by_expert(weights).items()
        }
    )
    mx.save_safetensors(
        str(folder / "model-mtp.safetensors"),
        {f"mtp.{name}": weight for name, weight in published.items()},
        metadata={"format": "mlx" if is_mlx else "pt"},
    )
    if config["model_type"] == "qwen3_next":
        # Of weights in its own layout mlx-lm leaves no block out.
        own = {
            name: weight - 1 if name.endswith(LESS_ONE) else weight
            for name, weight in _expert_by_expert(mx.load(str(folder / "model.safetensors"))).items()
        }
        own = {name: w.swapaxes(1, 2) if "conv1d" in name else w for name, w in own.items()}
        mx.eval(own)
        mx.save_safetensors(str(folder / "model.safetensors"), own, metadata={"format": "pt"})
    return drafter


def qwen_mtp_guesses(drafter: Any, network: Network, row: Tokens, pick: Pick) -> list[int]:
    """What mlx-vlm's drafter says on one row."""
    drafter.reset(network.module)
    states = network.hidden(mx.array([list(row.ids[:-1])]), network.make_cache())
    return _guesses(drafter, states, row, pick)


def _expert_by_expert(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    return {
        name.replace("switch_mlp", f"experts.{number}" if ".switch_mlp." in name else ""): each
        for name, weight in weights.items()
        for number, each in (enumerate(weight) if ".switch_mlp." in name else ((0, weight),))
    }


class _TheirMtp(nn.Module):
    """mlx-vlm's multi-token prediction, whose attention and experts are another family's."""

    def __init__(self, layer: nn.Module, width: int, eps: float) -> None:
        super().__init__()
        for name in ("enorm", "hnorm", "shared_head_norm"):
            self[name] = nn.RMSNorm(width, eps=eps)
            self[name].weight = 1 + 0.3 * mx.random.normal((width,))
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.input_layernorm, self.mlp = layer.input_layernorm, layer.mlp
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.self_attn = _OneCache(layer.self_attn)

    def __call__(self, *args: Any) -> mx.array:
        from mlx_vlm.models.glm_moe_dsa.language import GlmMoeDsaMTP

        return GlmMoeDsaMTP.__call__(self, *args)


class _OneCache(nn.Module):
    """Attention that keeps one cache, where sparse attention keeps a second for its choice of keys."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, x: mx.array, mask: mx.array | None, cache: CacheList) -> tuple[mx.array, None]:
        if mask is not None and not isinstance(mask, mx.array):
            mask = mx.tril(mx.ones((x.shape[1], x.shape[1]), dtype=mx.bool_))
        return self.inner(x, mask, cache[0]), None


def _as_published(weights: dict[str, mx.array], args: Any) -> dict[str, mx.array]:
    """Experts one by one, and keys' and values' projections in one, as checkpoints have them."""
    published = {}
    for name, weight in weights.items():
        if "embed_q" not in name and "unembed_out" not in name:
            published |= _expert_by_expert({name: weight})
    if "self_attn.embed_q.weight" in weights:
        keys, values = weights["self_attn.embed_q.weight"], weights["self_attn.unembed_out.weight"]
        both = mx.concatenate([keys.swapaxes(-1, -2), values], axis=1)
        published["self_attn.kv_b_proj.weight"] = both.reshape(-1, both.shape[-1])
    return published


def _guesses(drafter: Any, states: mx.array, row: Tokens, pick: Pick) -> list[int]:
    def sampler(logits: mx.array) -> mx.array:
        return mx.array([[pick(logits.reshape(-1))]])

    ids = list(row.ids)
    drafter.prefill_from_target_hidden(mx.array([ids[:-1]]), states, ids[-1], sampler)
    return drafter.draft_block(ids[-1], states[:, -1:], None, row.count + 1, sampler)[0].tolist()


def _write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(weights), metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
