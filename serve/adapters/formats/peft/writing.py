"""An adapter's tensors → what a PEFT folder holds: its names, its orientation, and its config. Writes nothing.

Hugging Face's modules are called as mlx-lm's, but for what a model with towers is inside of; stacks of experts are
packed as PEFT packs `target_parameters`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.layouts import FolderContents
from serve.adapters.formats.peft.experts import StackUpdate, packed
from serve.adapters.formats.peft.reading import PREFIX
from serve.adapters.formats.tensors import check_distinct, paths_of, rank_in, without_wrappers
from serve.errors import AdapterError
from serve.model.network import BACKBONE_NAMES

PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
INSIDE = "language_model"
"""Where mlx-vlm's models have layers and head."""
HEADS = ("lm_head", "output", "embed_out")
SIDES_KNOWN = "0.19.0"
"""The first PEFT that took a parameter's last axis for the inputs, as this does."""
WRAPPERS = re.compile(rf"^(?:{re.escape(PREFIX)}|module\.)+")
"""What PEFT and torch put before the names of a model that they wrap."""
ULPS = 4


def as_peft(tensors: Mapping[str, mx.array], config: AdapterConfig, base: str) -> FolderContents:
    """In PEFT's layout; `base` is the name of the base model there, or empty.

    AdapterError names modules that have no counterpart there.
    """
    low = [path for path in paths_of(tensors) if tensors[f"{path}.lora_a"].ndim == 2]
    stacks = [path for path in paths_of(tensors) if tensors[f"{path}.lora_a"].ndim == 3]
    named = {path: their_name(path) for path in low}
    check_distinct("in PEFT's layout", named)
    made: dict[str, mx.array] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for path, name in named.items():
        ranks[name], scales[name] = rank_in(tensors, path), config.scale_of(path)
        for part, theirs in PARTS.items():
            if f"{path}.{part}" in tensors:
                made[f"{PREFIX}{name}.{theirs}"] = _turned(tensors[f"{path}.{part}"])
    experts = packed({path: _stack(tensors, config, path) for path in stacks}, their_name)
    for each in experts:
        if each.parameter in ranks:
            raise AdapterError(f"{each.parameter}: is adapted under several names, and one was expected")
        ranks[each.parameter], scales[each.parameter] = each.rank, each.scale
        made[f"{PREFIX}{each.key}.lora_A.weight"] = each.a
        made[f"{PREFIX}{each.key}.lora_B.weight"] = each.b
    settings = _settings(config, base, ranks, scales)
    settings["target_modules"] = sorted(named.values())
    settings["target_parameters"] = sorted(each.parameter for each in experts) or None
    if experts:
        settings["lora_dropout"] = 0.0  # PEFT refuses any other beside target_parameters
        settings["peft_version"] = SIDES_KNOWN
    return FolderContents("peft", made, settings)


def their_name(name: str) -> str:
    """A module, or a tensor of one, as Hugging Face's model of the family has it.

    AdapterError for what stands outside the language part: each family calls its towers otherwise.
    """
    first, _, rest = name.partition(".")
    if first == INSIDE:
        # language_model.model.layers.0… is model.language_model.layers.0… there; the head stands beside the model.
        return f"model.{INSIDE}.{rest.removeprefix('model.')}" if rest.startswith("model.") else rest
    if first not in (*BACKBONE_NAMES, *HEADS):
        raise AdapterError(
            f"{name}: what Hugging Face calls it in this family is not known here; known is the language part"
        )
    return name


def our_names(names: Iterable[str]) -> dict[str, str]:
    """The inverse: Hugging Face's names of modules, or of tensors of them → mlx-lm's."""
    start = f"model.{INSIDE}."
    plain = {name: WRAPPERS.sub("", without_wrappers(name)) for name in names}
    is_inside = any(name.startswith(start) for name in plain.values())
    made = {}
    for theirs, name in plain.items():
        if name.startswith(start):
            made[theirs] = f"{INSIDE}.model.{name.removeprefix(start)}"
        else:
            made[theirs] = f"{INSIDE}.{name}" if is_inside and name.partition(".")[0] in HEADS else name
    return made


def alpha_of(scale: float, rank: int) -> int | float:
    """The number that, divided by `rank`, is `scale`; one that is as near as there is where no float gives it."""
    near = [scale * rank]
    for _ in range(ULPS):
        near = [math.nextafter(near[0], 0), *near, math.nextafter(near[-1], math.inf)]
    near.sort(
        key=lambda alpha: (abs(alpha / rank - scale), not alpha.is_integer(), abs(alpha - scale * rank))
    )
    return int(near[0]) if near[0].is_integer() and near[0] < 2**53 else near[0]


def _settings(
    config: AdapterConfig, base: str, ranks: Mapping[str, int], scales: Mapping[str, float]
) -> dict[str, Any]:
    """PEFT's own keys; ranks and scales by the names that its patterns are compared with."""
    alphas = {name: alpha_of(scales[name], rank) for name, rank in ranks.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.rank
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else alpha_of(config.scale, rank)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": config.fine_tune_type == "dora",
        "rank_pattern": {name: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {name: each for name, each in alphas.items() if each != alpha},
    }


def _stack(tensors: Mapping[str, mx.array], config: AdapterConfig, path: str) -> StackUpdate:
    return StackUpdate(tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"], config.scale_of(path))


def _turned(array: mx.array) -> mx.array:
    return mx.contiguous(array.T) if array.ndim == 2 else array
