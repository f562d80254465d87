"""The front door: `lathe COMMAND`, and `lathe.load` for Python. Finds the command, starts it, and says how it ended;
decides nothing else.

Commands stand in serve/commands and train, a module a group, and are imported once they are asked for: `lathe --help`
loads neither mlx nor the packages.
A mistake in what was typed, or in a file that was named, ends with one message and status 2; other failures
that Lathe foresees with status 1; Ctrl-C with 130, SIGTERM with 143.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from pathlib import Path

    from serve.errors import LatheError
    from serve.local.model import LocalModel

COMMANDS: Mapping[str, tuple[str, str]] = {
    "train": ("train.commands", "Train an adapter, or the whole model, from a recipe."),
    "runs": (
        "train.commands",
        "List runs: how far each came, how good it is, and what it came from.",
    ),
    "serve": (
        "serve.commands.serving",
        "Serve a model and any number of adapters over an OpenAI-compatible API.",
    ),
    "chat": ("serve.commands.serving", "Talk to a model in the terminal."),
    "generate": ("serve.commands.generate", "Answer one prompt and end."),
    "export": (
        "train.commands",
        "Fuse an adapter into its base, quantize if asked, and measure what that changed.",
    ),
    "demo": (
        "train.commands",
        "Do the whole job once, on the embedded model: train two adapters, serve, compare, export; "
        "about a minute.",
    ),
    "doctor": (
        "serve.commands.serving",
        "Say what this machine is, how fast its matmul is, and what is missing; or what combines for a model.",
    ),
    "bench": ("train.bench.commands", "Measure servers and training."),
    "ab": ("serve.commands.ab", "Look at experiments."),
    "data": ("train.commands", "Look at training rows."),
    "adapters": (
        "serve.commands.adapters",
        "Look at adapters, convert, compare, merge and extract them.",
    ),
}
"""Each with the module whose `app` has it, and its own first sentence, for `lathe --help` to show unimported."""


class Commands(Mapping[str, Any]):
    """typer's commands by name; each is imported when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        module, _ = COMMANDS[name]
        # Taken in by an app of no name, they have the front door's way to show help.
        all_of_it = typer.Typer(rich_markup_mode=None)
        all_of_it.add_typer(import_module(module).app)
        return typer.main.get_group(all_of_it).commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class FrontDoor(TyperGroup):
    """The group of all commands. It lists them without importing any."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = Commands()

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, said) for name, (_, said) in COMMANDS.items()])


YOUNG_OBJECTS = 10_000
"""So many new ones start a collection, not 700: of what packages bring hardly anything goes again, and to look for it
was a tenth of a start."""
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk that has no room."""

app = typer.Typer(
    name="lathe",
    cls=FrontDoor,
    help="Train adapters, serve many of them on one model, compare them, export the winner.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)


@app.callback()
def _front_door() -> None:
    """A group even so: typer sees no command."""


def load(
    model: str | Path, adapters: Mapping[str, str | Path] | None = None, **serving_keys: Any
) -> LocalModel:
    """A model and its adapters in this process: as serve.local.model.load, which is imported for it."""
    from serve.local.model import load as load_here

    return load_here(model, adapters, **serving_keys)


def command() -> None:
    """The `lathe` script: `main`, and an end of the process that MLX cannot spoil."""
    gc.set_threshold(YOUNG_OBJECTS)
    try:
        main()
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else int(end.code is not None))


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line, or `words` in its place. Ends by SystemExit."""
    signal.signal(signal.SIGTERM, _terminate)
    _open_what_is_closed()
    _never_fail_to_print()
    try:
        app(words)
    except SystemExit:
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except _foreseen() as error:
        sys.exit(_tell(error))
    except OSError as error:
        if error.errno not in FULL:
            raise
        sys.exit(_tell_full(error))


def _leave(status: int) -> None:
    """End this process as Python does, but for C++'s destructors, which have aborted a run that was done
    ("terminate called without an active exception")."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in FULL:
            status = status or _tell_full(error)
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(status)


def _tell_full(error: OSError) -> int:
    """Nothing more can be written; the exit status."""
    print(f"error: {error.filename or 'what was being written'}: {error.strerror}", file=sys.stderr)
    return 1


def _open_what_is_closed() -> None:
    """A standard stream that whoever started this process has closed is as /dev/null."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open as long as the process is


def _never_fail_to_print() -> None:
    """A character that standard output's encoding lacks, or a name that is not UTF-8, is written as its code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack, so that `with` blocks stop the servers they started; Ctrl-C may mean less."""
    sys.exit(128 + number)


def _foreseen() -> type[LatheError]:
    """The root of the error tree, imported only once something was raised."""
    try:
        from serve.errors import LatheError
    except OSError as error:  # nothing of Lathe can be imported: LATHE_BLAS names what is no library
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return LatheError


def _tell(error: LatheError) -> int:
    """Print the message; return the exit status: 2 if the user can mend it by typing something else."""
    from rich.text import Text

    from serve.commands.output import new_console

    message = Text.assemble(("error: ", "bold red"), str(error))
    new_console(stderr=True).print(message, soft_wrap=True)
    return 2 if error.status < 500 else 1


if __name__ == "__main__":
    command()
