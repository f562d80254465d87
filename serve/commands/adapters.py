"""`lathe adapters`: adapters on disk, and those of a running server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.commands.options import DEFAULT_URL, ApiKey, JsonFile, check_writable, one_of
from serve.commands.output import new_console, reporting, save_json, say

if TYPE_CHECKING:
    from serve.adapters.tools.writing import Written
    from serve.model.loading import LoadedModel

app = typer.Typer()
adapters_app = typer.Typer(
    help="Look at adapters, convert, compare, merge and extract them.", no_args_is_help=True
)
app.add_typer(adapters_app, name="adapters")

BaseModel = Annotated[
    str | None, typer.Option("--base", help="Their base, where names or experts differ between libraries.")
]
AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name on the server.")]
ServerUrl = Annotated[str, typer.Option("--url", help="A running server's address.")]


@adapters_app.command("inspect")
def adapters_inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An adapter: a folder, or a file.")],
    model: Annotated[str | None, typer.Option(help="Say whether it fits this model, too.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Say what an adapter is, module by module, and what is wrong with it."""
    from serve.adapters.tools.inspection import inspect, tables
    from serve.tables import show

    check_writable(json_file)
    found = inspect(path, _base(model))
    show(new_console(), *tables(found))
    save_json(json_file, found.as_json())
    found.check()


@adapters_app.command("convert")
def adapters_convert(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An adapter: a folder, or a file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    to: Annotated[str, typer.Option(help="peft or mlx.")],
    base: BaseModel = None,
) -> None:
    """Write an adapter in PEFT's or in mlx-lm's layout; the way back gives the same bytes."""
    from serve.adapters.tools.writing import convert

    _tell_written(convert(path, out, _layout(to), _base(base)))


@adapters_app.command("diff")
def adapters_diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="An adapter.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    base: BaseModel = None,
    json_file: JsonFile = None,
) -> None:
    """Say how far apart the updates of two adapters are, module by module."""
    from serve.adapters.tools.difference import difference, tables
    from serve.adapters.tools.opened import open_adapter
    from serve.tables import show

    check_writable(json_file)
    model = _base(base)
    network = None if model is None else model.network
    found = difference(open_adapter(first, network), open_adapter(second, network))
    show(new_console(), *tables(found, str(first), str(second)))
    save_json(json_file, found.as_json())


@adapters_app.command("merge")
def adapters_merge(
    parts: Annotated[
        list[str], typer.Argument(metavar="PATH:WEIGHT…", help="Adapters, and how much of each.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    method: Annotated[
        str, typer.Option(help="cat, svd, linear, ties, dare_linear, dare_ties or magnitude_prune.")
    ] = "cat",
    rank: Annotated[
        int | None, typer.Option(help="svd: of the result; else the largest of the parts.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Of what prunes: the share that is kept.")] = None,
    seed: Annotated[int, typer.Option(help="dare: of what is dropped.")] = 0,
    to: Annotated[str | None, typer.Option(help="peft or mlx; else as the first part.")] = None,
    base: BaseModel = None,
) -> None:
    """Make one adapter of several, as PEFT's add_weighted_adapter does."""
    from typing import cast

    from serve.adapters.tools.merging import Merge, Method
    from serve.adapters.tools.writing import merge

    how = Merge(cast("Method", method), rank, density, seed)
    _tell_written(merge(parts, out, how, None if to is None else _layout(to), _base(base)))


@adapters_app.command("extract")
def adapters_extract(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A fine-tuned model, folder or hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    base: Annotated[str, typer.Option(help="The model that it was tuned from.")],
    rank: Annotated[int, typer.Option(min=1, help="Of each module's update.")] = 16,
    to: Annotated[str, typer.Option(help="peft or mlx.")] = "mlx",
    json_file: JsonFile = None,
) -> None:
    """Make an adapter of what a full fine-tune changed: of each matrix the nearest update of that rank."""
    from serve.adapters.tools import extraction, writing
    from serve.tables import show

    layout = _layout(to)
    check_writable(json_file)
    writing.check_out(out)
    tuned, original = _loaded(model), _loaded(base)
    with reporting() as progress:
        found = extraction.extract(tuned, original, rank, progress)
    written = writing.save_extraction(found, out, layout, tuned, original)
    show(new_console(), *extraction.tables(found))
    save_json(json_file, found.as_json())
    _tell_written(written)


@adapters_app.command("list")
def adapters_list(url: ServerUrl = DEFAULT_URL, api_key: ApiKey = None, json_file: JsonFile = None) -> None:
    """List a running server's adapters: their versions, where each is, and who holds it."""
    from serve.remote_adapters import RemoteAdapters, summary, table
    from serve.tables import show

    check_writable(json_file)
    found = RemoteAdapters(url, api_key).listing()
    show(new_console(), table(found), summary(found))
    save_json(json_file, found)


@adapters_app.command("load")
def adapters_load(
    name: AdapterName,
    path: Annotated[str, typer.Argument(metavar="PATH", help="The adapter, where the server runs.")],
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of the name's version.")] = False,
    url: ServerUrl = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Load an adapter into a running server."""
    from serve.remote_adapters import RemoteAdapters

    say(RemoteAdapters(url, api_key).load(name, path, replace=replace))


@adapters_app.command("unload")
def adapters_unload(name: AdapterName, url: ServerUrl = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Take an adapter and all its versions out of a running server."""
    from serve.remote_adapters import RemoteAdapters

    say(RemoteAdapters(url, api_key).unload(name))


@adapters_app.command("rollback")
def adapters_rollback(
    name: AdapterName,
    version: Annotated[
        int | None, typer.Option(min=1, help="Its number; the one before, if left out.")
    ] = None,
    url: ServerUrl = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Give new requests an earlier version of an adapter again."""
    from serve.remote_adapters import RemoteAdapters, told

    say(told(RemoteAdapters(url, api_key).change(name, "rollback", {"version": version})))


@adapters_app.command("pin")
def adapters_pin(name: AdapterName, url: ServerUrl = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Keep a slot for an adapter, whatever others are asked for."""
    from serve.remote_adapters import RemoteAdapters, told

    say(told(RemoteAdapters(url, api_key).change(name, "pin", {})))


@adapters_app.command("unpin")
def adapters_unpin(name: AdapterName, url: ServerUrl = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Let an adapter give way again to others that are asked for."""
    from serve.remote_adapters import RemoteAdapters, told

    say(told(RemoteAdapters(url, api_key).change(name, "unpin", {})))


def _base(name: str | None) -> LoadedModel | None:
    return None if name is None else _loaded(name)


def _loaded(name: str) -> LoadedModel:
    """A model in full precision."""
    from serve.model.loading import load

    return load(name, dequantize=True)


def _layout(word: str) -> Any:
    """'mlx' or 'peft' -> the layout."""
    from serve.adapters.tools.writing import LAYOUTS

    return LAYOUTS[one_of(word, tuple(LAYOUTS), "--to")]


def _tell_written(written: Written) -> None:
    said = f"wrote {written.out}: {written.layout}, {written.num_modules} modules"
    say(said)
    for note in written.notes:
        new_console().print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
