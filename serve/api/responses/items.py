"""What the `input` of a response may be made of: OpenAI's items, as clients make them and as we gave them out.

An item that was given out comes back with fields that ask nothing: an id, a status. Clients of agents send them all,
or some, or null.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from serve.api.parts import (
    ImagePart,
    ImageUrlPart,
    InputAudioPart,
    InputImagePart,
    TextPart,
    VideoPart,
    VideoUrlPart,
)
from serve.api.strict import Body, Neutral
from serve.errors import RequestError

TEXT_MEDIA_TYPES = ("text/", "application/json", "application/xml", "application/yaml")
UNREADABLE = "lathe."
"""What `encrypted_content` begins with that we gave out."""


_GIVEN = frozenset(
    {
        *("status", "phase", "created_by", "agent", "caller", "async", "metadata", "success"),
        "internal_chat_message_metadata_passthrough",
    }
)


class _Given(Body):
    """An item, or a part of one, that may have been given out before."""

    hints = _GIVEN | {"id"}


class InputText(_Given):
    """Words."""

    hints = _GIVEN | {"id", "annotations", "logprobs", "prompt_cache_breakpoint"}

    type: Literal["input_text", "output_text"]
    text: str


class Refusal(_Given):
    """Words by which an assistant refused."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The words."""
        return self.refusal


class InputFile(Body):
    """A file, whose content is text and comes with the request."""

    hints = frozenset({"detail", "prompt_cache_breakpoint"})
    neutral: ClassVar[Neutral] = {"file_id": (None,), "file_url": (None,)}

    type: Literal["input_file"]
    file_data: str
    """A data URI, or base64 alone."""
    filename: str | None = None

    @model_validator(mode="after")
    def _is_text(self) -> InputFile:
        _text_of(self.file_data)
        return self

    @property
    def text(self) -> str:
        """Its name and its content."""
        content = _text_of(self.file_data)
        return content if self.filename is None else f"{self.filename}:\n{content}"


def _text_of(data: str) -> str:
    head, comma, rest = data.partition(",")
    kind = head[5:].partition(";")[0] if comma and head.lower().startswith("data:") else ""
    if kind and not kind.lower().startswith(TEXT_MEDIA_TYPES):
        raise RequestError(
            f"file_data: found a file of type {kind!a:.80}; only files of text are read", "file_data"
        )
    try:
        return base64.b64decode(rest if kind or comma else data, validate=True).decode("utf-8-sig")
    except (binascii.Error, ValueError):
        raise RequestError(
            "file_data: found no base64 of UTF-8 text; only files of text are read", "file_data"
        ) from None


Content = Annotated[
    InputText
    | TextPart
    | Refusal
    | InputFile
    | InputImagePart
    | ImageUrlPart
    | ImagePart
    | VideoUrlPart
    | VideoPart
    | InputAudioPart,
    Field(discriminator="type"),
]
Contents = Annotated[list[Content], Field(fail_fast=True)]


class MessageItem(_Given):
    """What somebody said. `type` may be left out."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Contents

    @field_validator("content", mode="before")
    @classmethod
    def _nothing_is_no_words(cls, content: Any) -> Any:
        return "" if content is None else content


class Words(_Given):
    """A piece of a thought."""

    type: Literal["summary_text", "reasoning_text", "text"]
    text: str


class ReasoningItem(_Given):
    """What an assistant thought."""

    type: Literal["reasoning"]
    summary: list[Words] | None = None
    content: list[Words] | None = None
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        """The thought; empty where it is another server's, which alone can read it."""
        told = "\n".join(part.text for part in self.content or ()) or thought_in(self.encrypted_content or "")
        return told or "\n".join(part.text for part in self.summary or ())


def packed_thought(text: str) -> str:
    """A thought as `encrypted_content`: opaque to clients, no secret."""
    return UNREADABLE + base64.urlsafe_b64encode(text.encode()).decode()


def thought_in(packed: str) -> str:
    """The thought in what `packed_thought` gave; empty for what another server did."""
    if not packed.startswith(UNREADABLE):
        return ""
    try:
        return base64.urlsafe_b64decode(packed[len(UNREADABLE) :]).decode()
    except (binascii.Error, ValueError):
        return ""


class _Call(_Given):
    """A call of a tool."""

    call_id: str = Field(min_length=1)

    @property
    def called(self) -> str:
        """The tool's name, as the model knows it."""
        raise NotImplementedError

    @property
    def said(self) -> str | dict[str, Any]:
        """Its arguments, as JSON text or as the object."""
        raise NotImplementedError


class FunctionCallItem(_Call):
    """A call of a function."""

    type: Literal["function_call"]
    name: str = Field(min_length=1)
    namespace: str | None = None
    arguments: str | dict[str, Any]

    @property
    def called(self) -> str:
        return offered_name(self.name, self.namespace)

    @property
    def said(self) -> str | dict[str, Any]:
        return self.arguments


class CustomToolCallItem(_Call):
    """A call of a tool that takes any text."""

    type: Literal["custom_tool_call"]
    name: str = Field(min_length=1)
    namespace: str | None = None
    input: str

    @property
    def called(self) -> str:
        return offered_name(self.name, self.namespace)

    @property
    def said(self) -> dict[str, Any]:
        return {"input": self.input}


class ActionItem(_Call):
    """A call of a tool that OpenAI's own models know: of the shell, or of a patch."""

    hints = _GIVEN | {"id", "environment"}

    type: Literal["local_shell_call", "shell_call", "apply_patch_call"]
    action: dict[str, Any] | None = None
    operation: dict[str, Any] | None = None

    @property
    def called(self) -> str:
        return self.type.removesuffix("_call")

    @property
    def said(self) -> dict[str, Any]:
        return self.action or self.operation or {}


