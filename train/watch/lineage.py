"""Where an adapter comes from, as its manifest says it: base, template, tokenizer, recipe, rows and parent."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from serve.adapters.formats.lineage import Lineage
from serve.model.loading import LoadedModel
from serve.model.template import ChatTemplate
from serve.model.vocabulary import vocabulary_hash
from train.adapters.warm_start import hash_of
from train.data.rules import TokenRules
from train.objectives.teacher import Teacher
from train.recipe.recipe import Recipe


def lineage_of(
    recipe: Recipe,
    model: LoadedModel,
    template: ChatTemplate,
    rules: TokenRules,
    *,
    data_hash: str,
    stop_ids: tuple[int, ...] = (),
    created: str = "",
) -> Lineage:
    """The lineage of a run's adapter, before anything is measured.

    rules     by which the rows were tokenized, with `template`
    stop_ids  tokens that the rows teach to end an answer with
    created   when the run began, ISO 8601 in UTC; "": now
    """
    keys = recipe.model_dump(
        mode="json", exclude={"adapter_path", "resume_from_checkpoint", "serve_to", "serve_as"}
    )
    parent, teacher = recipe.resume_adapter_file, Teacher.of(recipe)
    return Lineage(
        base_model=recipe.model,
        base_fingerprint=model.fingerprint,
        quantize=recipe.quantize.model_dump() if recipe.quantize else None,
        template_hash=template.hash,
        vocabulary_hash=vocabulary_hash(model.tokenizer),
        recipe_hash=f"sha256:{hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()}",
        data_hash=data_hash,
        created=created or now(),
        lathe_version=metadata.version("mlx-lathe"),
        parent=parent or "",
        parent_hash=hash_of(Path(parent)) if parent else "",
        objective=recipe.objective,
        chat_template=rules.template.source or "",
        chat_template_kwargs=template.defaults,
        template_day=template.day,
        stop_ids=stop_ids,
        teacher_fingerprint=teacher.fingerprint if teacher is not None else "",
        teacher_hash=teacher.adapter_hash if teacher is not None else "",
    )


def now() -> str:
    """This moment, ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
