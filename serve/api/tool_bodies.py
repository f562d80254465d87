"""What a chat's body says of tools: OpenAI's `tools`, `tool_choice`, `parallel_tool_calls`, and the older `functions`
and `function_call`, which are read as the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from serve.api.strict import Body, Neutral
from serve.errors import RequestError
from serve.tools.tool import Tool

MAX_TOOLS = 1024
MAX_NAME_CHARS = 256

Strings = Annotated[list[str], Field(fail_fast=True, max_length=MAX_TOOLS)]
FunctionName = Annotated[
    str, Field(min_length=1, max_length=MAX_NAME_CHARS, pattern=r"^[^\s\x00-\x1f<>{}\"'`|]+$")
]
"""What can stand between any family's marks. OpenAI takes 64 letters, digits, `_` and `-`."""


class FunctionTool(Body):
    """A function, and the schema of its arguments."""

    hints = frozenset({"cache_control"})

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def tool(self) -> Tool:
        """As readers and templates take it."""
        return Tool(self.name, self.description, self.parameters, bool(self.strict))


class ToolBody(Body):
    """An entry of `tools`."""

    hints = frozenset({"cache_control"})

    type: Literal["function"]
    function: FunctionTool


class AllowedMcpTools(Body):
    """Some of a server's tools, by their names."""

    tool_names: Strings


class McpEntry(Body):
    """OpenAI's entry of `tools` for an MCP server, which here is one that the server's configuration names: never an
    address or a command of the request's."""

    neutral: ClassVar[Neutral] = {
        "authorization": (None,),
        "connector_id": (None,),
        "headers": (None, {}),
        "require_approval": (None, "never"),
        "server_url": (None,),
    }
    hints = frozenset({"server_description"})

    type: Literal["mcp"]
    server_label: str = Field(min_length=1, max_length=MAX_NAME_CHARS)
    allowed_tools: Strings | AllowedMcpTools | None = None
    """All of them, if left out."""

    @property
    def allowed(self) -> Sequence[str] | None:
        """Names of the tools that may be called; None: all."""
        names = self.allowed_tools
        return names.tool_names if isinstance(names, AllowedMcpTools) else names


Entry = Annotated[ToolBody | McpEntry, Field(discriminator="type")]


class ChosenFunction(Body):
    """A function by its name."""

    name: str


class NamedChoice(Body):
    """This function is to be called."""

    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(Body):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(Body):
    """Only these are to be called."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice
Mode = Literal["none", "auto", "required"]


class ToolsBody(Body):
    """The fields of tools."""

    tools: Annotated[list[Entry], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    """auto, if left out: answers call what they like. none: the tools are told of, and not called."""
    parallel_tool_calls: bool | None = None
    """False: an answer calls one function at most."""
    functions: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    """OpenAI's older word for tools; answers are worded as it was then."""
    function_call: Literal["none", "auto"] | ChosenFunction | None = None
    """The same of tool_choice."""

    @property
    def uses_functions(self) -> bool:
        """Whether the older words are used."""
        return bool(self.functions)

    @property
    def mcp(self) -> list[McpEntry]:
        """Servers whose tools are to be run here."""
        return [entry for entry in self.tools or () if isinstance(entry, McpEntry)]

    @property
    def all_tools(self) -> tuple[Tool, ...]:
        """The client's, by whichever word."""
        entries = [entry.function for entry in self.tools or () if isinstance(entry, ToolBody)]
        return tuple(each.tool for each in self.functions or entries)

    @property
    def mode(self) -> Mode:
        """Whether the answer may, must or may not call."""
        choice = self.tool_choice
        if isinstance(choice, AllowedChoice):
            return choice.allowed_tools.mode
        if isinstance(choice, NamedChoice) or isinstance(self.function_call, ChosenFunction):
            return "required"
        return choice or (self.function_call if isinstance(self.function_call, str) else None) or "auto"

    @property
    def chosen(self) -> Sequence[str] | None:
        """Names of the functions that may be called; None: all."""
        if isinstance(self.tool_choice, AllowedChoice):
            return [each.function.name for each in self.tool_choice.allowed_tools.tools]
        if isinstance(self.tool_choice, NamedChoice):
            return [self.tool_choice.function.name]
        return [self.function_call.name] if isinstance(self.function_call, ChosenFunction) else None

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        """Those that the answer may call."""
        chosen = self.chosen
        return tuple(tool for tool in self.all_tools if chosen is None or tool.name in chosen)

    @property
    def calls_one_at_most(self) -> bool:
        """Whether a second call is not wanted."""
        return self.parallel_tool_calls is False or self.uses_functions

    @field_validator("tools", "functions")
    @classmethod
    def _names_are_different(cls, value: list[Any] | None) -> list[Any] | None:
        entries = [each for each in value or () if not isinstance(each, McpEntry)]
        names = [each.function.name if isinstance(each, ToolBody) else each.name for each in entries]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise RequestError(
                f"tools: found {twice[0]!r} twice; a call would not say which is meant", "tools"
            )
        return value

    @model_validator(mode="after")
    def _choices_are_among_the_tools(self) -> ToolsBody:
        for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
            if getattr(self, old) and getattr(self, new):
                raise RequestError(f"{old}: found beside {new}; they mean the same, send one", old)
        if not self.mcp:  # else it shows when the servers have said what they offer
            self.check_choice()
        return self

    def check_choice(self) -> None:
        """RequestError where a choice is none of the tools."""
        name = "function_call" if self.function_call is not None else "tool_choice"
        known = [tool.name for tool in self.all_tools]
        if self.mode == "required" and not known:
            raise RequestError(f"{name}: found without tools; there is nothing to call", name)
        unknown = next((each for each in self.chosen or () if each not in known), None)
        if unknown is not None:
            raise RequestError(
                f"{name}: found {unknown!r:.200}, which is none of the tools: {', '.join(known)[:400]}", name
            )
