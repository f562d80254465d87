"""Which rows say the same: by content, wherever they stand. Examples in, groups and a report out."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.data.example import Example

MAX_SHOWN = 3
CONTENT = ("messages", "tools", "prompt", "completion", "text", "chosen", "rejected", "label", "variables")


@dataclass(frozen=True)
class DuplicateReport:
    """Rows that repeat an earlier one. A group is the places of rows with one content, the first first."""

    num_repeats: int = 0
    """Training rows whose content stood before."""
    groups: tuple[tuple[str, ...], ...] = ()
    """The first few groups, each with its first few places."""
    num_leaked: int = 0
    """Training rows whose content stands in the validation rows too."""
    leaks: tuple[tuple[str, str], ...] = ()
    """(training place, validation place) of the first few."""
    removed: bool = False
    """Whether these rows were left out."""


def content_key(example: Example) -> bytes:
    """Equal for rows with the same content, media by their files: composed Unicode, each run of white space one,
    none at the ends."""
    said = {name: _plain(getattr(example, name)) for name in CONTENT}
    if example.media:
        said["media"] = [ref.identity for ref in example.media]
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).digest()


def report(train: Sequence[Example], valid: Sequence[Example], *, removed: bool = False) -> DuplicateReport:
    """Duplicates among the training rows, and between them and the validation rows."""
    places: dict[bytes, list[str]] = {}
    held_out = {content_key(example): example.place for example in reversed(valid)}
    leaks: list[tuple[str, str]] = []
    for example in train:
        key = content_key(example)
        places.setdefault(key, []).append(example.place)
        if key in held_out:
            leaks.append((example.place, held_out[key]))
    repeated = [found for found in places.values() if len(found) > 1]
    return DuplicateReport(
        num_repeats=sum(len(found) - 1 for found in repeated),
        groups=tuple(tuple(found[:MAX_SHOWN]) for found in repeated[:MAX_SHOWN]),
        num_leaked=len(leaks),
        leaks=tuple(leaks[:MAX_SHOWN]),
        removed=removed,
    )


def without_duplicates(rows: Sequence[Example], other: Sequence[Example] = ()) -> list[Example]:
    """The rows whose content stands neither before nor in `other`."""
    seen = {content_key(example) for example in other}
    kept: list[Example] = []
    for example in rows:
        key = content_key(example)
        if key not in seen:
            seen.add(key)
            kept.append(example)
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(unicodedata.normalize("NFC", value).split())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
