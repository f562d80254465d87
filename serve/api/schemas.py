"""What request bodies may hold. Nothing is accepted and ignored: unknown fields are refused by name, and fields of
OpenAI's that Lathe does not do are accepted with their neutral values only."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve.errors import RequestError

MAX_STOPS = 16
MAX_LOGPROBS = 20

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Body(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that exist elsewhere and have no effect here, with the values that ask for no effect."""

    @model_validator(mode="before")
    @classmethod
    def _take_out_neutral_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, allowed in cls.neutral.items():
            if name in data and not any(_same(data[name], value) for value in allowed):
                choices = " or ".join(dict.fromkeys(_json(value) for value in allowed))
                raise RequestError(
                    f"{name}: found {_json(data[name])}; Lathe does not do this, so only {choices} is accepted",
                    name,
                )
        return {name: value for name, value in data.items() if name not in cls.neutral}

    @classmethod
    def closest_field(cls, name: str) -> str | None:
        """A field that `name` may be a misspelling of."""
        close = difflib.get_close_matches(name, [*cls.model_fields, *cls.neutral], n=1, cutoff=0.7)
        return close[0] if close else None


class StreamOptions(Body):
    """How a stream reports."""

    neutral = {"include_obfuscation": (None, False)}

    include_usage: bool | None = None


class GenerationBody(Body):
    """What chat and plain completions share. Null means left out, as everywhere in OpenAI's API."""

    model: str = Field(min_length=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """0 and -1 keep the whole vocabulary."""
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Seed | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """The unit of an experiment: the same user meets the same variant. Without effect on other models."""
    ignore_eos: bool | None = None

    @field_validator("stop")
    @classmethod
    def _stops_are_few_and_not_empty(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MAX_STOPS:
            raise RequestError(f"stop: found {len(stops)} strings; at most {MAX_STOPS} are accepted", "stop")
        if not all(stops):
            raise RequestError("stop: found an empty string, which would end every answer at once", "stop")
        return stop

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: accepted with stream: true only", "stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, however they were written."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage_chunk(self) -> bool:
        """True if a stream is to end with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def answer_limit(self) -> int | None:
        """Tokens at most, if the request says so."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """None: none wanted; k: the token's and those of the k likeliest."""
        raise NotImplementedError


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


_MEDIA_PARTS = {
    "image_url": "images",
    "input_image": "images",
    "input_audio": "audio",
    "video_url": "video",
    "file": "files",
}


class Message(Body):
    """One turn of a chat."""

    neutral = {
        "name": (None,),
        "refusal": (None,),
        "audio": (None,),
        "annotations": (None, []),
        "function_call": (None,),
        "tool_calls": (None, []),
        "tool_call_id": (None,),
    }

    role: Literal["system", "developer", "user", "assistant"]
    """developer is OpenAI's newer word for system, and is rendered as system."""
    content: str | list[TextPart]

    @field_validator("content", mode="before")
    @classmethod
    def _text_only(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in _MEDIA_PARTS:
                raise RequestError(
                    f"messages: found a part of type {kind!r}; {_MEDIA_PARTS[kind]} are not accepted, "
                    "this model reads text only",
                    "messages",
                )
        return content

    def for_template(self) -> dict[str, Any]:
        """As ChatTemplate takes it; it joins text parts itself, in serving as in training."""
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(), "role": role}


_NEUTRAL_GENERATION: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "repetition_penalty": (1, None),
    "logit_bias": (None, {}),
}
_TEMPLATE_ARGUMENTS = ("messages", "tools", "add_generation_prompt", "continue_final_message")


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    neutral = {
        **_NEUTRAL_GENERATION,
        "audio": (None,),
        "function_call": (None, "none"),
        "functions": (None, []),
        "metadata": (None, {}),
        "modalities": (None, ["text"]),
        "moderation": (None,),
        "parallel_tool_calls": (None, True, False),
        "prediction": (None,),
        "prompt_cache_key": (None,),
        "prompt_cache_options": (None,),
        "prompt_cache_retention": (None,),
        "reasoning_effort": (None,),
        "response_format": (None, {"type": "text"}),
        "safety_identifier": (None,),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "tool_choice": (None, "none"),
        "tools": (None, []),
        "verbosity": (None,),
        "web_search_options": (None,),
    }

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables that the template reads; any other is refused by name."""
    add_generation_prompt: bool | None = None
    """Open the assistant's next turn; true, unless the last message is continued."""
    continue_final_message: bool | None = None
    """The answer goes on from the last message, an assistant's, and begins after its words (prefill)."""

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatBody:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestError(
                f"max_completion_tokens: found {self.max_completion_tokens}, but max_tokens is {self.max_tokens}; "
                "they mean the same, send one",
                "max_completion_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: accepted with logprobs: true only", "top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            raise RequestError(
                "continue_final_message: found true, and add_generation_prompt too; an answer goes on from the last "
                "message or begins a turn, send one of them",
                "continue_final_message",
            )
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise RequestError(
                f"continue_final_message: the last message is of role {self.messages[-1].role!r}; expected assistant",
                "continue_final_message",
            )
        taken = [name for name in self.chat_template_kwargs or {} if name in _TEMPLATE_ARGUMENTS]
        if taken:
            raise RequestError(
                f"chat_template_kwargs: {taken[0]} is set by the server; send the template's own variables only",
                "chat_template_kwargs",
            )
        return self

    @property
    def answer_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    neutral = {
        **_NEUTRAL_GENERATION,
        "best_of": (None, 1),
        "echo": (None, False),
        "suffix": (None,),
    }

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("prompt")
    @classmethod
    def _there_is_a_prompt(cls, prompt: Any) -> Any:
        if not prompt or (isinstance(prompt, list) and not all(p or p == 0 for p in prompt)):
            raise RequestError("prompt: found an empty one; there is nothing to continue", "prompt")
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt, text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter, vLLM's fields."""

    neutral = {"lora_int_id": (None,), "is_3d_lora_weight": (None, False), "base_model_name": (None,)}

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter, vLLM's fields."""

    neutral = {"lora_int_id": (None,)}

    lora_name: str


class FeedbackBody(Body):
    """POST /v1/feedback: how one completion turned out."""

    id: str = Field(min_length=1)
    """The completion's id."""
    name: str = Field(min_length=1, max_length=200)
    """What was measured, for example exact_match or thumbs_up."""
    value: float = Field(ge=0, le=1)
    """Comparisons are of means in [0, 1]: scale it."""


def _same(found: Any, allowed: Any) -> bool:
    """Equal, and a boolean only to a boolean (in Python, True == 1)."""
    return bool(found == allowed) and isinstance(found, bool) == isinstance(allowed, bool)


def _json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
