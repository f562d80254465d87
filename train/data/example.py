"""One row as a person wrote it, a conversation, a text or a pair of answers, and its place. No tokens or template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.data.media import MediaRef

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """Exactly one of `messages`, (`prompt`, `completion`) and `text` is set. `line` is 1-based in `source`.

    A preference pair has the turns before its answers in `messages`, and the two answers in `chosen` and `rejected`.
    """

    source: str
    line: int
    messages: tuple[Message, ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    untrained: tuple[int, ...] = ()
    """Indices of `messages` that are context, whatever their role: never learned from."""
    chosen: tuple[Message, ...] | None = None
    """The answer that is preferred: the turns after those of `messages`."""
    rejected: tuple[Message, ...] | None = None
    """The other answer to the same turns."""
    label: bool | None = None
    """Feedback on one answer: wanted or not. The answer is the last turn of `messages`, or `completion`."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template is told for this row (`chat_template_kwargs`)."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, for a reward to look at."""
    media: tuple[MediaRef, ...] = ()
    """What stands at the media parts (`{"type": "image"}`) of `messages`, in their order; not opened."""

    @property
    def place(self) -> str:
        """`file:line`, as messages name it."""
        return f"{self.source}:{self.line}"

    def as_messages(self) -> tuple[Message, ...] | None:
        """The conversation; prompt and completion are a user's and an assistant's turn. None for text."""
        if self.messages is not None:
            return self.messages
        if self.prompt is None:
            return None
        asked = {"role": "user", "content": self.prompt}
        return (
            (asked,)
            if self.completion is None
            else (asked, {"role": "assistant", "content": self.completion})
        )
