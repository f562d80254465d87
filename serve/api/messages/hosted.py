"""Calls that Anthropic's server ran in the midst of an answer, and what came of them, in a history that is sent here.

Whoever searched the web there and goes on here sends both back. They are told as any call and its result are; what
only that server can read, and what is no text, is left out of a result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from serve.api.strict import Body

HINTS = frozenset({"cache_control", "caller"})
SECRET = "encrypted_"
"""How the names of fields begin that are for their server alone."""


class HostedUseBlock(Body):
    """A call of a tool of that server's, or of an MCP server beside it."""

    hints = HINTS | {"server_name"}

    type: Literal["server_tool_use", "mcp_tool_use"]
    id: str
    name: str
    input: Annotated[dict[str, Any], BeforeValidator(lambda given: {} if given is None else given)]


class HostedResultBlock(Body):
    """What came of it."""

    hints = HINTS

    type: Literal[
        "advisor_tool_result",
        "bash_code_execution_tool_result",
        "code_execution_tool_result",
        "mcp_tool_result",
        "text_editor_code_execution_tool_result",
        "tool_search_tool_result",
        "web_fetch_tool_result",
        "web_search_tool_result",
    ]
    tool_use_id: str
    content: str | dict[str, Any] | list[dict[str, Any]] | None = None
    is_error: bool | None = None

    @property
    def text(self) -> str:
        """What of it can be read here: texts as they are, all else as JSON."""
        found = self.content or ""
        parts = found if isinstance(found, list) else [found]
        texts = [part if isinstance(part, str) else _text(part) for part in parts]
        if None not in texts:
            return "\n\n".join(text for text in texts if text)
        return json.dumps(_readable(found), ensure_ascii=False)


def _text(part: Mapping[str, Any]) -> str | None:
    """The words of a part that is nothing else."""
    text = part.get("text")
    return text if part.get("type") == "text" and isinstance(text, str) else None


def _readable(value: Any) -> Any:
    if isinstance(value, Mapping):
        is_packed = value.get("type") == "base64"
        return {
            name: _readable(inner)
            for name, inner in value.items()
            if inner is not None and not name.startswith(SECRET) and not (is_packed and name == "data")
        }
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_readable(inner) for inner in value]
    return value
