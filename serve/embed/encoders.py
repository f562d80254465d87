"""A model folder in, what maps tokens to states out: mlx-vlm's encoders, or any language model of mlx-lm.

An encoder's rows are padded on the right. A language model reads from left to right, so that what stands behind a row
changes nothing of it; the others are given which tokens count.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from serve import device
from serve.errors import ModelError
from serve.model.loading import DTYPES, LOAD_ERRORS, cast
from serve.model.network import Network
from serve.model.weights import dequantize

ENCODERS = {
    "bert": "bert",
    "roberta": "xlm_roberta",
    "xlm-roberta": "xlm_roberta",
    "camembert": "xlm_roberta",
    "modernbert": "modernbert",
    "lfm2_bidirec": "lfm2_embedding",
}
"""model_type -> mlx-vlm's module of it."""
SCORE = "score.weight"
"""What a language model that classifies calls its head."""


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on the right."""

    tokens: mx.array
    """[B, T] int32"""
    lengths: mx.array
    """[B] int32"""
    types: mx.array
    """[B, T] int32: 1 where a token is of the second text of a pair"""

    @property
    def mask(self) -> mx.array:
        """[B, T] bool: where a row has a token."""
        return mx.arange(self.tokens.shape[1])[None] < self.lengths[:, None]


class Encoder(Protocol):
    """A network."""

    is_causal: bool
    """Reads from left to right."""
    pad_id: int
    max_tokens: int
    vocab_size: int

    def states(self, batch: Batch) -> mx.array:
        """[B, T, D]; whatever where a row has no token."""

    def labels(self, batch: Batch) -> mx.array:
        """[B, 1]: a classifier's logit."""

    def logits(self, batch: Batch, token_ids: list[int]) -> mx.array:
        """[B, len(token_ids)]: of what would follow a row."""


def load_encoder(
    path: Path, config: dict[str, Any], name: str, *, is_classifier: bool, dtype: str | None
) -> Encoder:
    """With its weights evaluated. `config`: the folder's config.json. ModelError names what cannot be used."""
    kind = str(config.get("model_type", ""))
    try:
        if kind in ENCODERS:
            return _MaskedEncoder(_load_masked(path, config, is_classifier, dtype), config)
        module, score = _load_language(path, config)
        if is_classifier and score is None:
            raise ModelError(f"{path}: has no {SCORE}, by which a language model classifies")
        _ready(module, dtype)
        if score is not None:
            score = score.astype(mx.float32)
            mx.eval(score)
        network = Network(module)
        network.check()
        if config.get("use_bidirectional_attention") or _text(config).get("use_bidirectional_attention"):
            return _BidirectionalGemma(network, config, score)
        return _LanguageEncoder(network, config, score)
    except ModelError as error:
        raise ModelError(f"embedding model {name!r}: {error}") from error
    except LOAD_ERRORS as error:
        raise ModelError(
            f"embedding model {name!r}: {path} cannot be loaded as {kind or 'a model without model_type'}: {error}"
        ) from error


def _ready(module: nn.Module, dtype: str | None) -> None:
    """In the form that is computed in, and evaluated, so that another thread may have it."""
    if device.backend() == "cpu":
        dequantize(module)
    target = DTYPES[dtype] if dtype else (mx.float32 if device.backend() == "cpu" else None)
    if target is not None:
        cast(module, target)
    module.eval()
    mx.eval(module.parameters())


# Encoders that are told which tokens count.


class _MaskedEncoder:
    """One of mlx-vlm's."""

    is_causal = False

    def __init__(self, module: nn.Module, config: Mapping[str, Any]) -> None:
        self._module = module
        self.vocab_size = int(config["vocab_size"])
        self._num_types = int(getattr(module.config, "type_vocab_size", 1))
        pad = config.get("pad_token_id")
        self.pad_id = int(pad) if pad is not None else 0
        positions = int(config.get("max_position_embeddings") or 0)
        # Positions of RoBERTa begin behind that of the padding.
        begins = self.pad_id + 1 if ENCODERS[config["model_type"]] == "xlm_roberta" else 0
        self.max_tokens = positions - begins

    def states(self, batch: Batch) -> mx.array:
        return self._run(batch).last_hidden_state

    def labels(self, batch: Batch) -> mx.array:
        return self._run(batch).logits

    def logits(self, batch: Batch, token_ids: list[int]) -> mx.array:
        raise ModelError("an encoder says no token")

    def _run(self, batch: Batch) -> Any:
        mask = batch.mask.astype(mx.int32)
        # RoBERTa knows one type, and a lookup beyond it would be whatever stands there.
        types = mx.minimum(batch.types, self._num_types - 1)
        return self._module(batch.tokens, attention_mask=mask, token_type_ids=types)


