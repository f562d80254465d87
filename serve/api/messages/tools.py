"""Tools in Anthropic's words → OpenAI's, which ChatBody takes.

Tools that their server runs, or whose schema only their models know, are not offered to the model: an agent lists
them beside its own, and does without.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from serve.api.strict import Body
from serve.errors import RequestError

SEARCHES = "tool_search_tool_"
"""How the types of tools begin that find tools which were kept back."""


class CustomTool(Body):
    """A function that the client runs."""

    hints = frozenset({"allowed_callers", "cache_control", "eager_input_streaming", "input_examples"})

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    """Arguments keep to the schema, by grammar."""
    defer_loading: bool | None = None
    """Kept back until a tool_reference names it."""

    @property
    def for_chat(self) -> dict[str, Any]:
        """As ChatBody takes it."""
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


class OtherTool(BaseModel):
    """One that is known by its type; not offered."""

    type: str
    name: str = ""


def _kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return "custom" if kind in (None, "custom") or not isinstance(kind, str) else "other"


Tool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[OtherTool, Tag("other")], Discriminator(_kind)
]
Tools = Annotated[list[Tool], Field(fail_fast=True)]


class ToolChoice(Body):
    """Whether a tool is to be called, and which."""

    words: ClassVar[dict[str, str]] = {"auto": "auto", "any": "required", "none": "none"}
    """OpenAI's."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


def offered(tools: Sequence[CustomTool | OtherTool], referred: Collection[str]) -> list[CustomTool]:
    """Those that the model is told of.

    referred  names of tools that were kept back and are wanted now; where the search for them is one that their
              server would run, nothing is kept back
    """
    is_searched = any(isinstance(tool, OtherTool) and tool.type.startswith(SEARCHES) for tool in tools)
    return [
        tool
        for tool in tools
        if isinstance(tool, CustomTool) and (not tool.defer_loading or is_searched or tool.name in referred)
    ]


def choice_for_chat(choice: ToolChoice | None, tools: Sequence[CustomTool]) -> dict[str, Any]:
    """The fields of ChatBody that say the same. RequestError where there is no such tool."""
    if choice is None:
        return {}
    if not tools and choice.type in ("any", "tool"):
        raise RequestError(
            f"tool_choice: found type {choice.type!r}, but there is no tool that this server offers to models",
            "tool_choice",
        )
    names = [tool.name for tool in tools]
    if choice.type == "tool" and choice.name not in names:
        raise RequestError(
            f"tool_choice: found name {choice.name!a:.80}; the tools are {', '.join(names[:20])}",
            "tool_choice",
        )
    found: dict[str, Any] = {}
    if choice.type == "tool":
        found["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif tools:
        found["tool_choice"] = choice.words[choice.type]
    if choice.disable_parallel_tool_use and tools:
        found["parallel_tool_calls"] = False
    return found
