"""TokenRules: everything that a row's tokens and their mask depend on, besides the row and the tokenizer.

What tokenizes is given these and no recipe, so that no key of the recipe that changes tokens can be left out of the
cache's key. Reads the file of a chat template, and the manifest of an adapter to start from; nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from serve.adapters.formats.lineage import Lineage
from serve.errors import ConfigError
from serve.model.template import ChatTemplate
from serve.model.template_rules import TemplateRules
from train.data.inherited import lineage_of_prompts, with_parents
from train.recipe.recipe import Recipe


@dataclass(frozen=True)
class TokenRules:
    """A recipe's keys that tokens depend on, as they stand there, and how its prompts are made."""

    objective: str
    max_seq_length: int
    excess_length_strategy: str
    mask_prompt: bool
    roles_to_train: tuple[str, ...]
    train_on_eos: str
    template: TemplateRules

    @classmethod
    def of(cls, recipe: Recipe, template: TemplateRules) -> TokenRules:
        """Those of a recipe, under the given rules for prompts."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "template"]
        return cls(**{name: getattr(recipe, name) for name in names}, template=template)

    @classmethod
    def of_recipe(cls, recipe: Recipe, today: date) -> TokenRules:
        """Those of a run that begins today. ConfigError if `chat_template` cannot be read."""
        return cls.of(recipe, template_rules(recipe, today))

    @classmethod
    def of_adapter(cls, recipe: Recipe, lineage: Lineage | None) -> TokenRules:
        """Those that an adapter's manifest says: its own template, wherever the recipe's file is now, and its day."""
        special = recipe.special_tokens_in_messages
        if lineage is None:
            return cls.of(recipe, TemplateRules(special))
        day = date.fromisoformat(lineage.template_day) if lineage.template_day else None
        source = lineage.chat_template or None
        return cls.of(recipe, TemplateRules(special, source, lineage.chat_template_kwargs, day))

    def telling(self, variables: Mapping[str, Any]) -> TokenRules:
        """These, with variables for the chat template beside those that it is told already."""
        told = {**self.template.variables, **variables}
        return replace(self, template=replace(self.template, variables=told))

    def as_json(self, template: ChatTemplate) -> dict[str, Any]:
        """For a key: the template by its hash, and the day only where its prompts tell it."""
        own = dataclasses.asdict(self)
        shown = {"source": template.hash, "today": template.day, "variables": template.defaults}
        return {**own, "template": {**own["template"], **shown}}


def template_rules(recipe: Recipe, today: date | None) -> TemplateRules:
    """How a recipe's prompts are made; `today` as TemplateRules has it. ConfigError if its file cannot be read.

    Where the recipe is silent, a warm start goes on with the template of the adapter that it starts from, and a
    drafter with that of the adapter that its teacher answers with.
    """
    own = TemplateRules(
        recipe.special_tokens_in_messages, _source(recipe.chat_template), recipe.chat_template_kwargs, today
    )
    return with_parents(own, lineage_of_prompts(recipe))


def _source(file: str | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"chat_template: no file {file}; expected a file that holds a Jinja chat template"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: {file} cannot be read: {error}") from error
