"""May an adapter be served here? What its manifest says of base, tokenizer and template, against what runs."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from functools import cached_property

from serve.adapters.formats.lineage import Lineage
from serve.adapters.versions.source import Outline
from serve.errors import AdapterError, ConfigError
from serve.model.loading import LoadedModel
from serve.model.network import HEAD_NAME
from serve.model.quantization import Quantization
from serve.model.template import ChatTemplate
from serve.model.template_rules import TemplateRules, make_template
from serve.model.vocabulary import vocabulary_hash

logger = logging.getLogger(__name__)

NOT_TOLD = Lineage("", "", "", "", "", "", "")
MOST_TOLD = 5


@dataclass(frozen=True)
class Admitted:
    """An adapter that may be served."""

    notes: tuple[str, ...] = ()
    """What whoever loads it should know."""
    template: ChatTemplate | None = None
    """Its own chat template, or the base's with variables of its own."""


class Admission:
    """The checks of one base."""

    def __init__(self, model: LoadedModel, rules: TemplateRules, *, allow_other_base: bool) -> None:
        """`rules`: of the base's chat template; an adapter's own, and its variables, take their place in them."""
        self._model = model
        self._rules = rules
        self._allow_other_base = allow_other_base

    def check(self, name: str, outline: Outline) -> Admitted:
        """AdapterError where it was made for other weights or token ids, or brings a template that is none."""
        return Admitted(self._notes(name, outline), self.own_template(name, outline.lineage))

    def _notes(self, name: str, outline: Outline) -> tuple[str, ...]:
        """AdapterError where the adapter was made for other weights or token ids. Returns what is to be said of the
        rest: a template matters to chats alone, and a fixed one is a fair reason for another; of tokens that a
        tokenizer adds, most are there to pad."""
        lineage = outline.lineage or NOT_TOLD
        problems: list[str] = []
        if lineage.base_fingerprint not in ("", self._model.fingerprint):
            problems.append(
                f"was trained on other weights than these: its manifest names {lineage.base_model} "
                f"({lineage.base_fingerprint[:19]}…){_packed(lineage)}, this server runs {self._model.name} "
                f"({self._model.fingerprint[:19]}…)"
            )
        if lineage.vocabulary_hash not in ("", self._vocabulary_hash):
            problems.append(
                f"was trained with another tokenizer: the vocabulary in its manifest is "
                f"{lineage.vocabulary_hash[:19]}…, the one of {self._model.name} {self._vocabulary_hash[:19]}…"
            )
        tokens = self._tokens_problem(outline)
        if tokens and any(path.rpartition(".")[2] == HEAD_NAME for path in outline.sizes):
            problems.append(f"adapts the head, and {tokens}: it may say tokens that have no text here")
            tokens = ""
        if problems and not self._allow_other_base:
            lines = "\n  ".join([f"adapter {name!r}:", *problems] if len(problems) > 1 else [])
            raise AdapterError(
                f"{lines or f'adapter {name!r} {problems[0]}'}; start the server with allow_other_base to load it "
                f"all the same"
            )
        notes = [f"adapter {name!r} {problem}" for problem in problems]
        if not lineage.chat_template and lineage.template_hash not in ("", self._template_hash):
            notes.append(
                f"adapter {name!r} was trained with another chat template ({lineage.template_hash[:19]}…) than the "
                f"one here ({self._template_hash[:19]}…): its chats may look otherwise than those it learned from"
            )
        notes += [f"adapter {name!r}: {note}" for note in outline.notes]
        if tokens:
            notes.append(f"adapter {name!r} {tokens}: prompts that hold them are cut into others here")
        for note in notes:
            logger.warning("%s", note)
        return tuple(notes)

    @cached_property
    def _vocabulary_hash(self) -> str:
        return vocabulary_hash(self._model.tokenizer)

    @cached_property
    def _template_hash(self) -> str:
        return make_template(self._model.tokenizer).hash

    def _tokens_problem(self, outline: Outline) -> str:
        """What the tokenizer beside it adds that this one has not, or has by another id; "": nothing."""
        tokenizer = self._model.tokenizer
        added = outline.added_tokens.items()
        foreign = {
            text: token_id for text, token_id in added if tokenizer.convert_tokens_to_ids(text) != token_id
        }
        if not foreign:
            return ""
        listed = ", ".join(
            f"{text!a:.60} ({token_id})" for text, token_id in list(foreign.items())[:MOST_TOLD]
        )
        more = f" and {len(foreign) - MOST_TOLD:,} more" if len(foreign) > MOST_TOLD else ""
        return f"has a tokenizer of its own, with tokens that {self._model.name}'s lacks: {listed}{more}"

    def own_template(self, name: str, lineage: Lineage | None) -> ChatTemplate | None:
        """What its manifest says of chats. AdapterError for a template that is none, or was changed since."""
        if lineage is None or not (lineage.chat_template or lineage.chat_template_kwargs):
            return None
        rules = dataclasses.replace(
            self._rules,
            source=lineage.chat_template or self._rules.source,
            variables={**self._rules.variables, **lineage.chat_template_kwargs},
        )
        try:
            template = make_template(self._model.tokenizer, rules)
        except ConfigError as error:
            raise AdapterError(f"adapter {name!r}: lineage.{error}") from error
        if lineage.chat_template and template.hash != lineage.template_hash:
            raise AdapterError(
                f"adapter {name!r}: its chat template is not the one it was trained with: the text in its manifest "
                f"is {template.hash[:19]}…, template_hash {lineage.template_hash[:19]}…"
            )
        return template


def _packed(lineage: Lineage) -> str:
    if lineage.quantize is None:
        return ""
    how = Quantization(**lineage.quantize)
    return f", packed to {how} as it was loaded (serve it with the same quantize)"
