"""What bodies say of how tokens are drawn → Sampling. The server's defaults stand where a body says nothing."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from serve.api.strict import Body
from serve.engine.request import Sampling
from serve.errors import RequestError
from serve.model.generation_config import SamplingDefaults

MAX_STOP_TOKEN_IDS = 128
MAX_BIASES = 1024
MAX_BIAS = 100.0

ContextSize = Annotated[int, Field(ge=1)]


class SamplingBody(Body):
    """Fields that say how tokens are drawn. OpenAI's; top_k, min_p, repetition_penalty, min_tokens and stop_token_ids
    are vLLM's, context sizes and XTC mlx-lm's, top_n_sigma mlx-vlm's."""

    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """0 and -1 keep the whole vocabulary, as every number beyond its size does."""
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    """Over prompt and answer."""
    repetition_context_size: ContextSize | None = None
    """Over the last so many tokens of prompt and answer instead; the next two likewise."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Over the answer."""
    presence_context_size: ContextSize | None = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_context_size: ContextSize | None = None
    logit_bias: dict[str, float] | None = None
    """Token id → what is added to its logit, from -100 to 100."""
    min_tokens: int | None = Field(None, ge=0)
    """No end and no stop string before so many tokens."""
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] | None = None
    """Tokens that end the answer; `stop_reason` says which."""
    top_n_sigma: float | None = Field(None, ge=0)
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=0.5)

    @field_validator("logit_bias")
    @classmethod
    def _biases_are_of_token_ids(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        if len(biases or ()) > MAX_BIASES:
            raise RequestError(
                f"logit_bias: found {len(biases or ())} tokens; at most {MAX_BIASES} are accepted",
                "logit_bias",
            )
        for name, bias in (biases or {}).items():
            if not (name.isascii() and name.isdigit()) or len(name) > len(str(2**31)):
                raise RequestError(f"logit_bias: found {name!a:.80}; expected a token id", "logit_bias")
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                raise RequestError(
                    f"logit_bias: found {bias:g} for token {name}; expected a number from -100 to 100",
                    "logit_bias",
                )
        ids = [int(name) for name in biases or ()]
        if len(set(ids)) < len(ids):
            raise RequestError("logit_bias: found a token id twice, in other digits", "logit_bias")
        return biases

    @field_validator("stop_token_ids")
    @classmethod
    def _stop_tokens_are_few(cls, ids: list[int] | None) -> list[int] | None:
        if len(ids or ()) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"stop_token_ids: found {len(ids or ())} ids; at most {MAX_STOP_TOKEN_IDS} are accepted",
                "stop_token_ids",
            )
        return ids

    @model_validator(mode="after")
    def _what_qualifies_stands_beside_it(self) -> SamplingBody:
        for name, of in (
            ("presence_context_size", "presence_penalty"),
            ("frequency_context_size", "frequency_penalty"),
            ("xtc_threshold", "xtc_probability"),
        ):
            if getattr(self, name) is not None and getattr(self, of) is None:
                raise RequestError(f"{name}: accepted beside {of} only", name)
        return self

    def drawing(self, defaults: SamplingDefaults) -> Sampling:
        """How tokens are drawn; when an answer ends is not said yet. RequestError names the field."""
        own = SamplingDefaults(
            self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty
        ).over(defaults)
        if self.repetition_context_size is not None and own.repetition_penalty is None:
            raise RequestError(
                "repetition_context_size: accepted beside repetition_penalty only", "repetition_context_size"
            )
        return Sampling(
            temperature=1.0 if own.temperature is None else own.temperature,
            top_p=1.0 if own.top_p is None else own.top_p,
            top_k=max(own.top_k or 0, 0),
            min_p=own.min_p or 0.0,
            repetition_penalty=1.0 if own.repetition_penalty is None else own.repetition_penalty,
            repetition_context_size=self.repetition_context_size,
            presence_penalty=self.presence_penalty or 0.0,
            presence_context_size=self.presence_context_size,
            frequency_penalty=self.frequency_penalty or 0.0,
            frequency_context_size=self.frequency_context_size,
            logit_bias=tuple((int(name), bias) for name, bias in (self.logit_bias or {}).items()),
            min_tokens=self.min_tokens or 0,
            stop_token_ids=tuple(dict.fromkeys(self.stop_token_ids or ())),
            top_n_sigma=self.top_n_sigma or 0.0,
            xtc_probability=self.xtc_probability or 0.0,
            xtc_threshold=0.1 if self.xtc_threshold is None else self.xtc_threshold,
        )
