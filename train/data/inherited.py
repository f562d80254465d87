"""What a warm start takes over from the adapter it begins with: chat template, its variables, end tokens; and what a
drafter takes over from the adapter that its teacher answers with, which comes first.

Where the recipe says something itself, that holds, and a person is told by name where the two differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serve.adapters.formats.config import AdapterConfig
from serve.adapters.formats.files import read_adapter
from serve.adapters.formats.lineage import Lineage
from serve.adapters.formats.manifest import CONFIG_FILE, TENSORS_FILE, read_config
from serve.errors import NotFoundError
from serve.model.template import ChatTemplate
from serve.model.template_rules import TemplateRules
from serve.model.vocabulary import vocabulary_hash
from train.recipe.recipe import Recipe


@dataclass(frozen=True)
class Inherited:
    """What a run takes over besides weights, and what a person is told of it."""

    stop_ids: tuple[int, ...] = ()
    """Tokens at which the parent's answers end, so that this run's do too."""
    lines: tuple[str, ...] = ()
    """What was taken over, in one line; nothing where there was nothing."""
    warnings: tuple[str, ...] = ()
    """Where the recipe differs from what the parent was trained with."""


def config_of(path: Path) -> AdapterConfig | None:
    """The manifest of an adapter's folder, or beside its file of tensors; None where there is none."""
    if not path.is_dir() and path.name != TENSORS_FILE:
        return None
    folder = path if path.is_dir() else path.parent
    return read_config(folder) if (folder / CONFIG_FILE).exists() else None


def lineage_of_parent(recipe: Recipe) -> Lineage | None:
    """Of the adapter that `resume_adapter_file` names; None without one, or where it does not say."""
    config = config_of(Path(recipe.resume_adapter_file)) if recipe.resume_adapter_file else None
    return config.lineage if config else None


def lineage_of_teacher(recipe: Recipe) -> Lineage | None:
    """Of the adapter that a teacher answers with; None without one, or where it does not say. NotFoundError where
    there is no adapter."""
    teacher = recipe.block.teacher if recipe.block is not None else None
    if teacher is None or teacher[1] is None:
        return None
    try:
        return read_adapter(Path(teacher[1])).config.lineage
    except NotFoundError as error:
        raise NotFoundError(f"{recipe.objective}.teacher_adapter_path: {error}") from None


def lineage_of_prompts(recipe: Recipe) -> Lineage | None:
    """Of the adapter whose prompts this run's go on with: the teacher's, or else the one that the run starts from."""
    has_teacher = recipe.block is not None and recipe.block.teacher is not None
    return lineage_of_teacher(recipe) if has_teacher else lineage_of_parent(recipe)


def with_parents(own: TemplateRules, parent: Lineage | None) -> TemplateRules:
    """A recipe's rules for prompts, with the parent's where the recipe is silent.

    A template and its variables go together: under another template of the recipe's, none of the parent's is set.
    """
    if parent is None or own.source not in (None, parent.chat_template):
        return own
    variables = {**parent.chat_template_kwargs, **own.variables}
    return replace(own, source=parent.chat_template or None, variables=variables)


def inherited(recipe: Recipe, parent: Lineage | None, template: ChatTemplate) -> Inherited:
    """What of the parent holds on under the run's template, and where the recipe has it otherwise."""
    taught = lineage_of_teacher(recipe)
    if recipe.block is not None and recipe.block.teacher is not None:
        return Inherited(taught.stop_ids if taught else ())
    if parent is None:
        return Inherited()
    is_same = parent.template_hash in ("", template.hash)
    knows_ids = parent.vocabulary_hash in ("", vocabulary_hash(template.tokenizer))
    stop_ids = parent.stop_ids if is_same and knows_ids else ()
    names = ", ".join(map(str, template.tokenizer.convert_ids_to_tokens(list(stop_ids))))
    silent = {
        "its chat_template": is_same and bool(parent.chat_template) and recipe.chat_template is None,
        f"chat_template_kwargs {_shown(_silent(recipe, parent))}": is_same and bool(_silent(recipe, parent)),
        f"stop ids {names}": bool(stop_ids),
    }
    taken = ", ".join(name for name, holds in silent.items() if holds)
    lines = (f"taken over from {recipe.resume_adapter_file}: {taken}",) if taken else ()
    return Inherited(stop_ids, lines, tuple(_warnings(recipe, parent, is_same, knows_ids)))


def _silent(recipe: Recipe, parent: Lineage) -> dict[str, Any]:
    """The parent's variables that the recipe says nothing of."""
    own = recipe.chat_template_kwargs
    return {name: value for name, value in parent.chat_template_kwargs.items() if name not in own}


def _warnings(recipe: Recipe, parent: Lineage, is_same: bool, knows_ids: bool) -> Iterator[str]:
    source = recipe.resume_adapter_file
    lost = ", and its stop ids are not taken over" if parent.stop_ids else ""
    if not is_same:
        what = f"{recipe.chat_template} is" if recipe.chat_template else f"that of {recipe.model} is"
        yield f"chat_template: {what} not the one that {source} was trained with{lost}"
        return
    if not knows_ids:
        yield f"model: the tokenizer is not the one that {source} was trained with{lost}"
    for name, value in recipe.chat_template_kwargs.items():
        before = parent.chat_template_kwargs.get(name)
        if value != before:
            was = _shown(before) if name in parent.chat_template_kwargs else "left unset"
            yield f"chat_template_kwargs.{name}: {_shown(value)} here, {was} when {source} was trained"


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
