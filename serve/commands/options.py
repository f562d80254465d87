"""Options that several commands take, and what their words must be. A word that is none ends with status 2.

Nothing here imports more than typer, so that a command can explain itself without loading what it runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write every number to FILE.")
]
PngFile = Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Also draw the numbers to FILE.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. a.b=3.")
]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="LATHE_API_KEY", help="Of that server.")]

EMBEDDED_MODEL = Path(__file__).resolve().parents[2] / "data" / "tickets"
DEFAULT_PORT = 8000
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"


def overrides_of(keys: Mapping[str, float | str | list[str] | dict[str, str] | None]) -> list[str]:
    """The keys that were given, as --set takes them: part of the file before it is checked."""
    return [f"{key}={json.dumps(value)}" for key, value in keys.items() if value is not None]


def check_writable(path: Path | None, option: str = "--json") -> None:
    """Before minutes of work, not after them."""
    if path is None:
        return
    target = Path(os.path.realpath(path))
    there = next(each for each in target.parents if each.exists())
    is_file = path.is_file() and os.access(path, os.W_OK)
    is_free = not path.exists()
    if not (is_file or is_free) or not there.is_dir() or not os.access(there, os.W_OK):
        raise typer.BadParameter(f"{path} cannot be written; expected a file", param_hint=option)


def words_of(text: str) -> list[str]:
    """'a, b' -> ['a', 'b']."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers_of(text: str, option: str) -> tuple[int, ...]:
    """'1,4,16' -> (1, 4, 16)."""
    words = words_of(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(
            f"found {text!r}; expected positive whole numbers like 1,4,16", param_hint=option
        )
    return tuple(int(word) for word in words)


def above_0(found: float | None, option: str) -> None:
    """A number above nothing; NaN is none."""
    if found is not None and not found > 0:
        raise typer.BadParameter(f"found {found}; expected a number above 0", param_hint=option)


def one_of(found: Any, choices: tuple[Any, ...], option: str) -> Any:
    """`found`, if it is one of them."""
    if found not in choices:
        expected = " or ".join(map(str, choices))
        raise typer.BadParameter(f"found {found}; expected {expected}", param_hint=option)
    return found
