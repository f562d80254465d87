"""A tokenizer's chat template, whichever kind it is: the variables a caller may set, and prompts as text.

Most are Jinja, one or several by name (`tool_use`); mlx-lm brings some as functions, and some tokenizers their own
method. It changes no message but for what transformers changes: null values go, and thoughts stand under two names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any, Protocol

import jinja2
from transformers import PreTrainedTokenizerBase

from serve.model.jinja import JinjaTemplate, compiled
from serve.model.retold import Retold

Message = Mapping[str, Any]
_BASE_METHOD = PreTrainedTokenizerBase.apply_chat_template
_SET_HERE = {"messages", *inspect.signature(_BASE_METHOD).parameters} - {"documents"}
"""What no caller sets, whatever a template reads; special tokens come to it."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""A message's thoughts; templates read the first or the second."""
_PART_OF_THOUGHT = re.compile(r"==\s*(['\"])thinking\1")
"""How Mistral's templates find thoughts: as parts of the content."""


class Renderer(Protocol):
    """One chat template."""

    variables: frozenset[str]
    """What it reads besides what is set here, and a caller may set."""
    reads_clock: bool
    """Whether it may print the day."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        limit_s: float | None,
        marks: tuple[str, str] | None = None,
    ) -> str:
        """The prompt. TooSlowError, and whatever the template raises. `marks` as JinjaTemplate.render takes them."""


def renderer_of(tokenizer: Any, today: date | None = None) -> Renderer | None:
    """The chat template of mlx_lm's TokenizerWrapper; None if it has none. `today`: see JinjaTemplate.render."""
    if not tokenizer.has_chat_template:
        return None
    inner = tokenizer._tokenizer
    is_plain = tokenizer._chat_template is None and type(inner).apply_chat_template is _BASE_METHOD
    return _Jinja(tokenizer, today) if is_plain or isinstance(tokenizer, Retold) else _Foreign(tokenizer)


class _Jinja:
    """Jinja templates of a tokenizer, by name; transformers' rule says which one a request meets."""

    def __init__(self, tokenizer: Any, today: date | None) -> None:
        self._tokenizer = tokenizer
        self._today = today
        self.variables = _variables(tokenizer)
        self.reads_clock = any(template.reads_clock for template in _templates(tokenizer))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        limit_s: float | None,
        marks: tuple[str, str] | None = None,
    ) -> str:
        source = self._tokenizer.get_chat_template(None, tools)
        in_parts = _PART_OF_THOUGHT.search(source) is not None and "reasoning_content" not in source
        set_here = {
            "messages": [_as_read(message, in_parts=in_parts) for message in messages],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        defaults = {
            **self._tokenizer.special_tokens_map,
            "documents": None,
            "enable_thinking": self._tokenizer.has_thinking,
        }
        said = {**defaults, **variables, **set_here}
        return compiled(source).render(said, limit_s, marks, self._today)


class _Foreign:
    """A template written in Python. Its time is bounded by its input alone."""

    reads_clock = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        function = tokenizer._chat_template or type(tokenizer._tokenizer).apply_chat_template
        parameters = inspect.signature(function).parameters.values()
        named = {p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD} - _SET_HERE
        self.variables = frozenset(named | {tokenizer._thinking_kwarg}) | _variables(tokenizer)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        limit_s: float | None,
        marks: tuple[str, str] | None = None,
    ) -> str:
        text = self._tokenizer.apply_chat_template(
            list(messages),
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **variables,
        )
        return str(text)


def _templates(tokenizer: Any) -> Iterator[JinjaTemplate]:
    """All Jinja templates of a tokenizer; a text that is none is refused when it is rendered."""
    templates = tokenizer.chat_template
    for source in templates.values() if isinstance(templates, Mapping) else filter(None, [templates]):
        try:
            yield compiled(source)
        except jinja2.TemplateSyntaxError:
            continue


def _variables(tokenizer: Any) -> frozenset[str]:
    read: set[str] = set()
    for template in _templates(tokenizer):
        read |= template.variables
    return frozenset(
        read - _SET_HERE - set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES) - set(tokenizer.special_tokens_map)
    )


def _as_read(message: Message, *, in_parts: bool = False) -> dict[str, Any]:
    """in_parts: thoughts are a part of the content, the first."""
    said = {key: value for key, value in message.items() if value is not None}
    thoughts = next((said[name] for name in _REASONING if name in said), None)
    if thoughts is None:
        return said
    if in_parts:
        content = said.get("content") or ""
        words = [{"type": "text", "text": content}] if isinstance(content, str) else content
        said["content"] = [{"type": "thinking", "thinking": thoughts}, *words]
    return {"thinking": thoughts, **said, "reasoning_content": thoughts}
