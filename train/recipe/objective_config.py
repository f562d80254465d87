"""The part of a recipe that says what is learned from: one block an objective, in TRL's words and defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from serve.settings import Problems, Strict


class ObjectiveConfig(Strict):
    """A recipe's block of one objective."""

    @property
    def has_reference(self) -> bool:
        """True where the objective measures against the model that the run starts from."""
        return False

    @property
    def without_reference(self) -> str:
        """How to do without one, where that is possible; for a message."""
        return ""

    def problems(self, recipe: Any) -> Iterator[tuple[str, str]]:
        """(key, what is wrong) of the recipe's other keys, where they do not agree with this objective."""
        yield from ()


class DPOConfig(ObjectiveConfig):
    """Pairs of answers, the chosen one pushed above the rejected one. Rafailov et al. 2023, arXiv 2305.18290."""

    beta: float = Field(default=0.1, gt=0)
    """How much a log-probability gained over the reference counts; larger stays nearer to the reference.
    With ipo, the paper's τ."""
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """sigmoid: DPO, eq. 7. hinge: SLiC. ipo: Azar et al. 2023, eq. 17, by mean log-probabilities. robust: Chowdhury
    et al. 2024, unbiased where `label_smoothing` of the pairs are the wrong way round."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs taken to be the wrong way round; with sigmoid (conservative DPO) and robust."""
    reference_free: bool = False
    """Take the reference as equal for all answers, which leaves it out."""
    rpo_alpha: float | None = Field(default=None, gt=0)
    """Adds this times the chosen answer's mean negative log-likelihood (Pang et al. 2024, arXiv 2404.19733)."""

    @property
    def has_reference(self) -> bool:
        return not self.reference_free

    @property
    def without_reference(self) -> str:
        return ", objective orpo or dpo.reference_free: true"

    @model_validator(mode="after")
    def _smoothing_fits(self) -> DPOConfig:
        if self.label_smoothing and self.loss_type in ("hinge", "ipo"):
            raise Problems(
                [("label_smoothing", f"has no effect with {self.loss_type}; expected sigmoid or robust")]
            )
        if self.loss_type == "robust" and not self.label_smoothing:
            raise Problems(
                [("label_smoothing", "found 0, with which robust is sigmoid; say the share of wrong pairs")]
            )
        return self


class ORPOConfig(ObjectiveConfig):
    """Pairs of answers without a reference: likelihood and odds ratio. Hong et al. 2024, arXiv 2403.07691."""

    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds-ratio term, the paper's λ."""
    nll_over: Literal["sequence", "answer"] = "sequence"
    """What the likelihood term counts of the chosen row: prompt and answer, as TRL, or the answer alone."""


class KTOConfig(ObjectiveConfig):
    """Single answers, each wanted or not. Ethayarajh et al. 2024, arXiv 2402.01306."""

    beta: float = Field(default=0.1, gt=0)
    """How much a log-probability gained over the reference counts; larger stays nearer to the reference."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Of the wanted answers' losses."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Of the unwanted answers' losses. (Number · weight) should be within 1 to 4/3 of the other's, eq. 8."""

    @property
    def has_reference(self) -> bool:
        return True

    def problems(self, recipe: Any) -> Iterator[tuple[str, str]]:
        """One estimate of the divergence a batch, from pairs of its rows."""
        if recipe.micro_batch_tokens and "micro_batch_tokens" in recipe.model_fields_set:
            yield (
                "micro_batch_tokens",
                "has no effect with objective: kto, whose KL term is one a batch; leave it out, or 0",
            )
        if recipe.batch_size == 1:
            yield "batch_size", "found 1; kto estimates its KL term from pairs of rows: expected 2 or more"


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
        """A batch holds whole groups of answers."""
        if recipe.batch_size % self.num_generations:
            yield (
                "batch_size",
                f"found {recipe.batch_size}; it counts answers, {self.num_generations} to a prompt: expected a "
                f"multiple of grpo.num_generations",
            )

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
