"""What a chat template makes of a history: whether calls of tools and their results come to stand in the prompt.

A template that leaves them out would answer something else than was asked, so they are refused there. Asked once of
each template, by rendering a conversation that has both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from serve.errors import RequestError
from serve.model.template import ChatTemplate

CALLED, RESULT = "probedcall", "probedresult"
PROBE: tuple[dict[str, Any], ...] = (
    {"role": "user", "content": "Question"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            # Mistral's templates want nine characters.
            {"id": "probe0001", "type": "function", "function": {"name": CALLED, "arguments": "{}"}}
        ],
    },
    {"role": "tool", "content": RESULT, "tool_call_id": "probe0001", "name": CALLED},
)


class ToolHistory:
    """What templates render. Rendering and decoding go through the tokenizer, as requests do: one at a time."""

    def __init__(self) -> None:
        self._rendered: WeakKeyDictionary[ChatTemplate, str] = WeakKeyDictionary()

    def check(self, template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> None:
        """RequestError if `messages` hold calls or results that the template does not render."""
        if template not in self._rendered:
            self._rendered[template] = _render_probe(template)
        rendered = self._rendered[template]
        for index, message in enumerate(messages):
            if message.get("tool_calls") and CALLED not in rendered:
                raise _not_rendered(f"messages.{index}.tool_calls", "calls of tools")
            if message["role"] == "tool" and RESULT not in rendered:
                raise _not_rendered(f"messages.{index}.role", "results of tools")


def _render_probe(template: ChatTemplate) -> str:
    try:
        return str(template.tokenizer.decode(list(template.render(PROBE))))
    except RequestError:
        return ""


def _not_rendered(name: str, what: str) -> RequestError:
    return RequestError(f"{name}: this model's chat template does not render {what}", "messages")
