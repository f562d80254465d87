"""What trainers write beside mlx-lm's `lora_parameters`: the same once more, in PEFT's words or their own.

What says the same is fine, and what says otherwise is a problem, as is what says something that only other layouts
have words for. `unsloth_mlx_lora_module_ranks` and `…_scales` are Unsloth's on MLX, for what differs by module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from serve.adapters.formats.values import (
    asks_nothing,
    is_count,
    is_names_or_text,
    is_number,
    shown,
    shown_key,
)

BY_MODULE = {"ranks": "unsloth_mlx_lora_module_ranks", "scales": "unsloth_mlx_lora_module_scales"}
"""Fields of AdapterConfig, and the keys that hold them: objects of module paths and numbers."""
ELSEWHERE = frozenset(
    (
        *("rank", "scale", "alpha", "keys", "init_lora_weights", "r", "lora_alpha", "lora_scale"),
        *("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform"),
        *("layers_pattern", "layer_replication", "fan_in_fan_out", "bias", "lora_bias"),
        *("trainable_token_indices", "alora_invocation_tokens", "loftq_config", "eva_config", "corda_config"),
    )
)
"""Keys that say at the top, in other tools' layouts, what the tensors mean."""
RANK, SCALE, ALPHA = ("rank", "r"), ("scale", "lora_scale"), ("alpha", "lora_alpha")
SETTINGS = ("use_dora", "num_layers")
"""What mlx-lm-lora writes into `lora_parameters` too."""
INSTEAD = {
    "use_rslora": "write scale, which is alpha / sqrt(rank) there",
    "use_dora": "fine_tune_type says that",
    "target_modules": "keys is its name here",
}
SAME = 1e-6
"""How far two words for one factor may be apart, relatively, and still be the same number."""

Said = Callable[[str], float | str | None]


def says_dora(raw: Mapping[str, Any]) -> bool:
    """Whether a config that names no kind means DoRA."""
    inside = raw.get("lora_parameters")
    return raw.get("use_dora") is True or (isinstance(inside, dict) and inside.get("use_dora") is True)


def check_inside(
    raw: Mapping[str, Any], own: tuple[str, ...], kind: str, rank: Any, scale: float, problems: list[str]
) -> None:
    """Keys of `lora_parameters` beyond its `own`."""
    for name in sorted(raw.keys() - {*own}):
        value = raw[name]
        if asks_nothing(value) or (name == "num_layers" and is_count(value, -1)):
            continue
        if name in (*RANK, *SCALE, *ALPHA, "use_dora") and _is_same(name, value, raw, kind, rank, scale):
            continue
        known = INSTEAD.get(name) or f"this version reads {', '.join((*own, *SETTINGS))}"
        said = _other(name, kind, rank, scale) or known
        problems.append(f"lora_parameters.{shown_key(name)} is {shown(value)}; {said}")


def check_beside(
    raw: Mapping[str, Any], kind: str, rank: Any, scale: float, init: str, problems: list[str]
) -> None:
    """Keys at the top that say what an adapter is. rank, scale: those of `lora_parameters`; None and 0 where there
    are none."""
    for name in sorted(ELSEWHERE & raw.keys()):
        value = raw[name]
        is_told = name in ("keys", "target_modules") and is_names_or_text(value) and rank is not None
        is_told = is_told or (name == "init_lora_weights" and rank is not None and value in (True, init))
        if asks_nothing(value) or is_told or _is_same(name, value, raw, kind, rank, scale):
            continue
        said = INSTEAD.get(name, "lora_parameters is where this version reads what an adapter is")
        said = _other(name, kind, rank, scale) or said
        problems.append(f"{name} is {shown(value)}, beside lora_parameters: {said}")


def by_module(raw: Mapping[str, Any], problems: list[str]) -> dict[str, dict[str, Any]]:
    """`ranks` and `scales` of AdapterConfig, where a config has them."""
    found: dict[str, dict[str, Any]] = {}
    for field, key in BY_MODULE.items():
        value = raw.get(key)
        if value is None:
            continue
        is_fine = isinstance(value, dict) and all(
            is_count(each, 1) if field == "ranks" else is_number(each) and each > 0 for each in value.values()
        )
        if not is_fine:
            problems.append(f"{key} is {shown(value)}; an object of module paths and numbers was expected")
            continue
        found[field] = value
    return found


def _is_same(name: str, value: Any, raw: Mapping[str, Any], kind: str, rank: Any, scale: float) -> bool:
    """Whether this key says what `lora_parameters` and `fine_tune_type` say."""
    if rank is None or not scale:
        return False
    if name in RANK:
        return is_count(value, 1) and value == rank
    if name in SCALE:
        return is_number(value) and math.isclose(value, scale, rel_tol=SAME)
    if name in ALPHA:
        divisor = math.sqrt(rank) if raw.get("use_rslora") is True else rank
        return is_number(value) and math.isclose(value / divisor, scale, rel_tol=SAME)
    if name == "use_rslora":  # which says how alpha is meant
        return value is True and any(_is_same(each, raw.get(each), raw, kind, rank, scale) for each in ALPHA)
    return name == "use_dora" and value is (kind == "dora")


def _other(name: str, kind: str, rank: Any, scale: float) -> str:
    """What is said there instead; "" where that is not known, or the key has no counterpart."""
    if rank is None or not scale:
        return ""
    if name in RANK:
        return f"rank is {rank} there"
    if name in (*SCALE, *ALPHA):
        return f"scale is {scale:g} and rank {rank} there, which make an alpha of {scale * rank:g}"
    return f"fine_tune_type says {kind}" if name == "use_dora" else ""
