"""`adapter_config.json` ↔ AdapterConfig. mlx-lm's keys and our lineage; every problem by its key, all at once.

A key that changes what the tensors mean is used or refused. mlx-lm writes all its training settings beside them, so
other keys at the top are left alone, while `lora_parameters` holds nothing that is not read. What is said twice, see
`repeated`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from serve.adapters.formats.lineage import Lineage, parse_lineage
from serve.adapters.formats.repeated import SAME, by_module, check_beside, check_inside, says_dora
from serve.adapters.formats.tensors import without_containers
from serve.adapters.formats.values import (
    are_names,
    is_count,
    is_number,
    parse_object,
    raise_problems,
    shown,
)
from serve.errors import AdapterError

FineTuneType = Literal["lora", "dora", "full"]
Layout = Literal["mlx-lm", "peft"]
"""Whose two files they are."""
Sides = Literal["own", "peft", "unsaid"]

PEFT_MARK = "peft_type"
"""The key by which PEFT's configs are known."""
PARAMETERS = ("rank", "scale", "alpha", "dropout", "keys", "init_lora_weights")
"""What `lora_parameters` holds."""
STRENGTH = "scale, the factor on B(Ax), or alpha, which is scale * rank"
INIT = re.compile(r"default|pissa|pissa_niter_[1-9]\d*")


@dataclass(frozen=True)
class AdapterConfig:
    """`adapter_config.json`. The LoRA fields mean nothing for a full fine-tune."""

    fine_tune_type: FineTuneType
    num_layers: int
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    keys: tuple[str, ...] = ()
    """Paths inside a layer, and the head's path, as mlx-lm's `keys`; of models with towers whole paths, as mlx-vlm's.
    Empty: all that either adapts without them."""
    init_lora_weights: str = "default"
    """How A and B began; after pissa the folder holds an update of twice the recipe's rank."""
    lineage: Lineage | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    """By module path, where another than `rank`; whatever containers stand before the path."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """Likewise, where another than `scale`."""
    sides: Sides = "own"
    """Of stacks of experts, on which side A is. own: of the inputs; peft: as PEFT since 0.19; unsaid: shapes tell."""

    def rank_of(self, path: str) -> int:
        """R of the update of the module at `path`, by its name in the file or in the model."""
        return self._rank_by_end.get(without_containers(path), self.rank)

    def scale_of(self, path: str) -> float:
        """The factor on that module's B(Ax)."""
        return self._scale_by_end.get(without_containers(path), self.scale)

    # A file may name tens of thousands of modules: each is looked up, none is searched for.
    @cached_property
    def _rank_by_end(self) -> dict[str, int]:
        return _by_end(self.ranks)

    @cached_property
    def _scale_by_end(self) -> dict[str, float]:
        return _by_end(self.scales)


T = TypeVar("T")


def _by_end(named: Mapping[str, T]) -> dict[str, T]:
    """By what all libraries call a module; the first of several holds."""
    return {without_containers(name): value for name, value in reversed([*named.items()])}


def config_json(config: AdapterConfig) -> dict[str, Any]:
    """What `adapter_config.json` holds: mlx-lm's keys first. AdapterError for ranks and scales by module, which that
    layout has no words for."""
    if config.ranks or config.scales:
        raise AdapterError(
            "mlx-lm's layout has one rank and one scale for all modules, and these differ by module"
        )
    parameters: dict[str, Any] = {"rank": config.rank, "scale": config.scale, "dropout": config.dropout}
    if config.keys:
        parameters["keys"] = list(config.keys)
    if config.init_lora_weights != "default":
        parameters["init_lora_weights"] = config.init_lora_weights
    raw: dict[str, Any] = {"fine_tune_type": config.fine_tune_type, "num_layers": config.num_layers}
    if config.fine_tune_type != "full":
        raw["lora_parameters"] = parameters
    if config.lineage is not None:
        raw["lineage"] = dataclasses.asdict(config.lineage)
    return raw


def is_pefts(raw: Mapping[str, Any]) -> bool:
    """Whether that is PEFT's config. Some who write mlx-lm's say `peft_type` in it too."""
    return PEFT_MARK in raw and "lora_parameters" not in raw


def parse_config(text: str, path: Path) -> AdapterConfig:
    """The config written in `text`, in mlx-lm's layout. AdapterError names `path` and every key that is wrong."""
    raw = parse_object(text, path)
    if is_pefts(raw):
        raise AdapterError(f"{path}: is PEFT's ({shown(raw[PEFT_MARK])}), mlx-lm's layout was expected")
    return config_of(raw, path)


def config_of(raw: Mapping[str, Any], path: Path) -> AdapterConfig:
    """What an object in mlx-lm's layout says. AdapterError names `path` and every key that is wrong."""
    problems: list[str] = []
    config = _config(raw, problems)
    raise_problems(path, problems)
    return config


