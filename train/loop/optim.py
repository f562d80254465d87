"""Optimizers and learning-rate schedules, by the names and meanings mlx-lm gives them. Knows no model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.optimizers as mlx_optim
import numpy as np

from serve.errors import ConfigError
from train.recipe.recipe import Recipe

Schedule = Callable[[mx.array], mx.array]

OPTIMIZERS: dict[str, type[mlx_optim.Optimizer]] = {
    "adam": mlx_optim.Adam,
    "adamw": mlx_optim.AdamW,
    "muon": mlx_optim.Muon,
    "sgd": mlx_optim.SGD,
    "adafactor": mlx_optim.Adafactor,
}
SCHEDULES = ("constant", "linear_schedule", "cosine_decay", "exponential_decay", "step_decay")
MUON_RATE_FACTOR = 10.0
"""Muon's updates are orthogonal matrices; ten times Adam's rate moves weights about as far (measured)."""


def build_schedule(
    spec: Mapping[str, Any] | None,
    *,
    learning_rate: float,
    num_steps: int,
    warmup_ratio: float = 0.0,
) -> Schedule:
    """mlx-lm's `lr_schedule {name, warmup, warmup_init, arguments}` (and `final_ratio`), over optimizer steps from 0.

    Arguments that are left out come from the learning rate and from `num_steps`, the length of the run in
    optimizer steps. Without a spec the rate is constant after the warm-up. ConfigError for a bad spec.
    """
    spec = spec or {"name": "constant"}
    warmup_steps = int(spec.get("warmup") or round(warmup_ratio * num_steps))
    name = str(spec.get("name"))
    final = float(spec.get("final_ratio") or 0.0) * learning_rate
    arguments = _arguments(
        name, spec.get("arguments") or (), learning_rate, final, max(num_steps - warmup_steps, 1)
    )
    try:
        main = _constant(arguments[0]) if name == "constant" else getattr(mlx_optim, name)(*arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lr_schedule.arguments: {name} does not take {arguments}: {error}") from error
    if not warmup_steps:
        return main
    warmup = mlx_optim.linear_schedule(float(spec.get("warmup_init") or 0.0), arguments[0], warmup_steps)
    # mlx-lm joins one step after the warm-up ends, so the peak is met once by the ramp itself.
    return mlx_optim.join_schedules([warmup, main], [warmup_steps + 1])


def schedule_of(recipe: Recipe, num_steps: int) -> Schedule:
    """The schedule that a recipe asks for, over a run of so many optimizer steps."""
    return build_schedule(
        recipe.lr_schedule.model_dump() if recipe.lr_schedule else None,
        learning_rate=recipe.learning_rate,
        num_steps=num_steps,
        warmup_ratio=recipe.warmup_ratio,
    )


def rates_of(schedule: Schedule, num_steps: int) -> list[float]:
    """The learning rate of each step of a run, from the first on."""
    rates = mx.broadcast_to(schedule(mx.arange(num_steps)), (num_steps,))
    return np.array(rates.astype(mx.float32)).tolist()


def _constant(rate: float) -> Schedule:
    return lambda step: mx.array(rate)


def _arguments(name: str, given: Sequence[float], rate: float, final: float, num_steps: int) -> list[float]:
    defaults: dict[str, list[float]] = {
        "constant": [rate],
        "linear_schedule": [rate, final, num_steps],
        "cosine_decay": [rate, num_steps, final],
        "exponential_decay": [],  # mlx-lm's meaning has no natural default; the recipe asks for the arguments
        "step_decay": [],
    }
    if name not in defaults:
        raise ConfigError(f"lr_schedule.name: found {name!r}; expected one of {', '.join(SCHEDULES)}")
    return [*given, *defaults[name][len(given) :]]


def build_optimizer(
    name: str,
    config: Mapping[str, Mapping[str, Any]],
    schedule: Schedule,
    *,
    learning_rate: float,
    embedding_names: frozenset[str] = frozenset(),
    loraplus_ratio: float | None = None,
) -> mlx_optim.Optimizer:
    """An optimizer driven by `schedule`.

    config            mlx-lm's nested `optimizer_config`: {optimizer name: {argument: value}}
    learning_rate     the rate the schedule was built for; Muon's own rate is a multiple of the schedule
    embedding_names   parameters Muon leaves to AdamW, beside those that are not matrices
    loraplus_ratio    B's rate over that of everything else (LoRA+, Hayou et al. 2024, §4); None: no difference
    ConfigError for an unknown optimizer or argument.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer: found {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    arguments = dict(config.get(name) or {})
    if name == "muon":
        groups = _muon(arguments, dict(config.get("adamw") or {}), schedule, learning_rate, embedding_names)
    else:
        if name == "adafactor":
            # mlx's Adafactor ignores the learning rate it is given unless told not to.
            arguments.setdefault("relative_step", False)
        groups = [Group(_every, name, arguments, schedule)]
    if loraplus_ratio is not None:
        groups = [*(_faster(group, loraplus_ratio) for group in groups), *groups]
    optimizers = [_make(group.name, group.arguments, group.schedule) for group in groups]
    if len(groups) == 1:
        return optimizers[0]
    # The last group takes what is left, so it has no filter of its own.
    return mlx_optim.MultiOptimizer(optimizers, [group.takes for group in groups[:-1]])


@dataclass(frozen=True)
class Group:
    """Parameters with an optimizer of their own; a parameter goes to the first group that takes it."""

    takes: Callable[[str, mx.array], bool]
    name: str
    arguments: dict[str, Any]
    schedule: Schedule


def _every(path: str, weight: mx.array) -> bool:
    return True


def _faster(group: Group, ratio: float) -> Group:
    """The same for B alone, at `ratio` times the rate all along the schedule."""

    def takes(path: str, weight: mx.array) -> bool:
        return path.rsplit(".", 1)[-1] == "lora_b" and group.takes(path, weight)

    return replace(group, takes=takes, schedule=lambda step: group.schedule(step) * ratio)


def _muon(
    arguments: dict[str, Any],
    adamw_arguments: dict[str, Any],
    schedule: Schedule,
    learning_rate: float,
    embedding_names: frozenset[str],
) -> list[Group]:
    rate = float(arguments.pop("learning_rate", None) or MUON_RATE_FACTOR * learning_rate)
    factor = rate / learning_rate if learning_rate else MUON_RATE_FACTOR

    def is_hidden_matrix(path: str, weight: mx.array) -> bool:
        return weight.ndim == 2 and path not in embedding_names

    return [
        Group(is_hidden_matrix, "muon", arguments, lambda step: schedule(step) * factor),
        Group(_every, "adamw", adamw_arguments, schedule),
    ]


def _make(name: str, arguments: dict[str, Any], schedule: Schedule) -> mlx_optim.Optimizer:
    kind = OPTIMIZERS[name]
    known = [
        key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "learning_rate")
    ]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ConfigError(
            f"optimizer_config.{name}: found {', '.join(unknown)}; {name} takes {', '.join(known)}"
        )
    try:
        return kind(learning_rate=schedule, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer_config.{name}: {error}") from error


def current_rate(optimizer: mlx_optim.Optimizer) -> float:
    """The rate of the last update: with Muon, AdamW's; with LoRA+, A's. Reads one number from the device."""
    if isinstance(optimizer, mlx_optim.MultiOptimizer):
        optimizer = optimizer.optimizers[-1]
    return float(optimizer.learning_rate.item())
