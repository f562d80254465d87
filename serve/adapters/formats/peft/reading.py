"""PEFT's layout → ours: LoraConfig's keys → AdapterConfig, names and orientation of its tensors → mlx-lm's.

`P.lora_A.weight` [R, D] becomes `P.lora_a` [D, R], and so on; a parameter that PEFT wraps in place of a module
(`target_parameters`: a stack of experts) has its own name in the path, `P.gate_up_proj.lora_a` [E, R, D]. Knows no
network: what of the names is the network's, and in which form, see `own`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from serve.adapters.formats.config import PEFT_MARK, AdapterConfig
from serve.adapters.formats.header import TensorSpec
from serve.adapters.formats.lineage import Lineage, parse_lineage
from serve.adapters.formats.peft.patterns import Targets, is_expression, pattern_of
from serve.adapters.formats.tensors import without_wrappers
from serve.adapters.formats.values import (
    are_names,
    asks_nothing,
    is_count,
    is_number,
    raise_problems,
    shown,
    shown_key,
)

PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""
BASE_LAYER = ".base_layer"
SAFE_INITS = ("gaussian", "eva", "orthogonal")
"""Beginnings that leave the base's weights as they are, beside true and false."""
NEUTRAL = frozenset(
    (
        *(PEFT_MARK, "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type"),
        *("inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
        *("eva_config", "lora_ga_config", "corda_config", "lineage", "mlx_lm"),
    )
)
"""Keys that say nothing of what the tensors mean: of a beginning `init_lora_weights` does, its settings do not."""
READ = frozenset(
    (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias", "lora_bias"),
        *("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "init_lora_weights"),
        *("layers_to_transform", "layers_pattern", "fan_in_fan_out"),
    )
)
"""Keys that are used. fan_in_fan_out says how the base is stored, and A and B are the same either way."""
REFUSED = {
    "alora_invocation_tokens": "it adapts the tokens behind certain others alone, which this version does not",
    "trainable_token_indices": "it trains rows of the embeddings, which all adapters share here",
    "layer_replication": "it changes the base's layers, which all adapters share here",
    "ensure_weight_tying": "it trains the embeddings with the head, and all adapters share those here",
    "loftq_config": "LoftQ changes the base's weights, which all adapters share here",
    "kasa_config": "KaSA changes the base's weights, which all adapters share here",
}
"""Keys of what cannot be applied, and why; other unknown keys are refused without a reason."""

_SUFFIXES = (
    (re.compile(r"(.+)\.lora_A(?:\.([^.]+))?\.weight"), "lora_a"),
    (re.compile(r"(.+)\.lora_B(?:\.([^.]+))?\.weight"), "lora_b"),
    (re.compile(r"(.+)\.lora_B(?:\.([^.]+))?\.bias"), "lora_bias"),
    (re.compile(r"(.+)\.lora_magnitude_vector(?:\.((?!weight$)[^.]+))?(?:\.weight)?"), "m"),
    (re.compile(r"(.+)\.modules_to_save(?:\.([^.]+))?\.weight"), "weight"),
    (re.compile(r"(.+)\.modules_to_save(?:\.([^.]+))?\.bias"), "bias"),
    (re.compile(r"(.+)\.base_layer\.()weight"), "base_weight"),
    (re.compile(r"(.+)\.base_layer\.()bias"), "bias"),
    (re.compile(r"(.+)\.()weight"), "weight"),
    (re.compile(r"(.+)\.()bias"), "bias"),
)


INSIDE_WRAPPER = re.compile(
    r"(?P<module>.+)\.(?P<inside>modules_to_save|original_module)(?:\.[^.]+)?\.(?P<leaf>weight|bias)"
)


@dataclass(frozen=True)
class PeftConfig:
    """LoraConfig as far as tensors are concerned."""

    r: int
    alpha: float
    targets: Targets
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    is_rslora: bool = False
    is_dora: bool = False
    lineage: Lineage | None = None
    knows_sides: bool = False
    """Its PEFT (0.19 and later) took a parameter's last axis for the inputs, see `own`."""

    def scale(self, r: int, alpha: float) -> float:
        """The factor on B(Ax)."""
        return alpha / math.sqrt(r) if self.is_rslora else alpha / r

    def of(self, key: str) -> tuple[int, float]:
        """r and alpha of the module or parameter `key`, by its name in PEFT."""
        match = self.targets.matcher
        rank, alpha = pattern_of(self.rank_pattern, key, match), pattern_of(self.alpha_pattern, key, match)
        return (
            self.r if rank is None else self.rank_pattern[rank],
            self.alpha if alpha is None else self.alpha_pattern[alpha],
        )


@dataclass(frozen=True)
class Piece:
    """One tensor of the file, and how it becomes one in our layout."""

    raw: str
    """Its name in the file."""
    part: str
    num_experts: int = 0
    """E of a parameter that is a stack; 0: no stack."""

    def made(self, value: mx.array) -> mx.array:
        """In our orientation. Of a stack PEFT packs A [R·E, D] rank by rank and B [O, R·E] expert by expert."""
        if self.part not in ("lora_a", "lora_b"):
            return value
        if not self.num_experts:
            return value.T
        if self.part == "lora_a":
            return value.reshape(self.num_experts, value.shape[0] // self.num_experts, value.shape[1])
        ranks = value.shape[1] // self.num_experts
        return value.reshape(value.shape[0], ranks, self.num_experts).transpose(2, 0, 1)


def parse_peft(raw: Mapping[str, Any], path: Path) -> PeftConfig:
    """LoraConfig's keys. AdapterError names `path` and every key that is wrong, or cannot be applied."""
    problems: list[str] = []
    kind = raw.get(PEFT_MARK)
    if kind != "LORA":
        raise_problems(path, [f"is a PEFT adapter of type {shown(kind)}; this version reads LORA"])
    for name in sorted(raw.keys() - NEUTRAL - READ):
        if not asks_nothing(raw[name]):
            reason = REFUSED.get(name, "this version does not know what that means for the tensors")
            problems.append(f"{shown_key(name)} is {shown(raw[name])}: {reason}")
    _check_init(raw.get("init_lora_weights", True), problems)
    if raw.get("bias") not in (None, "none", "all", "lora_only"):
        problems.append(f"bias is {shown(raw['bias'])}; none, all or lora_only was expected")
    if not is_count(raw.get("r", 8), 1):
        problems.append(f"r is {shown(raw['r'])}; a whole number from 1 was expected")
    if not _is_alpha(raw.get("lora_alpha", 8)):
        problems.append(f"lora_alpha is {shown(raw['lora_alpha'])}; a number above 0 was expected")
    lineage = None if raw.get("lineage") is None else parse_lineage(raw["lineage"], problems)
    config = PeftConfig(
        raw.get("r", 8),
        raw.get("lora_alpha", 8),
        _targets(raw, problems),
        _pattern(raw, "rank_pattern", problems),
        _pattern(raw, "alpha_pattern", problems),
        _flag(raw, "use_rslora", problems),
        _flag(raw, "use_dora", problems),
        lineage,
        _version(raw.get("peft_version")) >= (0, 19),
    )
    for name in ("lora_bias", "fan_in_fan_out"):
        _flag(raw, name, problems)
    raise_problems(path, problems)
    return config


def arrange(
    specs: Mapping[str, TensorSpec], peft: PeftConfig, path: Path
) -> tuple[dict[str, Piece], AdapterConfig, dict[str, str]]:
    """What each tensor is: our name → the piece of the file it is made of; the config in our words; and what is there
    twice, by which other tensor it has to be.

    path  of the file of tensors, for messages
    AdapterError names every tensor that has no meaning here, and every pattern that means no tensor.
    """
    problems: list[str] = []
    twice = _twice(specs)
    names = {raw: _parsed(raw, problems) for raw in specs if raw not in twice}
    known = {raw: parsed for raw, parsed in names.items() if parsed is not None}
    adapters = {parsed.adapter for parsed in known.values() if parsed.adapter}
    if len(adapters) > 1:
        problems.append(f"holds several adapters ({', '.join(sorted(adapters))}); one a file was expected")
    pieces: dict[str, Piece] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    keys: set[str] = set()
    depths: dict[str, set[int]] = {}
    for parsed in known.values():
        if parsed.is_update:
            depths.setdefault(parsed.module, set()).add(parsed.depth)
    for raw, parsed in known.items():
        target = (
            _target_of(parsed, peft, depths, problems) if parsed.is_update else _Target(parsed.module, "")
        )
        if target is None:
            continue
        num_experts = 0
        if target.key:
            if target.key not in keys:  # A and B have the same
                keys.add(target.key)
                r, alpha = peft.of(target.key)
                ranks[target.path], scales[target.path] = r, peft.scale(r, alpha)
            num_experts = _num_experts(raw, specs[raw], parsed.part, target, ranks[target.path], problems)
        own = f"{target.path}.{parsed.part}"
        if own in pieces:
            problems.append(f"two tensors are one: {pieces[own].raw} and {raw}")
        pieces[own] = Piece(raw, parsed.part, num_experts)
    _check_patterns(peft, keys, problems)
    _check_saved(peft, known.values(), problems)
    raise_problems(path, problems)
    scale = peft.scale(peft.r, peft.alpha)
    config = AdapterConfig(
        "dora" if peft.is_dora else "lora",
        -1,
        peft.r,
        scale,
        lineage=peft.lineage,
        ranks={path: rank for path, rank in ranks.items() if rank != peft.r},
        scales={path: factor for path, factor in scales.items() if factor != scale},
        sides="peft" if peft.knows_sides else "unsaid",
    )
    return pieces, config, twice


def _twice(specs: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Where the embeddings are saved too, PEFT writes modules that trained whole as they stand in its wrapper once
    more, and what they replace; the latter is nobody's ("")."""
    found = {}
    for raw in specs:
        owner = INSIDE_WRAPPER.fullmatch(raw)
        plain = f"{owner['module']}.{owner['leaf']}" if owner else ""
        if owner and plain in specs and specs[plain].shape == specs[raw].shape:
            found[raw] = plain if owner["inside"] == "modules_to_save" else ""
    return found


@dataclass(frozen=True)
class _Parsed:
    module: str
    """The module's name in the model that PEFT wraps."""
    part: str
    depth: int = 0
    """How many wrappers of other parameters of the module are around this one's."""
    adapter: str = ""

    @property
    def is_update(self) -> bool:
        return self.part in ("lora_a", "lora_b", "lora_bias", "m")


@dataclass(frozen=True)
class _Target:
    path: str
    """In our names."""
    key: str
    """As PEFT's patterns see it; empty: none does."""
    is_parameter: bool = False


def _parsed(raw: str, problems: list[str]) -> _Parsed | None:
    for suffix, part in _SUFFIXES:
        found = suffix.fullmatch(raw)
        if found:
            module, depth = without_wrappers(found[1]).removeprefix(PREFIX), 0
            while module.endswith(BASE_LAYER):
                module, depth = module.removesuffix(BASE_LAYER), depth + 1
            return _Parsed(module, part, depth, found[2] or "")
    problems.append(f"{raw}: {_why_unknown(raw)}")
    return None


def _why_unknown(raw: str) -> str:
    if "lora_embedding_" in raw:
        return "is an update of the embeddings, which all adapters share here"
    if "trainable_tokens" in raw:
        return "trains rows of the embeddings, which all adapters share here"
    return (
        "this version knows no tensor of that name; lora_A.weight, lora_B.weight and the like were expected"
    )


def _target_of(
    parsed: _Parsed, peft: PeftConfig, depths: Mapping[str, set[int]], problems: list[str]
) -> _Target | None:
    """What PEFT would put this tensor on. `depths`: by module, of all its wrappers."""
    name, targets = parsed.module, peft.targets
    if targets.is_module(name) and not parsed.depth:
        return _Target(name, name)
    parameters = targets.parameters_of(name)
    if not parameters:
        problems.append(
            f"{name}: has {parsed.part}, and the config's target_modules, exclude_modules, modules_to_save, "
            f"layers_to_transform and target_parameters leave it out"
        )
        return None
    if depths[name] != set(range(len(parameters))):
        problems.append(
            f"{name}: target_parameters names {', '.join(parameters)} of it, and there are tensors of "
            f"{len(depths[name])}"
        )
        return None
    # The first parameter is wrapped first, and so lies deepest.
    leaf = parameters[len(parameters) - 1 - parsed.depth]
    key = f"{name}.{leaf}"
    return _Target(name if leaf == "weight" else key, key, is_parameter=True)


def _num_experts(raw: str, spec: TensorSpec, part: str, target: _Target, r: int, problems: list[str]) -> int:
    """E of a stack; 0 where it is none."""
    if not target.is_parameter or part not in ("lora_a", "lora_b"):
        if part in ("lora_a", "lora_b") and len(spec.shape) != 2:
            problems.append(f"{raw} is {spec.shape}, two axes were expected")
        return 0
    packed = spec.shape[0 if part == "lora_a" else -1] if len(spec.shape) == 2 else 0
    if not packed or packed % r:
        problems.append(
            f"{raw} is {spec.shape}; of a stack of E experts of rank {r}, as the config has it, "
            f"{'({0}·E, D)' if part == 'lora_a' else '(O, {0}·E)'} was expected".replace("{0}", str(r))
        )
        return 0
    return 0 if target.path != target.key else packed // r


def _check_patterns(peft: PeftConfig, keys: set[str], problems: list[str]) -> None:
    for name, patterns in (("rank_pattern", peft.rank_pattern), ("alpha_pattern", peft.alpha_pattern)):
        for pattern in patterns:
            if not any(pattern_of([pattern], key, peft.targets.matcher) for key in keys):
                problems.append(
                    f"{name} has {pattern!a:.60}, which names no module that there are tensors of"
                )


def _check_saved(peft: PeftConfig, parsed: Iterable[_Parsed], problems: list[str]) -> None:
    whole = [each.module for each in parsed if not each.is_update]
    # As PEFT has it, a module is saved if its name ends so, be it in the middle of a word.
    owners = {owner for module in whole for owner in _owners(module)}
    for saved in peft.targets.save:
        match = peft.targets.matcher.match
        is_there = any(owner.endswith(saved) for owner in owners)
        if not is_there and not any(match(rf"(^|.*\.){saved}($|\..*)", module) for module in whole):
            problems.append(f"modules_to_save names {saved}, and no tensor is of it")


def _owners(module: str) -> Iterable[str]:
    """`a.b.c` → `a`, `a.b`, `a.b.c`."""
    parts = module.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _check_init(init: Any, problems: list[str]) -> None:
    if isinstance(init, bool) or init is None or init in SAFE_INITS:
        return
    told = f"init_lora_weights is {shown(init)}"
    if isinstance(init, str) and init.lower().partition("_")[0] in (
        "pissa",
        "olora",
        "corda",
        "lora",
        "loftq",
    ):
        problems.append(
            f"{told}: it changed the base's weights, which all adapters share here; save it converted "
            f"(path_initial_model_for_weight_conversion)"
        )
    else:
        problems.append(f"{told}; true, false, {', '.join(SAFE_INITS)} were expected")


def _targets(raw: Mapping[str, Any], problems: list[str]) -> Targets:
    modules = raw.get("target_modules")
    layers = raw.get("layers_to_transform")
    return Targets(
        _expression(raw, "target_modules", problems)
        if isinstance(modules, str)
        else (None if modules is None else _listed(raw, "target_modules", problems)),
        _listed(raw, "target_parameters", problems),
        _expression(raw, "exclude_modules", problems)
        if isinstance(raw.get("exclude_modules"), str)
        else _listed(raw, "exclude_modules", problems),
        _listed(raw, "modules_to_save", problems, are_expressions=True),
        _layers(layers, problems),
        (_expression(raw, "layers_pattern", problems),)
        if isinstance(raw.get("layers_pattern"), str) and raw["layers_pattern"]
        else _listed(
            {**raw, "layers_pattern": raw.get("layers_pattern") or None}, "layers_pattern", problems
        ),
    )


def _listed(
    raw: Mapping[str, Any], name: str, problems: list[str], *, are_expressions: bool = False
) -> tuple[str, ...]:
    value = raw.get(name)
    if value is None or value == []:
        return ()
    if not are_names(value):
        problems.append(f"{name} is {shown(value)}; a list of names was expected")
        return ()
    wrong = [each for each in value if are_expressions and not is_expression(each)]
    problems += [f"{name} has {shown(each)}, which is no regular expression" for each in wrong]
    return tuple(each for each in value if each not in wrong)


def _expression(raw: Mapping[str, Any], name: str, problems: list[str]) -> str:
    if not is_expression(raw[name]):
        problems.append(f"{name} is {shown(raw[name])}, which is no regular expression")
        return "(?!)"
    return raw[name]


def _layers(value: Any, problems: list[str]) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    layers = [value] if is_count(value, 0) else value
    if not isinstance(layers, list) or not all(is_count(layer, 0) for layer in layers):
        problems.append(
            f"layers_to_transform is {shown(value)}; a layer's number or a list of them was expected"
        )
        return None
    return tuple(layers)


def _pattern(raw: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append(f"{name} is {shown(value)}; an object of expressions and numbers was expected")
        return {}
    is_rank = name == "rank_pattern"
    expected = "a whole number from 1" if is_rank else "a number above 0"
    wrong = set()
    for pattern, number in value.items():
        if not pattern or not is_expression(pattern):
            problems.append(f"{name} has {shown(pattern)}, which is no regular expression")
            wrong.add(pattern)
        elif not (is_count(number, 1) if is_rank else _is_alpha(number)):
            problems.append(f"{name}.{shown(pattern)} is {shown(number)}; {expected} was expected")
            wrong.add(pattern)
    return {pattern: number for pattern, number in value.items() if pattern not in wrong}


def _flag(raw: Mapping[str, Any], name: str, problems: list[str]) -> bool:
    value = raw.get(name, False)
    if value is not None and not isinstance(value, bool):
        problems.append(f"{name} is {shown(value)}; true or false was expected")
    return value is True


def _is_alpha(value: Any) -> bool:
    return is_number(value) and value > 0


def _version(value: Any) -> tuple[int, ...]:
    found = re.match(r"(\d{1,4})\.(\d{1,4})", value) if isinstance(value, str) else None
    return (int(found[1]), int(found[2])) if found else (0, 0)
