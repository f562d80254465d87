"""Optimizers and learning-rate schedules, by the names and meanings mlx-lm gives them. Knows no model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as mlx_optim

from serve.errors import ConfigError

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
) -> mlx_optim.Optimizer:
    """An optimizer driven by `schedule`.

    config            mlx-lm's nested `optimizer_config`: {optimizer name: {argument: value}}
    learning_rate     the rate the schedule was built for; Muon's own rate is a multiple of the schedule
    embedding_names   parameters Muon leaves to AdamW, beside those that are not matrices
    ConfigError for an unknown optimizer or argument.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer: found {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    arguments = dict(config.get(name) or {})
    if name == "muon":
        return _muon(arguments, dict(config.get("adamw") or {}), schedule, learning_rate, embedding_names)
    if name == "adafactor":
        # mlx's Adafactor ignores the learning rate it is given unless told not to.
        arguments.setdefault("relative_step", False)
    return _make(name, arguments, schedule)


def _muon(
    arguments: dict[str, Any],
    adamw_arguments: dict[str, Any],
    schedule: Schedule,
    learning_rate: float,
    embedding_names: frozenset[str],
) -> mlx_optim.Optimizer:
    rate = float(arguments.pop("learning_rate", None) or MUON_RATE_FACTOR * learning_rate)
    factor = rate / learning_rate if learning_rate else MUON_RATE_FACTOR
    matrices = _make("muon", arguments, lambda step: schedule(step) * factor)
    rest = _make("adamw", adamw_arguments, schedule)

    def is_hidden_matrix(path: str, weight: mx.array) -> bool:
        return weight.ndim == 2 and path not in embedding_names

    return mlx_optim.MultiOptimizer([matrices, rest], [is_hidden_matrix])


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
    """The rate of the last update (of AdamW's part where Muon is used). Reads one number from the device."""
    if isinstance(optimizer, mlx_optim.MultiOptimizer):
        optimizer = optimizer.optimizers[-1]
    return float(optimizer.learning_rate.item())
