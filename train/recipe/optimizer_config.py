"""The part of a recipe that says how weights move: schedules and the optimizers' arguments, mlx's own defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from serve.settings import Problems, Strict

NUM_ARGUMENTS = {
    "constant": (1, 1),
    "linear_schedule": (3, 3),
    "cosine_decay": (2, 3),
    "exponential_decay": (2, 2),
    "step_decay": (3, 3),
}


class Schedule(Strict):
    """Learning rate over optimizer updates: `warmup` linear steps, then the named mlx schedule."""

    name: Literal["constant", "linear_schedule", "cosine_decay", "exponential_decay", "step_decay"]
    warmup: int = Field(default=0, ge=0)
    """Optimizer updates from `warmup_init` to the peak."""
    warmup_init: float = Field(default=0.0, ge=0)
    """Learning rate of the first update when there is a warmup."""
    arguments: tuple[float, ...] | None = None
    """As mlx.optimizers takes them, peak first; left out, they follow from learning_rate and the run's length."""
    final_ratio: float = Field(default=0.0, ge=0, le=1)
    """Last rate over peak rate, when `arguments` are left out (linear, cosine)."""

    @model_validator(mode="after")
    def _arguments_fit(self) -> Schedule:
        if self.arguments is None:
            if self.name in ("exponential_decay", "step_decay"):
                least, _ = NUM_ARGUMENTS[self.name]
                raise Problems(
                    [("arguments", f"missing; {self.name} needs {least} numbers, the peak rate first")]
                )
            return self
        least, most = NUM_ARGUMENTS[self.name]
        if not least <= len(self.arguments) <= most:
            wanted = str(least) if least == most else f"{least} or {most}"
            raise Problems(
                [("arguments", f"found {len(self.arguments)} numbers; {self.name} takes {wanted}")]
            )
        if self.final_ratio:
            raise Problems([("final_ratio", "has no effect beside arguments; put the last rate there")])
        return self


def peak_of(schedule: Schedule | None) -> float | None:
    """The highest rate that it names; None where it names none."""
    return schedule.arguments[0] if schedule is not None and schedule.arguments else None


class AdamConfig(Strict):
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    bias_correction: bool = False


class AdamWConfig(AdamConfig):
    weight_decay: float = Field(default=0.01, ge=0)


class MuonConfig(Strict):
    momentum: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    nesterov: bool = True
    ns_steps: int = Field(default=5, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak rate of the weights Muon takes. Nothing: a fixed multiple of the recipe's learning_rate."""


class SGDConfig(Strict):
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    dampening: float = Field(default=0.0, ge=0)
    nesterov: bool = False


class AdafactorConfig(Strict):
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = Field(default=1.0, gt=0)
    decay_rate: float = -0.8
    beta_1: float | None = None
    weight_decay: float = Field(default=0.0, ge=0)
    scale_parameter: bool = True
    relative_step: bool = False
    """mlx's own default is true, which ignores learning_rate; here that has to be asked for."""
    warmup_init: bool = False


class OptimizerConfig(Strict):
    """Arguments per optimizer, as mlx-lm nests them; the entry of the chosen `optimizer` is used."""

    adam: AdamConfig = AdamConfig()
    adamw: AdamWConfig = AdamWConfig()
    """Also for the weights Muon does not take (embeddings, vectors) under `optimizer: muon`."""
    muon: MuonConfig = MuonConfig()
    sgd: SGDConfig = SGDConfig()
    adafactor: AdafactorConfig = AdafactorConfig()
