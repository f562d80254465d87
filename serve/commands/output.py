"""What commands show and leave: the console, what runs meanwhile, files of numbers."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def new_console(*, stderr: bool = False) -> Console:
    """Of this process's output as it is now."""
    from rich.console import Console

    return Console(stderr=stderr, emoji=False)


def say(text: str) -> None:
    """A line as it is, whatever brackets it holds."""
    new_console().print(text, markup=False, highlight=False, soft_wrap=True)


def dim(notes: Sequence[str]) -> list[Text]:
    """Notes as they stand under a table."""
    from rich.text import Text

    return [Text(note, style="dim") for note in notes]


@contextmanager
def reporting() -> Iterator[Callable[[str], None]]:
    """Tell what runs: one changing line in a terminal, lines elsewhere."""
    console = new_console(stderr=True)
    if not console.is_terminal:
        yield lambda message: console.print(message, markup=False, soft_wrap=True)
        return
    with console.status("") as status:
        yield status.update


@contextmanager
def at_work(folder: Path | None = None) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """Where a benchmark may write, `folder` or one that is gone afterwards, and whom it tells what runs."""
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary, reporting() as progress:
        yield folder or Path(temporary), progress


def save_json(path: Path | None, numbers: dict[str, Any]) -> None:
    """Write `numbers` to `path`, if any: whole or not at all. Raises StorageError.

    What stands there is replaced, so it must be a file: a device or a pipe of that name would be gone for everybody.
    """
    if path is None:
        return
    from serve.errors import StorageError

    if path.exists() and not path.is_file():
        raise StorageError(f"{path}: cannot be written: it is no file")
    # Of a link, what it leads to is replaced, and not the link.
    path = Path(os.path.realpath(path))
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(numbers, indent=2) + "\n")
        os.replace(new, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error