def _load_masked(path: Path, config: dict[str, Any], is_classifier: bool, dtype: str | None) -> nn.Module:
    """mlx-vlm's own loader would take the layers behind the pooling for the network's."""
    _check_masked(path, config)
    family = importlib.import_module(f"mlx_vlm.models.{ENCODERS[config['model_type']]}")
    told = family.ModelConfig.from_dict({**_as_mlx_vlm_reads(path, config), "num_labels": 1})
    module: nn.Module = (family.SequenceClassificationModel if is_classifier else family.Model)(told)
    weights: dict[str, mx.array] = {}
    for file in sorted(path.glob("*.safetensors")):
        weights.update(_tensors(file))
    if not weights:
        raise ModelError(f"{path}: has no .safetensors; pickled weights are not read")
    weights = module.sanitize(weights)
    packed = config.get("quantization")
    if packed is not None:
        nn.quantize(
            module,
            group_size=packed["group_size"],
            bits=packed["bits"],
            mode=packed.get("mode", "affine"),
            class_predicate=lambda name, part: packed.get(name) or f"{name}.scales" in weights,
        )
    module.load_weights([*weights.items()])
    for part in module.modules():
        if isinstance(getattr(part, "act", None), nn.GELU):
            part.act = (
                nn.GELU()
            )  # mlx-vlm's ModernBERT takes the approximation by tanh, transformers' does not
    _ready(module, dtype)
    return module


def _tensors(file: Path) -> dict[str, mx.array]:
    found = mx.load(str(file))
    assert isinstance(found, dict)
    return found


def _check_masked(path: Path, config: Mapping[str, Any]) -> None:
    """ModelError for what mlx-vlm's encoders read over."""
    for key, known in (
        ("hidden_act", ("gelu",)),
        ("hidden_activation", ("gelu",)),
        ("classifier_activation", ("gelu",)),
        ("position_embedding_type", ("absolute",)),
        ("is_decoder", (False,)),
    ):
        found = config.get(key)
        if found is not None and found not in known:
            raise ModelError(f"{path}: config.json: {key}: found {found!r}; computed is {known[0]!r} only")


