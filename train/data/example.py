"""One row as a person wrote it: a conversation or a text, and where it stands. No tokens, no template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """Exactly one of `messages`, (`prompt`, `completion`) and `text` is set. `line` is 1-based in `source`."""

    source: str
    line: int
    messages: tuple[Mapping[str, Any], ...] | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None

    @property
    def place(self) -> str:
        """`file:line`, as messages name it."""
        return f"{self.source}:{self.line}"

    def as_messages(self) -> tuple[Mapping[str, Any], ...] | None:
        """The conversation; prompt and completion are a user's and an assistant's turn. None for text."""
        if self.messages is not None:
            return self.messages
        if self.prompt is None or self.completion is None:
            return None
        return ({"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.completion})
