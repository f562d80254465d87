"""Multi-token prediction (DeepSeek-AI 2024, arXiv 2412.19437, section 2.2): the checkpoint's layer behind its last.

    pair (h_p, t_{p+1}) ─▶ [enorm(embedding of t_{p+1}), hnorm(h_p)] ─ eh_proj ─▶ family's layer ─ norm ─▶ state

The state gives a guess of t_{p+2} by the head, and is h for the pair that follows. mlx-lm leaves these weights out,
so they are read from the checkpoint's files, and made what the family's own code calls them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

from serve import device
from serve.cache.attention import install
from serve.cache.layers import LayerRows
from serve.cache.rows import BatchRows
from serve.cache.spans import Span
from serve.draft import mtp_qwen
from serve.draft.eagle import ALWAYS_PLAIN
from serve.engine.sampler import Sampler
from serve.errors import ModelError
from serve.model.loading import LOAD_ERRORS, LoadedModel, cast, fingerprint
from serve.model.network import Network
from serve.model.weights import dense_weight, dequantize

FAMILIES = ("deepseek_v3", "glm4_moe", "glm4_moe_lite")
"""Whose layer behind the last is as above."""
OUTSIDE = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
"""What stands beside the family's own layer."""
EMBEDDINGS, HEAD = "embed_tokens", "shared_head.head"
"""What it may have for itself, and most often has from the base."""


