"""What values a config may hold, how messages show them, and every problem raised at once. Knows no keys."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from serve.errors import AdapterError

LARGEST_COUNT = 2**31 - 1
SHOWN_WIDTH = 60


def raise_problems(path: Path, problems: list[str]) -> None:
    """AdapterError of all of them, if any."""
    if problems:
        lines = [f"{path}: {problems[0]}"] if len(problems) == 1 else [f"{path}:", *problems]
        raise AdapterError("\n  ".join(lines))


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: ValueError where a key stands twice, of which it would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """The JSON object written in `text`, in no layout yet. AdapterError names `path`."""
    try:
        raw = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{path}: holds {shown(raw)}, an object was expected")
    return raw


def is_count(value: Any, lowest: int) -> bool:
    """A whole number from `lowest` on."""
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= LARGEST_COUNT


def is_number(value: Any) -> bool:
    """A finite number that a float holds."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def are_names(value: Any) -> bool:
    """A list of names, not empty."""
    return isinstance(value, list) and bool(value) and all(is_text(name) and name for name in value)


def is_names_or_text(value: Any) -> bool:
    """A list of names, or one expression for all of them."""
    return are_names(value) or (is_text(value) and bool(value))


def is_text(value: Any) -> bool:
    """Text that can be written anywhere: half a surrogate pair cannot."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def asks_nothing(value: Any) -> bool:
    """An option that is off."""
    return (
        value is None or value is False or value == "none" or (isinstance(value, dict | list) and not value)
    )


def shown(value: Any) -> str:
    """What was found, on one short line."""
    try:
        text = ascii(value) if isinstance(value, str) else json.dumps(value)
    except ValueError:  # an int of more digits than Python prints
        text = f"a number of {type(value).__name__} too long to print"
    return text if len(text) <= SHOWN_WIDTH else f"{text[: SHOWN_WIDTH - 1]}…"


def shown_key(name: str) -> str:
    """A key, likewise."""
    return name if name.isidentifier() and name.isascii() else shown(name)
