"""What a message's content may be made of, in Anthropic's words. Nothing is fetched or decoded here.

What only their server can read or do (files, PDFs, compaction) is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from serve.api.messages.hosted import HostedResultBlock, HostedUseBlock
from serve.api.strict import Body, Neutral
from serve.errors import RequestError

HINTS = frozenset({"cache_control"})
UNCITED: Neutral = {"citations": (None, {"enabled": False})}
"""Answers cite nothing."""


class TextBlock(Body):
    """Words."""

    hints = HINTS | {"citations"}

    type: Literal["text"]
    text: str


class Base64Source(Body):
    """A picture that comes along."""

    type: Literal["base64"]
    media_type: str = Field(pattern=r"^image/[a-z0-9.+-]{1,40}$")
    data: str = Field(min_length=1)

    @property
    def address(self) -> str:
        """As a data URI."""
        return f"data:{self.media_type};base64,{self.data}"


class UrlSource(Body):
    """A picture that is elsewhere."""

    type: Literal["url"]
    url: str = Field(min_length=1)

    @property
    def address(self) -> str:
        """Where."""
        return self.url


class ImageBlock(Body):
    """A picture."""

    hints = HINTS
    neutral: ClassVar[Neutral] = {"transformations": (None, {}, {"oversized_image": "downsize"})}

    type: Literal["image"]
    source: Annotated[Base64Source | UrlSource, Field(discriminator="type")]


class PlainSource(Body):
    """A document's text."""

    hints = frozenset({"media_type"})

    type: Literal["text"]
    data: str

    @property
    def parts(self) -> Sequence[Any]:
        """Its content as blocks."""
        return [TextBlock(type="text", text=self.data)]


class ContentSource(Body):
    """A document that was cut into blocks."""

    type: Literal["content"]
    content: str | list[Annotated[TextBlock | ImageBlock, Field(discriminator="type")]]

    @property
    def parts(self) -> Sequence[Any]:
        """Its content as blocks."""
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class DocumentBlock(Body):
    """A text with a title."""

    hints = HINTS
    neutral = UNCITED

    type: Literal["document"]
    source: Annotated[PlainSource | ContentSource, Field(discriminator="type")]
    title: str | None = None
    context: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        source = data.get("source") if isinstance(data, dict) else None
        source = source if isinstance(source, dict) else {}
        kind = source.get("type")
        if kind in ("base64", "url", "file"):
            what = source.get("media_type") if kind == "base64" else f"a source of type {kind!r}"
            raise RequestError(
                f"source: found {what!s:.80}; of documents this server reads text, in a source of type 'text' or "
                "'content': send a PDF's text, or its pages as images",
                "source",
            )
        return data


class SearchResultBlock(Body):
    """A passage that was found, and where."""

    hints = HINTS
    neutral = UNCITED

    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]


class ToolReferenceBlock(Body):
    """A tool of the request's that was kept back until now."""

    hints = HINTS

    type: Literal["tool_reference"]
    tool_name: str


ResultPart = Annotated[
    TextBlock | ImageBlock | DocumentBlock | SearchResultBlock | ToolReferenceBlock,
    Field(discriminator="type"),
]


class ToolResultBlock(Body):
    """What came of a call."""

    hints = HINTS | {"toolset_name"}

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Annotated[list[ResultPart], Field(fail_fast=True)] | None = None
    is_error: bool | None = None

    @property
    def parts(self) -> Sequence[Any]:
        """Its content as parts."""
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content or []


class ToolUseBlock(Body):
    """A call."""

    hints = HINTS | {"caller", "toolset_name"}

    type: Literal["tool_use"]
    id: str
    name: str
    input: Annotated[dict[str, Any], BeforeValidator(lambda given: {} if given is None else given)]


class ThinkingBlock(Body):
    """What was thought before an answer, sent back."""

    hints = HINTS | {"signature"}

    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Body):
    """What was thought elsewhere, and nobody here can read."""

    hints = HINTS | {"data"}

    type: Literal["redacted_thinking"]


Block = Annotated[
    TextBlock
    | ImageBlock
    | DocumentBlock
    | SearchResultBlock
    | ToolResultBlock
    | ToolUseBlock
    | HostedUseBlock
    | HostedResultBlock
    | ThinkingBlock
    | RedactedThinkingBlock,
    Field(discriminator="type"),
]
Blocks = Annotated[list[Block], Field(fail_fast=True)]
HOSTED = tuple(get_args(HostedUseBlock.model_fields["type"].annotation)) + tuple(
    get_args(HostedResultBlock.model_fields["type"].annotation)
)
SystemText = str | Annotated[list[TextBlock], Field(fail_fast=True)]


class AnthropicMessage(Body):
    """One turn."""

    hints = frozenset({"output_config"})
    of_role: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "user": ("text", "image", "document", "search_result", "tool_result"),
        "assistant": ("text", "thinking", "redacted_thinking", "tool_use", *HOSTED),
        "system": ("text",),
    }
    """Types of blocks."""

    role: Literal["user", "assistant", "system"]
    """system: what the client wants said from there on; it may stand anywhere."""
    content: str | Blocks | None = None
    clear_at: Literal["next_user_message", "never"] | None = None
    """When what the system says is over."""

    @model_validator(mode="after")
    def _has_the_blocks_of_its_role(self) -> AnthropicMessage:
        if self.content is None and self.role != "system":
            raise RequestError("content: found null or none; it is text, or a list of blocks", "content")
        if self.clear_at is not None and self.role != "system":
            raise RequestError(f"clear_at: found in a turn of {self.role!r}", "clear_at")
        for number, block in enumerate(self.blocks):
            allowed = self.of_role[self.role]
            if block.type not in allowed:
                raise RequestError(
                    f"content.{number}: found a block of type {block.type!r} in a turn of {self.role!r}, which holds "
                    f"blocks of type {', '.join(allowed)}",
                    "content",
                )
        return self

    @property
    def blocks(self) -> Sequence[Any]:
        """Its content as blocks."""
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content or []
