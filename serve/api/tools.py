"""What one chat's tools come to: what its prompt says of them, how its answers are read, and what these must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serve.api.answer import Piece
from serve.api.schemas import ChatBody
from serve.constraints.spec import ConstraintSpec
from serve.engine.request import Event
from serve.model.template import ChatTemplate
from serve.model.thoughts import Thoughts
from serve.runtime import Runtime
from serve.tools.reader import ToolReader
from serve.tools.rules import FALLBACK, ToolMarks
from serve.tools.tool import Tool
from serve.tools.words import told_in_words

HARMONY = "gpt_oss"


@dataclass(frozen=True)
class ToolUse:
    """Of one request."""

    tools: tuple[Tool, ...] = ()
    """That the prompt tells of."""
    readable: tuple[Tool, ...] = ()
    """That answers may call; empty: answers are text."""
    marks: ToolMarks | None = None
    """How calls are written; None: they are not read."""
    is_single: bool = False
    """An answer ends with its first call."""
    constraint: ConstraintSpec | None = None
    """What answers must be, where they must call, or call as a schema says."""

    @property
    def is_read(self) -> bool:
        """Whether calls are told from the text."""
        return self.marks is not None and bool(self.readable)

    @property
    def shown_ids(self) -> frozenset[int]:
        """Special tokens that the answers' text has to show."""
        return self.marks.shown_ids if self.marks is not None and self.is_read else frozenset()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end answers, besides the model's own."""
        return self.marks.stop_ids if self.marks is not None and self.is_read else ()

    def messages(
        self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        """As the template can tell them."""
        format = FALLBACK if self.marks is None else self.marks.format
        return list(told_in_words(template, format, messages, self.tools))

    def for_template(self, template: ChatTemplate) -> list[dict[str, Any]] | None:
        """The tools, where the template tells of them itself."""
        if not self.tools or not template.renders_tools:
            return None
        return [tool.for_template() for tool in self.tools]

    def reader(self) -> RowReader | None:
        """One for each answer."""
        if self.marks is None or not self.is_read:
            return None
        return RowReader(ToolReader(self.marks.format, self.readable, is_single=self.is_single))


NO_TOOLS = ToolUse()


class RowReader:
    """One answer's events as pieces, its calls told from its text."""

    def __init__(self, reader: ToolReader) -> None:
        self._reader = reader

    @property
    def is_over(self) -> bool:
        """Whether the answer has said all that is wanted of it."""
        return self._reader.is_over

    def read(self, event: Event) -> Piece:
        """What an event brought."""
        piece = Piece.of(event)
        text, calls = self._reader.push(event.text)
        if event.finish is not None or self.is_over:
            rest = self._reader.finish(is_cut=event.finish == "length")
            text, calls = text + rest.text, calls + rest.calls
        finish = piece.finish
        if self.is_over or (finish == "stop" and self._reader.num_calls):
            finish = "tool_calls"
        return piece._replace(text=text, calls=calls, finish=finish)


def tools_of(runtime: Runtime, template: ChatTemplate, thoughts: Thoughts | None, body: ChatBody) -> ToolUse:
    """What a body's tools come to under a template. To be called on the tokenizer's thread."""
    tools = body.all_tools
    if not tools and not body.has_tool_history:
        return NO_TOOLS
    marks = runtime.tools.of(template, has_channels=thoughts is not None and thoughts.name == HARMONY)
    may_call = body.callable_tools if body.mode != "none" else ()
    return ToolUse(tools, may_call, marks, is_single=body.calls_one_at_most)