class McpCallItem(_Given):
    """A call of a tool of an MCP server, and what came of it."""

    hints = _GIVEN | {"approval_request_id"}

    type: Literal["mcp_call"]
    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    server_label: str
    arguments: str
    output: str | None = None
    error: Any = None


class HostedCallItem(_Given):
    """A call that OpenAI's server ran, and what came of it, where its client had asked to be told."""

    hints = _GIVEN | {"container_id"}

    type: Literal["code_interpreter_call", "file_search_call"]
    id: str = Field(min_length=1)
    code: str | None = None
    outputs: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    queries: list[str] | None = None
    results: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None

    @property
    def name(self) -> str:
        """The tool's."""
        return self.type.removesuffix("_call")

    @property
    def arguments(self) -> dict[str, Any]:
        """What it was asked."""
        return (
            {"code": self.code or ""}
            if self.type == "code_interpreter_call"
            else {"queries": self.queries or []}
        )

    @property
    def result(self) -> str | None:
        """As JSON; None where nothing is told, so that the call tells a model nothing."""
        found = self.outputs if self.type == "code_interpreter_call" else self.results
        return None if found is None else json.dumps(found, ensure_ascii=False)


class _CallOutput(Body):
    """What came of a call."""

    call_id: str | None = None
    id: str | None = None
    """Of the item; where OpenAI's local shell has no other, that of the call."""

    @model_validator(mode="after")
    def _is_of_a_call(self) -> _CallOutput:
        if not (self.call_id or self.id):
            raise RequestError("call_id: missing; it names the call whose output this is", "call_id")
        return self

    @property
    def of_call(self) -> str:
        """Which call's."""
        return self.call_id or self.id or ""


class CallOutputItem(_CallOutput):
    """Words, or parts of a message."""

    hints = _GIVEN | {"name", "namespace", "tool_name"}

    type: Literal[
        "function_call_output",
        "custom_tool_call_output",
        "local_shell_call_output",
        "apply_patch_call_output",
    ]
    output: str | Contents | None = None


class ShellOutputItem(_CallOutput):
    """What commands wrote, and how they ended."""

    hints = _GIVEN | {"max_output_length"}

    type: Literal["shell_call_output"]
    output: Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class ItemReference(Body):
    """An item of a response that is stored, or of its input."""

    type: Literal["item_reference"] | None = None
    id: str = Field(min_length=1)


class PassedItem(Body):
    """A trace of what other servers do between two answers. It tells a model nothing."""

    type: Literal[
        "web_search_call", "tool_search_call", "tool_search_output", "ghost_snapshot", "mcp_list_tools"
    ]

    @model_validator(mode="before")
    @classmethod
    def _only_its_type_is_read(cls, data: Any) -> Any:
        return {"type": data["type"]} if isinstance(data, dict) and "type" in data else data


class UnreadItem(Body):
    """Any other item."""

    type: str

    @model_validator(mode="before")
    @classmethod
    def _is_refused(cls, data: Any) -> Any:
        found = data.get("type") if isinstance(data, dict) else data
        raise RequestError(f"type: found {found!a:.80}; Lathe reads items of type {', '.join(KINDS)}", "type")


KINDS: dict[str, str] = {
    "message": "message item",
    "reasoning": "reasoning item",
    "function_call": "function_call item",
    "custom_tool_call": "custom_tool_call item",
    "local_shell_call": "action item",
    "shell_call": "action item",
    "apply_patch_call": "action item",
    "mcp_call": "mcp_call item",
    "code_interpreter_call": "hosted_call item",
    "file_search_call": "hosted_call item",
    "function_call_output": "output item",
    "custom_tool_call_output": "output item",
    "local_shell_call_output": "output item",
    "shell_call_output": "shell_output item",
    "apply_patch_call_output": "output item",
    "item_reference": "item_reference item",
    "web_search_call": "passed item",
    "tool_search_call": "passed item",
    "tool_search_output": "passed item",
    "ghost_snapshot": "passed item",
    "mcp_list_tools": "passed item",
}


def _kind(item: Any) -> str:
    """Which of the items it is; a message, or a reference, may do without its type."""
    if isinstance(item, Body):
        return KINDS[getattr(item, "type", None) or "item_reference"]
    kind = item.get("type") if isinstance(item, dict) else ""
    if kind is None:
        return "item_reference item" if "id" in item and "role" not in item else "message item"
    return KINDS.get(kind, "unread item") if isinstance(kind, str) else "unread item"


Item = Annotated[
    Annotated[MessageItem, Tag("message item")]
    | Annotated[ReasoningItem, Tag("reasoning item")]
    | Annotated[FunctionCallItem, Tag("function_call item")]
    | Annotated[CustomToolCallItem, Tag("custom_tool_call item")]
    | Annotated[ActionItem, Tag("action item")]
    | Annotated[McpCallItem, Tag("mcp_call item")]
    | Annotated[HostedCallItem, Tag("hosted_call item")]
    | Annotated[CallOutputItem, Tag("output item")]
    | Annotated[ShellOutputItem, Tag("shell_output item")]
    | Annotated[ItemReference, Tag("item_reference item")]
    | Annotated[PassedItem, Tag("passed item")]
    | Annotated[UnreadItem, Tag("unread item")],
    Discriminator(_kind),
]


def offered_name(name: str, namespace: str | None) -> str:
    """How the model knows a tool: by its namespace's name and its own."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"
