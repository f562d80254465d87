"""A folder of sentence-transformers, or any model's, in; how a text becomes a vector, or a pair a score, out.

Reads modules.json and what it names. What it names and nobody here computes is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve.embed.config import EmbeddingModelConfig, PoolingMode
from serve.errors import ModelError

MODES: Mapping[str, PoolingMode] = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
"""sentence-transformers' names of poolings, in the order in which several are joined."""
LEGACY = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
"""Of torch's, by the last word of their names."""
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


@dataclass(frozen=True)
class DenseLayer:
    """A layer behind the pooling: its folder holds `linear.weight`."""

    path: Path
    activation: str


@dataclass(frozen=True)
class FolderSays:
    """What a folder says of how its model is used; None and nothing where it does not."""

    backbone: Path
    """The folder of weights and tokenizer."""
    pooling: tuple[PoolingMode, ...] = ()
    pools_prompt: bool = True
    """A prompt's tokens count in the vector."""
    dense: tuple[DenseLayer, ...] = ()
    is_normalized: bool | None = None
    max_tokens: int | None = None
    is_lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str = "cosine"
    yes_no: tuple[int, int | None] | None = None
    """Tokens whose logits are the score: the one that says yes, and the one whose logit is taken off."""
    activation: str | None = None
    """What a classifier's logit goes through; None: nothing is said."""
    cut: bool | tuple[int, ...] = False
    """Whether a vector's beginning is a vector (Matryoshka), or the lengths of which it is."""


def read_folder(path: Path, config: Mapping[str, Any]) -> FolderSays:
    """What the files beside the weights say. `config`: the weights' config.json. ModelError names what is not
    computed here."""
    told = _json(path / "config_sentence_transformers.json")
    common: dict[str, Any] = {
        "prompts": {name: text for name, text in (told.get("prompts") or {}).items() if text},
        "default_prompt": told.get("default_prompt_name"),
        "similarity": told.get("similarity_fn_name") or "cosine",
        "activation": _activation_of_classifier(config, told),
        "cut": _cut(config),
    }
    if common["similarity"] not in SIMILARITIES:
        raise ModelError(
            f"{path}: similarity_fn_name: found {common['similarity']!r}; expected {SIMILARITIES}"
        )
    modules_file = path / "modules.json"
    if not modules_file.exists():
        return FolderSays(path, **common, **_of_transformer(path))
    return FolderSays(**common, **_of_modules(path, json.loads(modules_file.read_text())))


def _of_modules(path: Path, modules: list[dict[str, Any]]) -> dict[str, Any]:
    said: dict[str, Any] = {"backbone": path, "is_normalized": False}
    dense: list[DenseLayer] = []
    for module in modules:
        kind, folder = str(module["type"]).rpartition(".")[2], path / (module.get("path") or "")
        if kind == "Transformer":
            said |= {"backbone": folder, **_of_transformer(folder)}
        elif kind == "Pooling":
            said |= _of_pooling(folder)
        elif kind == "Dense":
            dense.append(_of_dense(folder))
        elif kind == "Normalize":
            said["is_normalized"] = True
        elif kind == "LogitScore":
            found = _json(folder / "config.json")
            said["yes_no"] = (int(found["true_token_id"]), found.get("false_token_id"))
        elif kind != "Dropout":
            raise ModelError(
                f"{path}: modules.json names {module['type']}, which is not computed here; there are Transformer, "
                "Pooling, Dense, Normalize and LogitScore"
            )
    return {**said, "dense": tuple(dense)}


def _of_transformer(folder: Path) -> dict[str, Any]:
    found = _json(folder / "sentence_bert_config.json")
    return {
        "max_tokens": found.get("max_seq_length"),
        "is_lower_case": bool(found.get("do_lower_case")),
    }


def _of_pooling(folder: Path) -> dict[str, Any]:
    found = _json(folder / "config.json")
    named = found.get("pooling_mode")
    if named is None:
        named = [mode for key, mode in LEGACY.items() if found.get(key)] or ["mean"]
    named = [named] if isinstance(named, str) else list(named)
    unknown = [mode for mode in named if mode not in MODES]
    if unknown:
        raise ModelError(f"{folder / 'config.json'}: pooling_mode: found {unknown[0]!r}; expected {[*MODES]}")
    return {
        "pooling": tuple(MODES[mode] for mode in named),
        "pools_prompt": bool(found.get("include_prompt", True)),
    }


def _of_dense(folder: Path) -> DenseLayer:
    found = _json(folder / "config.json")
    reads, writes = found.get("module_input_name"), found.get("module_output_name")
    if found.get("use_residual") or {reads, writes} - {None, "sentence_embedding"}:
        raise ModelError(
            f"{folder}: a dense layer with a residual, or not of the sentence, is not computed here"
        )
    return DenseLayer(folder, _activation(found.get("activation_function") or "Tanh", folder))


def _activation(name: str, where: Path | str) -> str:
    short = name.rpartition(".")[2]
    if short not in ACTIVATIONS:
        raise ModelError(f"{where}: activation {name!r} is not computed here; expected one of {ACTIVATIONS}")
    return short


def _activation_of_classifier(config: Mapping[str, Any], told: Mapping[str, Any]) -> str | None:
    name = (
        (config.get("sentence_transformers") or {}).get("activation_fn")
        or config.get("sbert_ce_default_activation_function")
        or told.get("activation_fn")
    )
    return None if name is None else _activation(str(name), "config.json")


def _cut(config: Mapping[str, Any]) -> bool | tuple[int, ...]:
    """vLLM's keys."""
    lengths = config.get("matryoshka_dimensions")
    if lengths:
        return tuple(int(length) for length in lengths)
    return bool(config.get("is_matryoshka"))


def chosen(said: FolderSays, config: EmbeddingModelConfig) -> FolderSays:
    """The same with what a configuration says in its place. ModelError if it names a prompt that is not there."""
    changes: dict[str, Any] = {}
    if config.pooling is not None:
        changes["pooling"] = (config.pooling,)
    if config.normalize is not None:
        changes["is_normalized"] = config.normalize
    if config.max_tokens is not None:
        changes["max_tokens"] = config.max_tokens
    if config.dimensions is not None:
        changes["cut"] = config.dimensions
    if config.prompts is not None:
        changes |= {"prompts": config.prompts, "default_prompt": None}
    if config.default_prompt is not None:
        changes["default_prompt"] = config.default_prompt
    made = FolderSays(**{**said.__dict__, **changes})
    if made.default_prompt is not None and made.default_prompt not in made.prompts:
        # sentence-transformers writes empty prompts too, which say nothing.
        if config.default_prompt is not None:
            raise ModelError(
                f"embedding model {config.name!r}: default_prompt: found {config.default_prompt!r}; there are "
                f"{', '.join(made.prompts) or 'no prompts'}"
            )
        made = FolderSays(**{**made.__dict__, "default_prompt": None})
    return made


def _json(path: Path) -> dict[str, Any]:
    """A file's object; an empty one where there is no file. ModelError if it is not JSON."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: found {type(found).__name__}; expected an object")
    return found
