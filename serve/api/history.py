"""Histories that call tools: refused where the chat template leaves calls or their results out of the prompt.

It would answer something else than was asked. What a template renders was found by `serve/model/forms.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.errors import RequestError
from serve.model.template import ChatTemplate


def check_tools(template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> None:
    """RequestError if `messages` hold calls or results that the template does not render."""
    for index, message in enumerate(messages):
        if message.get("tool_calls") and not template.forms.renders_calls:
            raise _not_rendered(f"messages.{index}.tool_calls", "calls of tools")
        if message["role"] == "tool" and not template.forms.renders_results:
            raise _not_rendered(f"messages.{index}.role", "results of tools")


def _not_rendered(name: str, what: str) -> RequestError:
    return RequestError(f"{name}: this model's chat template does not render {what}", "messages")
