"""The tools that a response's body lists -> those that the model is offered, as a chat's body says them.

Agents list tools that run on OpenAI's servers beside their own; a model is offered what its client can run:
functions, tools of any text (as functions of one string), and both inside namespaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from serve.api.responses.items import offered_name
from serve.api.strict import Body
from serve.api.tool_bodies import McpEntry
from serve.errors import RequestError

HOSTED = frozenset(
    {
        *(
            "apply_patch",
            "code_interpreter",
            "computer",
            "computer_use",
            "computer_use_preview",
            "file_search",
        ),
        *("image_generation", "local_shell", "programmatic_tool_calling", "shell", "tool_search"),
        *("web_search", "web_search_preview"),
    }
)
"""Tools of OpenAI's servers or of its own models, without what dates their names: listed, and offered to no model."""
ANY_TEXT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
"""Arguments of a tool of any text."""

_HINTS = frozenset({"allowed_callers", "async", "cache_control", "defer_loading", "output_schema"})


class FunctionTool(Body):
    """A function of the client's."""

    hints = _HINTS

    type: Literal["function"]
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomTool(Body):
    """A tool of the client's that takes any text; a grammar of it is told to the model, and not kept to."""

    hints = _HINTS

    type: Literal["custom"]
    name: str = Field(min_length=1)
    description: str | None = None
    format: dict[str, Any] | None = None


class NamespaceTool(Body):
    """Tools of one origin."""

    type: Literal["namespace"]
    name: str = Field(min_length=1)
    description: str | None = None
    tools: list[Annotated[FunctionTool | CustomTool, Field(discriminator="type")]]


class McpTool(McpEntry):
    """The tools of an MCP server that the server's configuration names. They are run here."""

    hints = McpEntry.hints | _HINTS


class OtherTool(Body, extra="allow"):
    """A tool that no client runs."""

    type: str


def _kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return f"{kind} tool" if kind in ("function", "custom", "namespace", "mcp") else "other tool"


ToolEntry = Annotated[
    Annotated[FunctionTool, Tag("function tool")]
    | Annotated[CustomTool, Tag("custom tool")]
    | Annotated[NamespaceTool, Tag("namespace tool")]
    | Annotated[McpTool, Tag("mcp tool")]
    | Annotated[OtherTool, Tag("other tool")],
    Discriminator(_kind),
]
Entry = FunctionTool | CustomTool | NamespaceTool | McpTool | OtherTool
Choice = Literal["auto", "none", "required"]


class NamedChoice(Body, extra="allow"):
    """One tool, by type and name."""

    type: str
    name: str | None = None


class AllowedChoice(Body):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedChoice]


@dataclass(frozen=True)
class Offered:
    """One tool as the model knows it, and what it is to the client."""

    tool: FunctionTool | CustomTool
    place: str
    """Where the body lists it."""
    namespace: str | None = None

    @property
    def name(self) -> str:
        """As the model knows it."""
        return offered_name(self.tool.name, self.namespace)

    @property
    def takes_any_text(self) -> bool:
        """True if its calls are text, and no JSON, to the client."""
        return isinstance(self.tool, CustomTool)

    @property
    def said(self) -> dict[str, Any]:
        """As a chat's body has it."""
        function: dict[str, Any] = {"name": self.name}
        if self.tool.description is not None:
            function["description"] = self.tool.description
        if isinstance(self.tool, CustomTool):
            grammar = (self.tool.format or {}).get("definition")
            if grammar is not None:
                function["description"] = (
                    f"{self.tool.description or ''}\n\nThe input's grammar:\n{grammar}".strip()
                )
            function["parameters"] = ANY_TEXT
        else:
            if self.tool.parameters is not None:
                function["parameters"] = self.tool.parameters
            if self.tool.strict is not None:
                function["strict"] = self.tool.strict
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Toolbox:
    """What a model is offered for one response, and how it is to choose."""

    offered: dict[str, Offered] = field(default_factory=dict)
    """By name, as the model knows it."""
    servers: tuple[McpTool, ...] = ()
    """Whose tools are offered too, and run here."""
    choice: str | dict[str, Any] | None = None
    """As a chat's body has it."""

    @property
    def said(self) -> dict[str, Any]:
        """Fields of a chat's body; none where nothing is offered."""
        if not self.offered and not self.servers:
            return {}
        servers = [each.model_dump(exclude_none=True) for each in self.servers]
        said: dict[str, Any] = {"tools": [*(each.said for each in self.offered.values()), *servers]}
        return said if self.choice is None else {**said, "tool_choice": self.choice}


def toolbox(
    tools: Sequence[Entry],
    choice: Choice | AllowedChoice | NamedChoice | None,
) -> Toolbox:
    """RequestError names the tool, or the choice, that cannot be."""
    offered: dict[str, Offered] = {}
    servers = tuple(tool for tool in tools if isinstance(tool, McpTool))
    for each in _offered(tools):
        if each.name in offered:
            raise RequestError(
                f"{each.place}.name: found {each.name!a:.80} twice; names tell tools apart", "tools"
            )
        offered[each.name] = each
    if isinstance(choice, AllowedChoice):
        named = [
            _function(_chosen(one, offered, f"tool_choice.tools.{number}"))
            for number, one in enumerate(choice.tools)
            if not _is_hosted(one.type)
        ]
        allowed = {"type": "allowed_tools", "allowed_tools": {"mode": choice.mode, "tools": named}}
        return Toolbox(offered, servers, allowed if named else "none")
    if isinstance(choice, NamedChoice):
        if choice.type == "mcp" and choice.name is not None and servers:
            return Toolbox(offered, servers, _function(choice.name))
        return Toolbox(offered, servers, _function(_chosen(choice, offered, "tool_choice")))
    if choice == "required" and not offered and not servers:
        raise RequestError("tool_choice: found required, but no tool is offered to the model", "tool_choice")
    return Toolbox(offered, servers, choice)


def _offered(tools: Sequence[Entry]) -> Iterator[Offered]:
    for number, tool in enumerate(tools):
        place = f"tools.{number}"
        if isinstance(tool, NamespaceTool):
            for inner, each in enumerate(tool.tools):
                yield Offered(each, f"{place}.tools.{inner}", tool.name)
        elif isinstance(tool, FunctionTool | CustomTool):
            yield Offered(tool, place)
        elif not isinstance(tool, McpTool) and not _is_hosted(tool.type):
            raise RequestError(
                f"{place}.type: found {tool.type!a:.80}; expected function, custom, namespace or mcp, or one of "
                f"OpenAI's own tools, which no model is offered here: {', '.join(sorted(HOSTED))}",
                "tools",
            )


def _function(name: str) -> dict[str, Any]:
    """A choice, as a chat's body has it."""
    return {"type": "function", "function": {"name": name}}


def _is_hosted(kind: str) -> bool:
    """Names may end with a date: web_search_preview_2025_03_11."""
    return any(kind == name or kind.startswith(f"{name}_20") for name in HOSTED)


def _chosen(choice: NamedChoice, offered: dict[str, Offered], place: str) -> str:
    for name, each in offered.items():
        if choice.name in (name, each.tool.name) and choice.type == each.tool.type:
            return name
    found = choice.type if choice.name is None else f"{choice.type} {choice.name}"
    there = ", ".join(offered) or "none"
    raise RequestError(f"{place}: found {found!a:.120}; the model is offered {there}", "tool_choice")
