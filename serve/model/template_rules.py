"""TemplateRules: how messages become prompts, besides what a tokenizer brings; and the one maker of ChatTemplate.

A recipe, a server's configuration or an adapter's manifest says the rules; everything that renders gets its template
here. Knows no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import jinja2
from mlx_lm.tokenizer_utils import TokenizerWrapper

from serve.errors import ConfigError
from serve.model.jinja import compiled
from serve.model.retold import Retold
from serve.model.template import ChatTemplate, SpecialTokens


@dataclass(frozen=True)
class TemplateRules:
    """What a chat template's prompts depend on, besides the tokenizer and the messages."""

    special_tokens_in_messages: SpecialTokens = "words"
    source: str | None = None
    """A Jinja template in place of the tokenizer's own."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the template reads where a request does not say otherwise (`chat_template_kwargs`)."""
    today: date | None = None
    """The day that the template prints; None: the real one, each time."""


def make_template(tokenizer: TokenizerWrapper, rules: TemplateRules = TemplateRules()) -> ChatTemplate:
    """A tokenizer's chat template under these rules.

    ConfigError if the source is no Jinja template, or it reads no variable of a name in `variables`.
    """
    if rules.source is not None:
        _check_source(rules.source)
        tokenizer = Retold(tokenizer, rules.source)
    template = ChatTemplate(
        tokenizer, rules.special_tokens_in_messages, defaults=rules.variables, today=rules.today
    )
    unread = sorted(rules.variables.keys() - template.variables)
    if unread:
        reads = ", ".join(sorted(template.variables)) or "none"
        raise ConfigError(
            f"chat_template_kwargs: found {', '.join(map(repr, unread))}; the chat template reads these variables: "
            f"{reads}"
        )
    return template


def _check_source(source: str) -> None:
    try:
        compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"chat_template: not a Jinja template, line {error.lineno}: {error.message}"
        ) from error
