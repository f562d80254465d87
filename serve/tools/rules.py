"""Which way to write calls a model has: by its template and vocabulary, or by name. Knows no messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve.errors import ConfigError
from serve.tools.format import ToolFormat
from serve.tools.formats import AUTO, FORMATS, NAMES, NONE, named
from serve.tools.parsers import Theirs

if TYPE_CHECKING:
    from serve.model.template import ChatTemplate

FALLBACK = FORMATS["hermes"]
"""Of a model whose template knows no tools, and is told of them in words."""
HARMONY = FORMATS["gpt_oss"]


@dataclass(frozen=True)
class ToolMarks:
    """How answers of one model, under one template, hold calls."""

    format: ToolFormat
    shown_ids: frozenset[int]
    """Special tokens that an answer's text has to show."""
    stop_ids: tuple[int, ...]
    """Tokens after which a tool's answer is due."""
    special: Mapping[str, int]
    """Those of the format's marks that are special tokens."""


class ToolRules:
    """Finds the format of one base model, under the template of whoever answers. `parser`: whose; auto: by the
    template, then by the vocabulary; none: calls stay text."""

    def __init__(self, tokenizer: Any, parser: str = AUTO) -> None:
        """`tokenizer`: mlx_lm's TokenizerWrapper. ConfigError for a name that nobody has."""
        if parser not in NAMES:
            raise ConfigError(f"tool_call_parser: found {parser!r}; expected one of {', '.join(NAMES)}")
        self._parser = parser
        self._vocabulary: Mapping[str, int] = tokenizer.get_vocab()
        self._added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self._found: dict[str, ToolMarks | None] = {}
        told = getattr(getattr(tokenizer, "_tokenizer", tokenizer), "init_kwargs", {})
        self._told: str | None = told.get("tool_parser_type")
        """What a checkpoint says of itself, as mlx-lm has it."""

    def of(self, template: ChatTemplate, *, has_channels: bool) -> ToolMarks | None:
        """The marks under this template; None: calls are not read. To be called when it is the tokenizer's turn.

        has_channels  answers are read by gpt-oss's headers, which calls of its stand in
        """
        key = f"{template.hash}{has_channels}"
        if key not in self._found:
            self._found[key] = self._make(template, has_channels)
        return self._found[key]

    def _make(self, template: ChatTemplate, has_channels: bool) -> ToolMarks | None:
        if self._parser == NONE:
            return None
        format = named(self._parser) if self._parser != AUTO else self._told_by(template)
        if format is HARMONY and not has_channels:
            return None
        for whole in format.wholes:
            if isinstance(whole.parse, Theirs):
                whole.parse.parse  # noqa: B018 - imported before the first answer needs it
        special = {
            token.content: int(number)
            for number, token in self._added.items()
            if token.special and any(token.content in text for text in format.texts)
        }
        # Of gpt-oss the marks are in headers, which are told as text where they name a tool.
        shown = frozenset() if format is HARMONY else frozenset(special.values())
        stops = tuple(self._vocabulary[text] for text in format.end_tokens if text in self._vocabulary)
        return ToolMarks(format, shown, stops, special)

    def _told_by(self, template: ChatTemplate) -> ToolFormat:
        source = template.source
        for format in FORMATS.values():
            if any(all(sign in source for sign in signs) for signs in format.signs):
                return format
        if self._told in NAMES:
            return named(str(self._told))
        if template.renders_tools:
            for format in FORMATS.values():
                if format.vocabulary and all(token in self._vocabulary for token in format.vocabulary):
                    return format
        return FALLBACK