def _config(raw: Mapping[str, Any], problems: list[str]) -> AdapterConfig:
    kind = raw.get("fine_tune_type", "dora" if says_dora(raw) else "lora")
    if not isinstance(kind, str) or kind not in get_args(FineTuneType):
        problems.append(f"fine_tune_type is {shown(kind)}; this version reads lora, dora and full")
    if raw.get(PEFT_MARK, "LORA") != "LORA":
        problems.append(f"{PEFT_MARK} is {shown(raw[PEFT_MARK])}; LORA was expected beside lora_parameters")
    num_layers = raw.get("num_layers")
    if num_layers is not None and not is_count(num_layers, -1):
        problems.append(f"num_layers is {shown(num_layers)}; a whole number was expected, -1 for all")
    parameters = {} if kind == "full" else _parameters(raw, str(kind), problems)
    rank, scale = parameters.get("rank"), parameters.get("scale", 0.0)
    check_beside(raw, str(kind), rank, scale, parameters.get("init_lora_weights", "default"), problems)
    lineage = None if raw.get("lineage") is None else parse_lineage(raw["lineage"], problems)
    numbers = -1 if num_layers is None else num_layers
    parameters |= by_module(raw, problems)
    return AdapterConfig(fine_tune_type=kind, num_layers=numbers, lineage=lineage, **parameters)


def _parameters(config: Mapping[str, Any], kind: str, problems: list[str]) -> dict[str, Any]:
    """The fields of AdapterConfig that `lora_parameters` holds."""
    raw = config.get("lora_parameters")
    if not isinstance(raw, dict):
        found = "missing" if raw is None else shown(raw)
        problems.append(f"lora_parameters is {found}; an object with rank and {STRENGTH}, was expected")
        return {}
    rank, dropout = raw.get("rank"), raw.get("dropout", 0.0)
    keys, init = raw.get("keys"), raw.get("init_lora_weights")
    if not is_count(rank, 1):
        found = "missing" if "rank" not in raw else shown(rank)
        problems.append(f"lora_parameters.rank is {found}; a whole number from 1 was expected")
        rank = None
    if not is_number(dropout) or not 0 <= dropout < 1:
        problems.append(
            f"lora_parameters.dropout is {shown(dropout)}; a number from 0 to below 1 was expected"
        )
    if keys is not None and not are_names(keys):
        problems.append(f"lora_parameters.keys is {shown(keys)}; a list of module names was expected")
    if init is not None and not (isinstance(init, str) and INIT.fullmatch(init)):
        problems.append(
            f"lora_parameters.init_lora_weights is {shown(init)}; default, pissa or pissa_niter_N was expected"
        )
    scale = _scale(raw, rank, config, problems)
    check_inside(raw, PARAMETERS, kind, rank, scale, problems)
    return {
        "rank": rank,
        "scale": scale,
        "dropout": dropout,
        "keys": tuple(keys) if isinstance(keys, list) else (),
        "init_lora_weights": init or "default",
    }


def _scale(raw: Mapping[str, Any], rank: int | None, config: Mapping[str, Any], problems: list[str]) -> float:
    """The factor on B(Ax). mlx-lm writes `scale`; `alpha` is PEFT's word, and its alpha / rank is the factor."""
    written = {name: raw[name] for name in ("scale", "alpha") if raw.get(name) is not None}
    if not written:
        problems.append(f"lora_parameters has neither scale nor alpha; write {STRENGTH}")
    wrong = [name for name, value in written.items() if not is_number(value) or not value > 0]
    for name in wrong:
        problems.append(f"lora_parameters.{name} is {shown(written[name])}; a number above 0 was expected")
    if not written or wrong or rank is None:
        return 0.0
    if len(written) == 2:
        return _scale_of_both(float(written["scale"]), float(written["alpha"]) / rank, config, problems)
    return float(written["scale"]) if "scale" in written else float(written["alpha"]) / rank


def _scale_of_both(scale: float, by_alpha: float, config: Mapping[str, Any], problems: list[str]) -> float:
    """The factor, of a file that has both, as mlx-lm wrote them before 0.22.5: up to 0.14.1 it multiplied by
    scale * alpha / rank, then by scale alone (tuner/lora.py). Keys tell who wrote a file: lora_layers is of versions
    before 0.19, and without use_dora of those before 0.13; fine_tune_type is of 0.19 and later. Others mean one
    factor by both."""
    both = scale * by_alpha
    if "fine_tune_type" in config:
        return scale
    if "lora_layers" in config and "use_dora" not in config:
        return both
    if "lora_layers" in config:
        if not math.isclose(scale, both, rel_tol=SAME):
            problems.append(
                f"lora_parameters has scale and alpha: mlx-lm up to 0.14.1 multiplied by scale * alpha / rank, "
                f"{both:g}, and 0.14.2 to 0.18 by scale, {scale:g}, and the file does not tell which wrote it; write "
                "the factor as scale, without alpha"
            )
    elif not math.isclose(scale, by_alpha, rel_tol=SAME):
        problems.append(
            f"lora_parameters.scale is {scale:g} and alpha / rank is {by_alpha:g}; they are the same factor, keep one"
        )
    return scale
