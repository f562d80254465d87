"""Where an adapter came from, as its config says under the key `lineage`, which is ours."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from serve.adapters.formats.values import is_count, is_text, shown
from serve.model.quantization import Quantization


@dataclass(frozen=True)
class Lineage:
    """Where an adapter came from. Hashes are `sha256:…`; `created` is ISO 8601, UTC."""

    base_model: str
    base_fingerprint: str
    template_hash: str
    recipe_hash: str
    data_hash: str
    created: str
    lathe_version: str
    content_hash: str = ""
    """Of the tensors; filled when the folder is written, checked when it is read."""
    metrics: dict[str, float] = field(default_factory=dict)
    parent: str = ""
    """Of a warm start: the adapter it began with, as the recipe names it."""
    parent_hash: str = ""
    """That adapter's content hash."""
    objective: str = ""
    """What was trained for: sft, dpo, …; nothing in manifests of earlier versions."""
    quantize: dict[str, Any] | None = None
    """How the base was packed as it was loaded (mode, bits, group_size). `base_fingerprint` is the packed one's."""
    vocabulary_hash: str = ""
    """Of the tokenizer: which text each id stands for; nothing in manifests of earlier versions."""
    chat_template: str = ""
    """The adapter's own template, Jinja; empty: the tokenizer's. `template_hash` is of it."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the template reads where a request does not say otherwise."""
    template_day: str = ""
    """The day that the template printed in training, YYYY-MM-DD; empty if it prints none. Serving prints its own."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that ended the turns it learned from; its answers end at them, besides the base's own end tokens."""
    teacher_fingerprint: str = ""
    """Of a drafter: the weights of the model whose answers it learned to guess."""
    teacher_hash: str = ""
    """The content hash of the adapter that this model answered with; nothing where it was the base alone."""


def parse_lineage(raw: Any, problems: list[str]) -> Lineage | None:
    """What the key `lineage` says. Keys of a later version are left out."""
    if not isinstance(raw, dict):
        problems.append(f"lineage is {shown(raw)}; an object was expected")
        return None
    before = len(problems)
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(Lineage):
        name, value = entry.name, raw.get(entry.name)
        if name not in raw:
            if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
                problems.append(f"lineage.{name} is missing")
            continue
        expected = _not_a_lineage(name, value)
        if expected:
            problems.append(f"lineage.{name} is {shown(value)}; {expected} was expected")
        values[name] = tuple(value) if isinstance(value, list) and not expected else value
    return Lineage(**values) if len(problems) == before else None


def _not_a_lineage(name: str, value: Any) -> str | None:
    """What should stand there instead; None if it does."""
    if name == "metrics":
        is_fine = isinstance(value, dict) and all(isinstance(v, int | float) for v in value.values())
        return None if is_fine else "an object of numbers"
    if name == "chat_template_kwargs":
        return None if isinstance(value, dict) else "an object"
    if name == "stop_ids":
        is_fine = isinstance(value, list) and all(is_count(number, 0) for number in value)
        return None if is_fine else "a list of token ids"
    if name == "quantize":
        return None if value is None or _is_quantization(value) else "mode, bits and group_size, or null,"
    return None if is_text(value) else "text"


def _is_quantization(value: Any) -> bool:
    try:
        Quantization.model_validate(value)
    except ValidationError:
        return False
    return True
