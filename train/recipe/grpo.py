"""What a recipe knows of objective grpo: its knobs, in TRL's words and defaults, its rewards, and its entry."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator

from serve.settings import Strict
from train.recipe.objective import ObjectiveConfig, ObjectiveEntry


def _is_pattern(value: Any) -> Any:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
    return value


class _Reward(Strict):
    weight: float = 1.0
    """What this reward counts in the sum; negative punishes."""

    def beside(self, locate: Callable[[str], str]) -> Self:
        """The same, with the file it names as `locate` finds it."""
        return self


class FunctionReward(_Reward):
    """A Python function, called once a batch: (completions, prompts, completion_ids, **columns) -> one float each."""

    kind: Literal["function"]
    name: str
    """`package.module:function`, or `path/to/file.py:function` relative to the recipe."""

    @field_validator("name", mode="after")
    @classmethod
    def _has_both(cls, value: str) -> str:
        where, _, function = value.rpartition(":")
        if not where or not function.isidentifier():
            raise ValueError("expected package.module:function or path/to/file.py:function")
        return value

    def beside(self, locate: Callable[[str], str]) -> Self:
        where, _, function = self.name.rpartition(":")
        return self.model_copy(update={"name": f"{locate(where)}:{function}"})


class RegexReward(_Reward):
    """1 where a pattern is found in the answer, else 0."""

    kind: Literal["regex"]
    pattern: Annotated[str, Field(min_length=1)]
    """Python's syntax; searched for anywhere, so anchor it (`^…$`) where the whole answer is meant."""
    field: str | None = None
    """A column of the row that the pattern's group must equal, white space around both aside: the one named
    `answer`, else the first, else the whole match."""

    _checked = field_validator("pattern", mode="after")(_is_pattern)


class JSONReward(_Reward):
    """1 where the answer is the JSON asked for, 0 where it is no JSON or not of that form, between where some keys
    are wrong. A ```json fence around the answer is taken off."""

    kind: Literal["json"]
    required: tuple[str, ...] = ()
    """Keys that the answer, an object, must have."""
    json_schema: dict[str, Any] | None = None
    """A JSON Schema that it must satisfy."""
    equals: dict[str, str] = Field(default_factory=dict)
    """Key of the answer -> column of the row with the right value; the reward is the share that is right."""

    @field_validator("json_schema", mode="after")
    @classmethod
    def _is_schema(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        import jsonschema

        if value is not None:
            try:
                jsonschema.validators.validator_for(value).check_schema(value)
            except jsonschema.SchemaError as error:
                raise ValueError(f"not a JSON Schema: {error.message}") from None
        return value


Reward = Annotated[FunctionReward | RegexReward | JSONReward, Field(discriminator="kind")]

ONE_UPDATE = (
    "each rollout serves one update, at which the ratio to the policy that wrote it is 1; leave it out"
)


class GRPOConfig(ObjectiveConfig):
    """Answers the model itself gives to a prompt, the better ones of a group made likelier. Shao et al. 2024,
    arXiv 2402.03300."""

    num_generations: int = Field(default=8, ge=2)
    """Answers to each prompt: a group. `batch_size` counts answers, so it is a multiple of this."""
    max_completion_length: int = Field(default=256, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the rollouts, and of the probabilities that are trained."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Share of probability the rollouts draw from."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence to the reference. 0 (TRL's default): no reference is computed."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Advantages are divided by the rewards' standard deviation in the group, in the batch, or not at all."""
    loss_type: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """What a token's loss is divided by: dapo, the tokens of the whole step; grpo, those of its own answer, then
    the answers; dr_grpo, max_completion_length, then the answers."""
    mask_truncated_completions: bool = False
    """Leave answers that max_completion_length cut off out of the loss; their rewards count for the group's mean."""
    rewards: tuple[Reward, ...] = Field(min_length=1)
    """What an answer is worth: the weighted sum of these."""
    epsilon: None = None
    epsilon_high: None = None
    num_iterations: None = None

    @property
    def has_reference(self) -> bool:
        return self.beta > 0

    @property
    def without_reference(self) -> str:
        return ", or grpo.beta: 0"

    def problems(self, recipe: Any) -> Iterator[tuple[str, str]]:
        """A batch holds whole groups of answers, and its prompts are found again."""
        if any(entry.streaming for entry in recipe.datasets):
            yield "objective", "grpo comes back to its prompts by number, which a stream does not keep"
        if recipe.batch_size % self.num_generations:
            yield (
                "batch_size",
                f"found {recipe.batch_size}; it counts answers, {self.num_generations} to a prompt: expected a "
                f"multiple of grpo.num_generations",
            )

    def beside(self, locate: Callable[[str], str]) -> Self:
        return self.model_copy(update={"rewards": tuple(each.beside(locate) for each in self.rewards)})

    @field_validator("epsilon", "epsilon_high", mode="before")
    @classmethod
    def _nothing_to_clip(cls, value: Any) -> Any:
        if value is not None:
            raise ValueError(f"nothing is clipped: {ONE_UPDATE}")
        return value

    @field_validator("num_iterations", mode="before")
    @classmethod
    def _one_update(cls, value: Any) -> Any:
        if value not in (None, 1):
            raise ValueError(
                "more than one update a rollout would learn from answers of weights that no checkpoint holds, "
                "and could not be resumed exactly; expected 1"
            )
        return None


ENTRY = ObjectiveEntry(
    "what a reward function favours",
    ("prompt",),
    "train.objectives.grpo:build",
    GRPOConfig,
    ("reward",),
    shown="reward",
)