class NextToken(nn.Module):
    """The arithmetic, over one layer of the family."""

    def __init__(self, layer: nn.Module, width: int, eps: float) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(width, eps=eps)
        self.hnorm = nn.RMSNorm(width, eps=eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.layer = layer
        self.norm = nn.RMSNorm(width, eps=eps)

    def __call__(self, embedded: mx.array, states: mx.array, mask: Any, cache: Any) -> mx.array:
        """embedded, states [B, T, D] → [B, T, D]."""
        joined = self.eh_proj(mx.concatenate([self.enorm(embedded), self.hnorm(states)], axis=-1))
        return self.norm(self.layer(joined, mask, cache))


class Mtp:
    """A checkpoint's own head, over rows."""

    taps: Sequence[int] = ()

    def __init__(self, module: NextToken, name: str, fingerprint: str, embeddings: Any, head: Any) -> None:
        """`embeddings`, `head`: its own; None: the base's."""
        self._module = module
        self._name = name
        self.fingerprint = f"mtp:{fingerprint}"
        self._embeddings, self._head = embeddings, head
        self._rows: LayerRows | None = None

    def bind(self, network: Network, rows: BatchRows) -> Sequence[LayerRows]:
        """Its layer's rows: what the base's own layers keep, the head's keeps too."""
        own = rows.own[-1]
        self._network = network
        if self._embeddings is None:
            self._embeddings = network.embeddings
        install(self._module)
        self._prove(network)
        self._rows = LayerRows(replace(own.shape, depth=ALWAYS_PLAIN), own.dtype)
        self._rows.is_dense, self._rows.num_head_axes = own.is_dense, own.num_head_axes
        return [self._rows]

    def read(self, hidden: mx.array, taken: Mapping[int, mx.array]) -> mx.array:
        """The final states as they are."""
        return hidden

    def run(self, tokens: mx.array, states: mx.array, span: Span) -> mx.array:
        """[B, T, D]; a pair is turned by its state's position, which the rows say."""
        rows = self._rows
        assert rows is not None, "bound"
        return self._module(self._embeddings(tokens), states, rows.make_mask(tokens.shape[1]), rows)

    def guess(self, states: mx.array, sampler: Sampler, counters: Sequence[int]) -> mx.array:
        """[B]"""
        logits = self._network.logits(states[:, None])[:, 0] if self._head is None else self._head(states)
        return sampler.tokens(logits, counters)

    def _prove(self, network: Network) -> None:
        """Raise ModelError unless the family's layer runs by itself."""
        width = network.width
        states = mx.zeros((1, 2, width), network.parameters_dtype())
        cache = KVCache()
        mask = mx.tril(mx.ones((2, 2), dtype=mx.bool_))
        try:
            mx.eval(self._module(self._embeddings(mx.array([[0, 1]])), states, mask, cache))
        except (AttributeError, TypeError, ValueError, IndexError) as error:
            raise ModelError(
                f"{self._name}: the layer of its multi-token prediction cannot run: {error}"
            ) from error


def own_mtp(model: LoadedModel) -> Mtp:
    """The head in a model's own checkpoint. ModelError where there is none, or it cannot be used."""
    network, name = model.network, model.name
    kind = str(model.config.get("model_type"))
    if kind in mtp_qwen.FAMILIES:
        return _of_qwen(model, name, model.path, mtp_qwen.qwen_weights(model.path, name), model.config)
    if kind not in FAMILIES:
        known = ", ".join((*FAMILIES, *mtp_qwen.FAMILIES))
        raise ModelError(
            f"{name}: heads in the checkpoint itself are known of {known}, and this is {kind}; a head in a folder of "
            f"its own is named by `model`"
        )
    number = len(network.layers)
    weights = _layer_weights(model.path, f"model.layers.{number}.")
    if not weights:
        raise ModelError(
            f"{name}: its checkpoint has no layer {number}, which would guess tokens ahead; conversions often leave "
            f"it out"
        )
    missing = [part for part in OUTSIDE if f"{part}.weight" not in weights]
    if missing:
        raise ModelError(
            f"{name}: layer {number} of its checkpoint guesses no tokens: it has no {', '.join(missing)}"
        )
    module = _behind_the_last(model, number, weights)
    dtype = network.parameters_dtype()
    embeddings = _apart(weights, EMBEDDINGS, network.embeddings, model.config, dtype)
    head = _apart(weights, HEAD, network.text.get("lm_head"), model.config, dtype)
    return Mtp(
        module,
        name,
        fingerprint(model.path),
        None if embeddings is None else partial(_looked_up, embeddings),
        None if head is None else partial(_scored, head),
    )


def split_mtp(path: Path, name: str, config: Mapping[str, Any], model: LoadedModel) -> Mtp:
    """The head of a Qwen that keeps a state, in a folder of its own. ModelError where it is not this base's."""
    kind = str(model.config.get("model_type"))
    if kind not in mtp_qwen.FAMILIES:
        raise ModelError(
            f"{name}: was made for another base: it is a head of {', '.join(mtp_qwen.FAMILIES)}, and the base is "
            f"{kind}"
        )
    return _of_qwen(model, name, path, mtp_qwen.qwen_weights(path, name, prefix=""), config)


def _of_qwen(
    model: LoadedModel, name: str, path: Path, weights: Mapping[str, mx.array], config: Mapping[str, Any]
) -> Mtp:
    layer = mtp_qwen.qwen_layer(model.network, weights)
    module = _with_weights(model, layer, weights, f"{mtp_qwen.PREFIX}…", config.get("quantization"))
    return Mtp(module, name, fingerprint(path), None, None)


def _behind_the_last(model: LoadedModel, number: int, weights: Mapping[str, mx.array]) -> NextToken:
    """The arithmetic over the family's layer of that number, with its weights."""
    base, where = model.network.module, f"layer {number}"
    beside = {name: w for name, w in weights.items() if name.startswith((*OUTSIDE, EMBEDDINGS, HEAD))}
    inside = {name: w for name, w in weights.items() if name not in beside}
    try:
        layer = type(model.network.layers[-1])(base.args, number)
        named = {f"layer.{name}": w for name, w in _as_family(base, inside).items()}
    except LOAD_ERRORS as error:
        raise ModelError(f"{model.name}: {where} of its checkpoint cannot be loaded: {error}") from error
    named |= {n.removeprefix("shared_head."): w for n, w in beside.items() if n.startswith(OUTSIDE)}
    return _with_weights(model, layer, named, where, model.config.get("quantization"))


def _with_weights(
    model: LoadedModel,
    layer: nn.Module,
    named: Mapping[str, mx.array],
    where: str,
    packing: Mapping[str, Any] | None,
) -> NextToken:
    """The arithmetic over a layer, with these weights, in the dtype that the base is computed in."""
    network, base = model.network, model.network.module
    try:
        module = NextToken(layer, network.width, network.text.args.rms_norm_eps)
        if packing:
            nn.quantize(
                module,
                packing["group_size"],
                packing["bits"],
                mode=packing.get("mode", "affine"),
                class_predicate=lambda path, _: f"{path}.scales" in named,
            )
        module.load_weights(list(named.items()), strict=True)
    except LOAD_ERRORS as error:
        raise ModelError(f"{model.name}: {where} of its checkpoint cannot be loaded: {error}") from error
    if device.backend() == "cpu":
        dequantize(module)
    module.cast_predicate = getattr(base, "cast_predicate", lambda path: True)
    cast(module, network.parameters_dtype())
    module.eval()
    mx.eval(module.parameters())
    return module


def _layer_weights(path: Path, prefix: str) -> dict[str, mx.array]:
    """What the checkpoint's files call so, without the prefix. Nothing is read but what is used."""
    found: dict[str, mx.array] = {}
    for file in sorted(path.glob("*.safetensors")):
        arrays: Any = mx.load(str(file))
        found |= {name.removeprefix(prefix): w for name, w in arrays.items() if name.startswith(prefix)}
    return found


def _as_family(base: nn.Module, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """A layer's weights by the names that the family's own code has, which it makes of the checkpoint's."""
    first = "model.layers.0."
    alone = SimpleNamespace(args=replace(base.args, num_hidden_layers=1))
    made = type(base).sanitize(alone, {first + name: w for name, w in weights.items()})
    return {name.removeprefix(first): w for name, w in made.items()}


def _apart(
    weights: Mapping[str, mx.array], name: str, base: Any, config: Mapping[str, Any], dtype: mx.Dtype
) -> mx.array | None:
    """[V, D] that the layer has for itself; None where it has none, or what the base has."""
    own = weights.get(f"{name}.weight")
    if own is None:
        return None
    if f"{name}.scales" in weights:
        packing = config["quantization"]
        own = mx.dequantize(
            own,
            weights[f"{name}.scales"],
            weights.get(f"{name}.biases"),
            group_size=packing["group_size"],
            bits=packing["bits"],
            mode=packing.get("mode", "affine"),
        )
    own = own.astype(dtype)
    base = base["linear"] if getattr(base, "wraps_linear", False) else base
    is_same = base is not None and mx.array_equal(own, dense_weight(base).astype(dtype)).item()
    mx.eval(own)
    return None if is_same else own


def _looked_up(weight: mx.array, tokens: mx.array) -> mx.array:
    return weight[tokens]


def _scored(weight: mx.array, states: mx.array) -> mx.array:
    return states @ weight.T
