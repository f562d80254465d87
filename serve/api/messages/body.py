"""What the bodies of Anthropic's Messages may hold: their fields, and the engine's extras that ChatBody takes too."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from serve.api.messages.blocks import AnthropicMessage, SystemText
from serve.api.messages.tools import ToolChoice, Tools
from serve.api.schemas import MAX_STOPS, GenerationBody, Label, Strings
from serve.api.strict import Body, Neutral
from serve.errors import RequestError


class Metadata(Body):
    """Of a request."""

    user_id: Label | None = None
    """The unit of an experiment, as OpenAI's `user`."""


class ThinkingConfig(Body):
    """Whether thoughts are wanted. A wish: a model that has no such switch does as it does."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    """adaptive and between_tools: as the model, or the server, does by itself."""
    budget_tokens: int | None = Field(None, ge=0)
    """Tokens of thoughts at most; then their end is forced."""
    display: Literal["summarized", "omitted"] | None = None
    """omitted: thoughts count, and are not told."""


class JsonFormat(Body):
    """JSON of a schema."""

    hints = frozenset({"name", "strict"})

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """What the answer is to be like."""

    hints = frozenset({"task_budget"})

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """A variable of the template; a hint where the template does not read it."""
    format: JsonFormat | None = None


class PromptBody(GenerationBody):
    """What both endpoints share."""

    neutral: ClassVar[Neutral] = {
        "compaction": (None,),
        "container": (None,),
        "fallback_credit_token": (None,),
        "mcp_servers": (None, []),
        "stream_options": (None,),
        "thread": (None,),
    }
    hints = GenerationBody.hints - {"metadata"} | {
        "anthropic_beta",
        "anthropic_version",
        "billing_policy",
        "cache_control",
        "context_management",
        "diagnostics",
        "fallbacks",
        "inference_geo",
        "speed",
        "user_profile_id",
        "workspace_id",
    }

    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True)] = Field(min_length=1)
    system: SystemText | None = None
    n: Literal[1] | None = None
    stop_sequences: Strings | None = None
    thinking: ThinkingConfig | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    metadata: Metadata | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None
    """output_config.format by its older name."""
    mm_processor_kwargs: dict[str, Any] | None = None
    """vLLM's: how pictures are looked at."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables that the template reads."""

    @model_validator(mode="after")
    def _each_thing_is_said_once(self) -> PromptBody:
        if self.stop_sequences is not None and self.stop is not None:
            raise RequestError("stop: found beside stop_sequences; they mean the same, send one", "stop")
        stops = self.stop_sequences or []
        if len(stops) > MAX_STOPS:
            raise RequestError(
                f"stop_sequences: found {len(stops)} strings; at most {MAX_STOPS} are accepted",
                "stop_sequences",
            )
        if not all(stops):
            raise RequestError(
                "stop_sequences: found an empty string, which would end every answer at once",
                "stop_sequences",
            )
        if self.output_format is not None and self.output_config and self.output_config.format is not None:
            raise RequestError(
                "output_format: found beside output_config.format; they mean the same, send one",
                "output_format",
            )
        if self.format is not None and self.constraint is not None:
            raise RequestError(
                f"output_config: found beside {self.constraint.place.partition('.')[0]}; an answer keeps to one of "
                "them",
                "output_config",
            )
        return self

    @property
    def format(self) -> JsonFormat | None:
        """What an answer must be, by either name."""
        return self.output_format or (self.output_config.format if self.output_config else None)

    @property
    def num_logprobs(self) -> int | None:
        return None


class MessagesBody(PromptBody):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=0)
    """0: the prompt is read, for requests that begin as it does, and nothing is answered."""


class CountBody(PromptBody):
    """POST /v1/messages/count_tokens."""
