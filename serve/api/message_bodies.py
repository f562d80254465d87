"""What a turn of a chat may hold, in OpenAI's words: what is said and shown, called, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from serve.api.parts import WORDS, Part, RefusalPart, Shown
from serve.api.strict import Body, Neutral
from serve.errors import RequestError


class FunctionCall(Body):
    """What an assistant called; `arguments` as JSON text, as it came, or as the object it stands for. None at all
    is what some servers say of a tool without parameters, and clients send back what they got."""

    name: str
    arguments: Annotated[
        str | dict[str, Any], BeforeValidator(lambda given: "{}" if given is None else given)
    ]


class ToolCall(Body):
    """A call in an assistant's turn of the history."""

    hints = frozenset({"cache_control", "extra_content", "index", "provider_specific_fields"})

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


_ROLES: Mapping[str, str] = {"developer": "system", "function": "tool"}


class Message(Body):
    """One turn of a chat. The template gets what its turn says: who, what, what was called and what came of it."""

    neutral: ClassVar[Neutral] = {"audio": (None,)}
    hints = frozenset(
        {"annotations", "cache_control", "provider_specific_fields", "reasoning_details", "refusal"}
    )

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    """developer is OpenAI's newer word for system, and is rendered as system; function its older one for tool."""
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    """Text, or pieces of it with pictures, clips and sounds between them. Null: an answer without words (calls, or a
    thought that was cut off), or a tool that gave nothing."""
    name: str | None = None
    """Who speaks. A hint where the template does not read it."""
    reasoning_content: str | None = None
    """What was thought before an answer, sent back. A hint where the template does not read it."""
    reasoning: str | None = None
    """The same by its newer name."""
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    function_call: FunctionCall | None = None
    """OpenAI's older word for tool_calls."""
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something_of_its_role(self) -> Message:
        for name in ("tool_calls", "function_call"):
            if getattr(self, name) and self.role != "assistant":
                raise RequestError(f"{name}: found in a turn of {self.role!r}; an assistant calls", name)
        if self.tool_call_id is not None and self.role != "tool":
            raise RequestError(
                f"tool_call_id: found in a turn of {self.role!r}; a tool answers", "tool_call_id"
            )
        if self.content is None and self.role not in ("assistant", "tool", "function"):
            raise RequestError(
                f"content: found null or none in a turn of {self.role!r}; it is text, or a list of parts",
                "content",
            )
        parts = () if isinstance(self.content, str) else self.content or ()
        if self.role != "assistant" and any(isinstance(part, RefusalPart) for part in parts):
            raise RequestError(
                f"content: found a refusal in a turn of {self.role!r}; an assistant refuses", "content"
            )
        return self

    @property
    def calls(self) -> list[ToolCall]:
        """By whichever word."""
        old = [] if self.function_call is None else [ToolCall(function=self.function_call)]
        return [*(self.tool_calls or ()), *old]

    @property
    def shown(self) -> Iterator[tuple[int, Shown]]:
        """Pictures, clips and sounds, with their numbers among the parts."""
        for number, part in enumerate(() if isinstance(self.content, str) else self.content or ()):
            if not isinstance(part, WORDS):
                yield number, part

    def for_template(self) -> dict[str, Any]:
        """As ChatTemplate takes it: of a picture, a clip or a sound it gets the kind alone."""
        turn = self.model_dump(
            exclude_none=True, exclude={"content", "reasoning", "tool_calls", "function_call"}
        )
        turn["role"] = _ROLES.get(self.role, self.role)
        turn["content"] = self.content if self.content is not None or self.calls else ""
        if isinstance(self.content, list):
            turn["content"] = [
                {"type": "text", "text": part.text} if isinstance(part, WORDS) else {"type": part.kind}
                for part in self.content
            ]
        if self.reasoning is not None and self.reasoning_content is None:
            turn["reasoning_content"] = self.reasoning
        if self.calls:
            turn["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.calls]
        return turn