def _as_mlx_vlm_reads(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """transformers writes ModernBERT's positions by kind of layer; mlx-vlm reads its older keys."""
    if config.get("model_type") != "modernbert":
        return config
    found = dict(config)
    positions = config.get("rope_parameters") or {}
    for kind, key in (("full_attention", "global_rope_theta"), ("sliding_attention", "local_rope_theta")):
        told = positions.get(kind) or {}
        if told.get("rope_type", "default") != "default":
            raise ModelError(
                f"{path}: config.json: rope_type: found {told['rope_type']!r}; computed is 'default'"
            )
        if "rope_theta" in told:
            found[key] = told["rope_theta"]
    kinds = config.get("layer_types")
    if kinds:
        globals_ = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
        every = globals_[1] if len(globals_) > 1 else len(kinds)
        if globals_ != list(range(0, len(kinds), every)):
            raise ModelError(
                f"{path}: config.json: layer_types: full attention in layers {globals_} is not regular"
            )
        found["global_attn_every_n_layers"] = every
    return found


# Language models.


class _LanguageEncoder:
    """A language model of mlx-lm: states before its head, which reads from left to right."""

    is_causal = True

    def __init__(self, network: Network, config: Mapping[str, Any], score: mx.array | None) -> None:
        self._network = network
        self._score = score
        self.vocab_size = network.vocab_size
        self.pad_id = 0  # whatever it is: nothing looks back at it
        self.max_tokens = int(_text(config).get("max_position_embeddings") or 0)

    def states(self, batch: Batch) -> mx.array:
        return self._network.hidden(batch.tokens)

    def labels(self, batch: Batch) -> mx.array:
        assert self._score is not None
        return self._last(batch).astype(mx.float32) @ self._score.T

    def logits(self, batch: Batch, token_ids: list[int]) -> mx.array:
        return self._network.logits(self._last(batch)[:, None])[:, 0, mx.array(token_ids)]

    def _last(self, batch: Batch) -> mx.array:
        last = (batch.lengths - 1)[:, None, None]
        return mx.take_along_axis(self.states(batch), last, axis=1)[:, 0]


class _BidirectionalGemma(_LanguageEncoder):
    """EmbeddingGemma: Gemma 3's layers over all of a text, or over a window to both sides."""

    is_causal = False

    def __init__(self, network: Network, config: Mapping[str, Any], score: mx.array | None) -> None:
        super().__init__(network, config, score)
        text = _text(config)
        if text.get("model_type") != "gemma3_text":
            raise ModelError(
                f"use_bidirectional_attention: found in {text.get('model_type')!r}; computed for gemma3_text"
            )
        # As transformers reads it: so many tokens together, each side's end left out.
        self._reach = int(text["sliding_window"]) // 2 + 1

    def states(self, batch: Batch) -> mx.array:
        backbone = self._network.backbone
        hidden = backbone.embed_tokens(batch.tokens)
        # In the precision of the weights, as transformers has it; mlx-lm rounds it to bfloat16 always.
        hidden = hidden * mx.array(backbone.args.hidden_size**0.5).astype(hidden.dtype)
        positions = mx.arange(batch.tokens.shape[1])
        # A row's padding sees itself alone: a softmax over nothing is not a number.
        own = positions[:, None] == positions[None]
        everywhere = batch.mask[:, None, None] | own  # [B, 1, T, T]
        nearby = everywhere & (mx.abs(positions[:, None] - positions[None]) < self._reach)
        for layer in backbone.layers:
            hidden = layer(hidden, nearby if layer.self_attn.is_sliding else everywhere, None)
        return backbone.norm(hidden)


def _load_language(path: Path, config: dict[str, Any]) -> tuple[nn.Module, mx.array | None]:
    """Its module, and the head by which it classifies."""
    found: dict[str, mx.array] = {}

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, args_class = mlx_lm_utils._get_classes(config)

        def build(args: Any) -> nn.Module:
            module = model_class(args)
            own = getattr(module, "sanitize", None)
            object.__setattr__(module, "sanitize", partial(_named_as_in_mlx_lm, module, own, found))
            return module

        return build, args_class

    told = dict(config)  # mlx-lm would read it again, as it stands in the folder
    if not _has_head(path):
        told["tie_word_embeddings"] = True
    kinds = config.get("layer_types") or ()
    if "full_attention" in kinds and "sliding_window_pattern" not in config:
        told["sliding_window_pattern"] = kinds.index("full_attention") + 1
    module, _ = mlx_lm_utils.load_model(path, lazy=True, model_config=told, get_model_classes=classes)
    return module, found.get(SCORE)


def _named_as_in_mlx_lm(
    module: nn.Module, own: Any, found: dict[str, mx.array], weights: dict[str, mx.array]
) -> dict[str, mx.array]:
    """A backbone's weights that were saved without the rest have no `model.` before their names."""
    if SCORE in weights:
        found[SCORE] = weights.pop(SCORE)
        if found[SCORE].shape[0] != 1:
            raise ModelError(
                f"{SCORE}: found {found[SCORE].shape[0]} labels; expected one, whose logit is the score"
            )
    names = {name for name, _ in tree_flatten(module.parameters())}
    if not any(name in names for name in weights):
        weights = {f"model.{name}": value for name, value in weights.items()}
    return own(weights) if own is not None else weights


def _has_head(path: Path) -> bool:
    """Whether a folder has the weights of a language model's head."""
    return any("lm_head.weight" in mx.load(str(file)) for file in path.glob("model*.safetensors"))


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("text_config") or config
