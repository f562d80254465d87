"""The modules that a config names, held against those that have tensors. What does not fit together is told, and no
reason to refuse: PEFT and mlx-lm take lists that are written for several families."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from serve.adapters.formats.tensors import without_containers
from serve.adapters.formats.values import are_names, shown

MOST_TOLD = 5


def naming_notes(raw: Mapping[str, Any], paths: Collection[str]) -> tuple[str, ...]:
    """A note for each list of a config, of either layout, that names what has no tensors, or leaves out what has.

    paths  of the modules with an update of low rank, by any library's names
    An expression, as PEFT's target_modules may be, is of the base's own names, which are not these: it tells nothing.
    """
    ends = {end for path in paths for end in _ends(path)}
    notes = []
    for key, names in _lists(raw):
        others: Any = raw.get("target_parameters")  # of PEFT's, beside its modules
        known = [*names, *(others if are_names(others) else ())]
        wanted = {each for name in known for each in (name, without_containers(name))}
        missing = [name for name in names if name not in ends and without_containers(name) not in ends]
        left_out = [path for path in paths if wanted.isdisjoint(_ends(path))]
        if missing:
            notes.append(f"{key} names {_first(missing)}, of which there are no tensors")
        if left_out:
            notes.append(f"{key} leaves {_first(left_out)} out, of which there are tensors")
    return tuple(notes)


def _lists(raw: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    inside = raw.get("lora_parameters")
    if isinstance(inside, Mapping):
        yield from ((f"lora_parameters.{key}", value) for key, value in _said(inside))
    yield from _said(raw)


def _said(raw: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for key in ("keys", "target_modules"):
        if are_names(raw.get(key)):
            yield key, raw[key]


def _ends(path: str) -> Iterator[str]:
    """`layers.0.mlp.up_proj` → itself, `0.mlp.up_proj`, `mlp.up_proj` and `up_proj`."""
    rest = without_containers(path)
    while rest:
        yield rest
        rest = rest.partition(".")[2]


def _first(names: Iterable[str]) -> str:
    listed = [*names]
    more = f" and {len(listed) - MOST_TOLD:,} more" if len(listed) > MOST_TOLD else ""
    return ", ".join(name if name.isprintable() else shown(name) for name in listed[:MOST_TOLD]) + more
