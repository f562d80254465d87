"""POST /v1/responses: what its body may hold, in OpenAI's words, and a chat's extras beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from serve.api.constraints import ObjectFormat, Schema, TextFormat
from serve.api.responses.items import Item
from serve.api.responses.tools import AllowedChoice, Choice, NamedChoice, Toolbox, ToolEntry, toolbox
from serve.api.schemas import MAX_LOGPROBS, TemplatedBody
from serve.api.strict import Body, Neutral
from serve.config import ContextOverflow
from serve.constraints.spec import ConstraintSpec
from serve.errors import RequestError

MAX_PAIRS = 16
MAX_KEY_CHARS = 64
MAX_VALUE_CHARS = 512
"""OpenAI's bounds of `metadata`."""

LOGPROBS = "message.output_text.logprobs"
PACKED_THOUGHTS = "reasoning.encrypted_content"
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""The first two are done; the others are of items that no response here has, or are there in any case."""
_ELSEWHERE = {
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "functions": "tools",
    "function_call": "tool_choice",
    "logprobs": f"include: [{LOGPROBS!r}]",
    "n": "a request for each answer",
}
"""Fields of a chat's body, and what responses have for them."""


class SchemaFormat(Body):
    """JSON of a schema. Answers keep to it whether `strict` is true or not."""

    type: Literal["json_schema"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """What the answer's text must be."""

    format: Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    """A variable of the template; a hint where the template does not read it."""

    @property
    def response_format(self) -> dict[str, Any] | None:
        """As a chat's body has it."""
        if not isinstance(self.format, SchemaFormat):
            return None if self.format is None else self.format.model_dump(by_alias=True, exclude_none=True)
        named = self.format.model_dump(by_alias=True, exclude={"type"}, exclude_none=True)
        return {"type": "json_schema", "json_schema": named}


class Reasoning(Body):
    """How much is thought, and how it is told."""

    hints = frozenset({"context", "mode"})

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """A variable of the template; a hint where the template does not read it."""
    summary: Literal["auto", "concise", "detailed"] | None = None
    """The thoughts are their own summary, word for word."""
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    """The older name of summary."""


class ResponseStreamOptions(Body):
    """How a stream reports."""

    neutral: ClassVar[Neutral] = {"include_obfuscation": (None, False), "include_usage": (None, True, False)}


class ResponsesBody(TemplatedBody):
    """POST /v1/responses."""

    hints = frozenset(
        {
            "client_metadata",
            "guided_decoding_backend",
            "prompt_cache_options",
            "prompt_cache_retention",
            "service_tier",
        }
    )
    neutral: ClassVar[Neutral] = {
        "access_programs": (None,),
        "context_management": (None, []),
        "conversation": (None,),
        "guided_whitespace_pattern": (None,),
        "image": (None,),
        "moderation": (None,),
        "n": (None, 1),
        "prompt": (None,),
        "prompt_logprobs": (None,),
        "structural_tag": (None,),
        **dict.fromkeys(("max_tokens", "response_format"), (None,)),
    }

    input: str | Annotated[list[Item], Field(fail_fast=True)] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    """The response that this one goes on from: what was said before, and what it answered. Not its instructions."""
    max_output_tokens: int | None = Field(None, ge=1)
    max_tool_calls: int | None = Field(None, ge=1)
    """Of tools that run on the server. There is none."""
    tools: Annotated[list[ToolEntry], Field(fail_fast=True)] | None = None
    tool_choice: Choice | AllowedChoice | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[Include] | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    truncation: Literal["auto", "disabled"] | None = None
    """auto: what does not fit the context is left out, the oldest turns first. The server's context_overflow, if left
    out."""
    context_overflow: ContextOverflow | None = None
    """As a chat's, in place of truncation."""
    metadata: dict[str, str] | None = None
    background: bool | None = None
    """True: it is answered at once, made while nobody waits, and asked for later."""
    store: bool | None = None
    """False: the response is known no more once it is sent. True, if left out."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    stream_options: ResponseStreamOptions | None = None  # type: ignore[assignment]

    @model_validator(mode="before")
    @classmethod
    def _is_no_chat(cls, data: Any) -> Any:
        for name in _ELSEWHERE if isinstance(data, dict) else ():
            if data.get(name) is not None and not (name == "n" and data[name] == 1):
                raise RequestError(f"{name}: a field of /v1/chat/completions; send {_ELSEWHERE[name]}", name)
        return data

    @field_validator("metadata")
    @classmethod
    def _pairs_are_few(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        pairs = metadata or {}
        if len(pairs) > MAX_PAIRS:
            raise RequestError(
                f"metadata: found {len(pairs)} pairs; at most {MAX_PAIRS} are kept", "metadata"
            )
        for key, value in pairs.items():
            if len(key) > MAX_KEY_CHARS or len(value) > MAX_VALUE_CHARS:
                raise RequestError(
                    f"metadata: found {key!a:.80} of {len(value)} characters; a name has {MAX_KEY_CHARS} at most, "
                    f"its text {MAX_VALUE_CHARS}",
                    "metadata",
                )
        return metadata

    @model_validator(mode="after")
    def _there_is_something_to_answer(self) -> ResponsesBody:
        if not self.input and not self.instructions and self.previous_response_id is None:
            raise RequestError("input: found none; send a text or a list of items", "input")
        return self

    @model_validator(mode="after")
    def _overflow_is_said_once(self) -> ResponsesBody:
        if self.truncation is not None and self.context_overflow is not None:
            raise RequestError(
                f"context_overflow: found {self.context_overflow}, but truncation is {self.truncation}; send one",
                "context_overflow",
            )
        return self

    @model_validator(mode="after")
    def _tools_can_be_offered(self) -> ResponsesBody:
        _ = self.toolbox
        return self

    @property
    def specs(self) -> Iterator[ConstraintSpec]:
        wanted = self.text.format if self.text is not None else None
        if isinstance(wanted, ObjectFormat):
            yield wanted.spec("text.format")
        if isinstance(wanted, SchemaFormat):
            yield ConstraintSpec.of_schema(wanted.schema_, "text.format.schema")
        yield from super().specs

    @property
    def answer_limit(self) -> int | None:
        return self.max_output_tokens

    @property
    def toolbox(self) -> Toolbox:
        """What the model is offered."""
        return toolbox(self.tools or (), self.tool_choice)

    @property
    def is_kept(self) -> bool:
        """True if the response can be asked for later."""
        return self.store is not False

    @property
    def summarizes(self) -> bool:
        """True if thoughts are told as their summary too."""
        asked = self.reasoning
        return asked is not None and (asked.summary or asked.generate_summary) is not None

    @property
    def packs_thoughts(self) -> bool:
        """True if thoughts are told in `encrypted_content` too, for clients that send nothing else back."""
        return PACKED_THOUGHTS in (self.include or ())

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.top_logprobs or LOGPROBS in (self.include or ()) else None


class InputTokensBody(ResponsesBody):
    """POST /v1/responses/input_tokens: any body of /v1/responses."""

    neutral: ClassVar[Neutral] = {**ResponsesBody.neutral, "personality": (None,)}
