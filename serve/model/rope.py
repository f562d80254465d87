"""How positions turn, in the words that models' classes read.

transformers writes all of it under `rope_parameters` since its version 5, also what stood under other keys before.
Most classes of mlx-lm and mlx-vlm know the older keys alone, and take their own defaults where those are missing,
without a word: a model fine-tuned for long contexts then answers nonsense. Of two families it also moved all that the
classes read of the language part.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PLAIN = "default"
"""The type of positions that are not scaled."""
_FLAT = ("qwen2_vl", "qwen2_5_vl")
"""Families whose classes read the language part's settings beside those of all, as they were written before
transformers 5 gave them a part of their own."""
_RENAMED = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
"""GPT-NeoX's words."""


def in_older_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json, and the parts in it, with what `rope_parameters` says under the keys of before as well. What
    stands there already stays."""
    text = config.get("text_config")
    if config.get("model_type") in _FLAT and isinstance(text, Mapping):
        others = {
            name: value for name, value in config.items() if name != "text_config" and value is not None
        }
        tower = {**config.get("vision_config", {}), "model_type": config["model_type"]}
        config = {**text, **others, "vision_config": tower}
    missing = _older_words(config)
    if isinstance(config.get("rope_parameters"), Mapping) and "rope_scaling" not in config:
        missing.setdefault("rope_scaling", None)  # as was written of what is not scaled; some classes insist
    return _parts(config) | missing


def _parts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _parts(value) | _older_words(value) if isinstance(value, dict) else value
        for name, value in config.items()
    }


def _older_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """The missing keys of one part: rope_theta, rope_scaling of what is scaled, partial_rotary_factor; with an
    entry a kind of layer, as gemma 3 has it, those of full attention, and `rope_local_base_freq`."""
    told = config.get("rope_parameters")
    if not isinstance(told, Mapping):
        return {}
    local = told.get("sliding_attention")
    full = told.get("full_attention", told)
    if not isinstance(full, Mapping):
        return {}
    found: dict[str, Any] = {}
    for name, neox in _RENAMED.items():
        if name in full:
            found |= {name: full[name], neox: full[name]}
    is_scaled = full.get("rope_type", PLAIN) != PLAIN or "mrope_section" in full
    if is_scaled:
        found["rope_scaling"] = {"type": full.get("rope_type", PLAIN), **full}
    if isinstance(local, Mapping) and "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    return {name: value for name, value in found.items() if config.get(name) is None}


@contextmanager
def folder_in_older_words(path: Path) -> Iterator[Path]:
    """A model's folder for loaders that read config.json themselves: itself, or one of links beside a config in older
    words. What is opened in it stays open after it is gone."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    told = in_older_words(config)
    if told == config:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="lathe-model-") as made:
        folder = Path(made)
        for each in path.iterdir():
            if each.name != "config.json":
                (folder / each.name).symlink_to(each.resolve())
        (folder / "config.json").write_text(json.dumps(told), encoding="utf-8")
        yield folder
