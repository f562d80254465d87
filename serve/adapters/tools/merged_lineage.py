"""What can be said of an adapter that was made of others: what they agree on. Words alone, no arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from serve.adapters.formats.lineage import Lineage
from serve.errors import AdapterError

AGREED = {
    "base_fingerprint": "were trained on other weights",
    "vocabulary_hash": "were trained with other tokenizers",
    "template_hash": "were trained with other chat templates",
    "chat_template": "have other chat templates of their own",
    "chat_template_kwargs": "set their templates' variables otherwise",
    "quantize": "were trained on weights packed otherwise",
}
"""What they have to share → what is said where they do not."""


def merged_lineage(parts: Mapping[str, Lineage | None], *, parent: str, created: str) -> Lineage | None:
    """Of an adapter made of these, by name; its answers end where any of theirs do. None where no part says anything.

    AdapterError where they were trained on other weights or token ids, or with other templates.
    """
    said = {name: each for name, each in parts.items() if each is not None}
    if not said:
        return None
    first_name, first = next(iter(said.items()))
    problems = [
        f"{first_name} and {name} {what}: {_short(getattr(first, key))} and {_short(getattr(each, key))}"
        for name, each in said.items()
        for key, what in AGREED.items()
        if getattr(each, key) != getattr(first, key)
    ]
    if problems:
        raise AdapterError("\n  ".join(["these adapters do not belong together:", *problems]))
    stop_ids = dict.fromkeys(id for each in said.values() for id in each.stop_ids)
    return dataclasses.replace(
        first,
        recipe_hash="",
        data_hash="",
        content_hash="",
        parent_hash="",
        objective="",
        metrics={},
        parent=parent,
        created=created,
        stop_ids=tuple(stop_ids),
    )


def _short(value: object) -> str:
    text = str(value) or "none"
    return f"{text[:19]}…" if len(text) > 20 else text
