"""The front door: `lathe COMMAND`. Reads words, hands values on, prints results; decides nothing else.

Everything but typer is imported inside the commands, so `lathe --help` loads neither mlx nor the packages.
A mistake in what was typed, or in a file that was named, ends with one message and status 2; other failures
that Lathe foresees with status 1; Ctrl-C with 130, SIGTERM with 143.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from serve.adapters.tools import Written
    from serve.config import ServeConfig
    from serve.conversation import Conversation
    from serve.errors import LatheError
    from serve.experiments.store import Store
    from serve.model.loading import LoadedModel

HOME = Path(__file__).resolve().parent
"""Where data/ and recipes/ stand: a checkout of the project."""
EMBEDDED_MODEL = HOME / "data" / "tickets"
DEFAULT_PORT = 8000
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"
DEFAULT_STORE = "sqlite:///lathe.sqlite"

app = typer.Typer(
    name="lathe",
    help="Train adapters, serve many of them on one model, compare them, export the winner.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
bench_app = typer.Typer(help="Measure servers and training.", no_args_is_help=True)
ab_app = typer.Typer(help="Look at experiments.", no_args_is_help=True)
data_app = typer.Typer(help="Look at training rows.", no_args_is_help=True)
adapters_app = typer.Typer(
    help="Look at adapters, convert, compare, merge and extract them.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")
app.add_typer(ab_app, name="ab")
app.add_typer(data_app, name="data")
app.add_typer(adapters_app, name="adapters")

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write every number to FILE.")
]
PngFile = Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Also draw the numbers to FILE.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key, e.g. a.b=3.")
]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", metavar="NAME=PATH", help="Load this adapter; repeatable.")
]

BaseModel = Annotated[
    str | None, typer.Option("--base", help="Their base, where names or experts differ between libraries.")
]

AdapterName = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name on the server.")]
ServerUrl = Annotated[str, typer.Option("--url", help="A running server's address.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="LATHE_API_KEY", help="Of that server.")]
ExperimentName = Annotated[str, typer.Argument(metavar="NAME", help="The experiment's public name.")]
StoreUrl = Annotated[str, typer.Option(help="The server's `store`.")]


def command() -> None:
    """The `lathe` script: `main`, and an end of the process that MLX cannot spoil."""
    try:
        main()
    except SystemExit as end:
        _leave(end.code if isinstance(end.code, int) else int(end.code is not None))


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line, or `words` in its place. Ends by SystemExit."""
    signal.signal(signal.SIGTERM, _terminate)
    _never_fail_to_print()
    try:
        app(words)
    except SystemExit:
        raise
    except KeyboardInterrupt:
        sys.exit(130)
    except _foreseen() as error:
        sys.exit(_tell(error))


def _leave(status: int) -> None:
    """End this process as Python does, but for C++'s destructors, which have aborted a run that was done
    ("terminate called without an active exception")."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _never_fail_to_print() -> None:
    """A character that standard output's encoding lacks, or a name that is not UTF-8, is written as its code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack, so that `with` blocks stop the servers they started; Ctrl-C may mean less."""
    sys.exit(128 + number)


def _foreseen() -> type[LatheError]:
    """The root of the error tree, imported only once something was raised."""
    from serve.errors import LatheError

    return LatheError


def _tell(error: LatheError) -> int:
    """Print the message; return the exit status: 2 if the user can mend it by typing something else."""
    from rich.text import Text

    message = Text.assemble(("error: ", "bold red"), str(error))
    _console(stderr=True).print(message, soft_wrap=True)
    return 2 if error.status < 500 else 1


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe: YAML; a stock mlx_lm.lora file works too.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, data and masks; train nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in adapter_path, once this one has ended.")
    ] = False,
    serve_to: Annotated[
        str | None,
        typer.Option(help="Tell this running server of every checkpoint: the address `lathe serve` prints."),
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="LATHE_API_KEY", help="Of that server.")] = None,
    overrides: Overrides = None,
) -> None:
    """Train an adapter, or the whole model, from a recipe."""
    from train.recipe.recipe import load_recipe
    from train.run import run

    keys = _as_overrides({"serve_to": serve_to})
    summary = run(
        load_recipe(recipe, [*keys, *(overrides or ())]),
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
        console=_console(),
        api_key=api_key,
    )
    raise typer.Exit(summary.exit_code)


@app.command()
def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FOLDER]…", help="Where to look; runs and adapters by default."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """List runs: how far each came, how good it is, and what it came from."""
    from serve.tables import show
    from train.watch import runs as listing

    console = _console()
    named = folders or [Path(name) for name in listing.DEFAULT_FOLDERS if Path(name).is_dir()]
    found = listing.find(named)
    if found:
        for table in listing.tables(found):
            show(console, table, "")
    for run in found:
        if run.problem:
            console.print(f"{run.folder}: {run.problem}", style="red", markup=False, soft_wrap=True)
    if not found:
        where = ", ".join(map(str, named)) or " and ".join(listing.DEFAULT_FOLDERS)
        console.print(f"no runs under {where}", markup=False, soft_wrap=True)
    _save_json(json_file, listing.as_json(found))


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(help="A model folder, a hub name, or a serving configuration (.yaml).")
    ],
    adapter: Adapters = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    adapter_watch: Annotated[
        list[Path] | None,
        typer.Option(help="Load what appears in this folder, a run's or one of adapters; repeatable."),
    ] = None,
    memory_budget_gib: Annotated[
        float | None, typer.Option(help="Memory of keys, values, prefixes and adapters.")
    ] = None,
    prefix_cache_gib: Annotated[
        float | None, typer.Option(help="Of it, at most so much for prefixes; 0 keeps none.")
    ] = None,
    prefix_cache_dir: Annotated[
        Path | None, typer.Option(help="A folder that keeps prefixes across restarts.")
    ] = None,
    prefix_cache_disk_gib: Annotated[float | None, typer.Option(help="What that folder may hold.")] = None,
    encode_patches: Annotated[
        int | None, typer.Option(help="Of pictures, between two decode steps; or one picture.")
    ] = None,
    feature_cache_gib: Annotated[
        float | None, typer.Option(help="Of the memory, at most so much for encoded pictures; 0 keeps none.")
    ] = None,
    feature_cache_dir: Annotated[
        Path | None, typer.Option(help="A folder that keeps encoded pictures across restarts.")
    ] = None,
    feature_cache_disk_gib: Annotated[float | None, typer.Option(help="What that folder may hold.")] = None,
    kv_bits: Annotated[
        float | None, typer.Option(help="Bits of stored keys and values: 8, 4, …; 3.5 is TurboQuant.")
    ] = None,
    kv_value_bits: Annotated[float | None, typer.Option(help="Bits of values, where others.")] = None,
    kv_scheme: Annotated[str | None, typer.Option(help="affine or turbo; else by --kv-bits.")] = None,
    kv_group_size: Annotated[
        int | None, typer.Option(help="Channels that share a scale: 32, 64 or 128.")
    ] = None,
    kv_quantize_after: Annotated[
        int | None, typer.Option(help="Rows of at most so many tokens stay plain.")
    ] = None,
    kv_plain_layers: Annotated[
        int | None, typer.Option(help="So many of the last full-attention layers stay plain.")
    ] = None,
    one_step_ahead: Annotated[
        str | None, typer.Option(help="on, off or auto: build a step before the last one is read.")
    ] = None,
    allowed_media_root: Annotated[
        list[Path] | None,
        typer.Option(help="Requests may show files in this folder; repeatable. On loopback: any."),
    ] = None,
    allow_private_hosts: Annotated[
        bool, typer.Option("--allow-private-hosts", help="Fetch pictures from private addresses too.")
    ] = False,
    max_media: Annotated[
        int | None, typer.Option(help="Pictures, clips and sounds of one request, together.")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(help="Of a picture; larger ones are made smaller, unless a request says.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Serve a model and any number of adapters over an OpenAI-compatible API."""
    from serve.api.server import run

    keys = {
        "adapter_watch": [str(each.absolute()) for each in adapter_watch or ()] or None,
        "memory_budget_gib": memory_budget_gib,
        "prefix_cache_gib": prefix_cache_gib,
        "prefix_cache_dir": str(prefix_cache_dir.absolute()) if prefix_cache_dir else None,
        "prefix_cache_disk_gib": prefix_cache_disk_gib,
        "encode_patches": encode_patches,
        "feature_cache_gib": feature_cache_gib,
        "feature_cache_dir": str(feature_cache_dir.absolute()) if feature_cache_dir else None,
        "feature_cache_disk_gib": feature_cache_disk_gib,
        "kv_bits": kv_bits,
        "kv_value_bits": kv_value_bits,
        "kv_scheme": kv_scheme,
        "kv_group_size": kv_group_size,
        "kv_quantize_after": kv_quantize_after,
        "kv_plain_layers": kv_plain_layers,
        "one_step_ahead": one_step_ahead,
        "allowed_media_roots": [str(each.absolute()) for each in allowed_media_root or ()] or None,
        "media.max_pixels": max_pixels,
        "media_limits.max_items": max_media,
        "media_limits.allow_private_hosts": allow_private_hosts or None,
    }
    run(_serve_config(model, adapter or [], host, port, [*_as_overrides(keys), *(overrides or [])]))


@app.command()
def chat(
    model: Annotated[
        str | None, typer.Argument(help="What to serve and talk to; without --url only.")
    ] = None,
    adapter: Adapters = None,
    url: Annotated[
        str | None, typer.Option(help="Talk to this running server: the address that `lathe serve` prints.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--model", help="Which of the server's models or adapters; else its only --adapter."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 512,
    api_key: Annotated[str | None, typer.Option(envvar="LATHE_API_KEY")] = None,
) -> None:
    """Talk to a model in the terminal. Ctrl-C ends an answer, Ctrl-D the talk. Lines may come from a pipe."""
    from serve.conversation import Conversation, Speaker
    from serve.remote import choose_model

    sampling = {"temperature": temperature, "max_tokens": max_tokens}
    with _server_for(model, adapter or [], url) as served_url:
        # Who names one adapter to serve here means to talk to it.
        only = _adapter(adapter[0])["name"] if url is None and adapter and len(adapter) == 1 else None
        chosen = choose_model(served_url, to or only, api_key)
        _talk(Conversation(Speaker(served_url, chosen, api_key, sampling), system))


@data_app.command("show")
def data_show(
    recipe: Annotated[Path, typer.Argument(help="A recipe.")],
    rows: Annotated[int, typer.Option(min=1, help="The first so many rows.")] = 3,
    row: Annotated[int | None, typer.Option(min=1, help="This row alone, counted from 1.")] = None,
    split: Annotated[str, typer.Option(help="train, valid or test.")] = "train",
    overrides: Overrides = None,
) -> None:
    """Print rows as they are trained: each turn, and which of its tokens the loss counts."""
    from train.data.show import show
    from train.recipe.recipe import load_recipe

    chosen = _one_of(split, ("train", "valid", "test"), "--split")
    show(load_recipe(recipe, overrides or ()), _console(), split=chosen, rows=rows, row=row)


@ab_app.command("report")
def ab_report(
    experiment: ExperimentName,
    store: StoreUrl = DEFAULT_STORE,
    outcome: Annotated[str | None, typer.Option(help="Which feedback to compare on.")] = None,
    run: Annotated[
        int | None, typer.Option(help="Which run; the newest, if left out. `lathe ab runs` lists them.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Say what the evidence so far says about an experiment's variants; looking early is allowed."""
    from serve.experiments.report import render, report
    from serve.tables import show

    with _store(store) as opened:
        found = report(opened, experiment, outcome, run_id=run)
    show(_console(), *render(found))
    _save_json(json_file, found.to_dict())


@ab_app.command("runs")
def ab_runs(experiment: ExperimentName, store: StoreUrl = DEFAULT_STORE) -> None:
    """List an experiment's runs, the newest first: other variants, weights or salt begin another."""
    from serve.experiments.report import runs_table
    from serve.tables import show

    with _store(store) as opened:
        show(_console(), runs_table(opened.runs(experiment)))


@ab_app.command("drop")
def ab_drop(
    experiment: ExperimentName,
    outcome: Annotated[str, typer.Option(help="The outcome to delete, e.g. one with a misspelled name.")],
    store: StoreUrl = DEFAULT_STORE,
    run: Annotated[int | None, typer.Option(help="Of which run; the newest, if left out.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete all outcomes of one name from a run. They cannot be brought back; reports say that it was done."""
    from serve.errors import NotFoundError
    from serve.experiments.report import choose_run, counted

    with _store(store) as opened:
        chosen = choose_run(opened.runs(experiment), run)
        if outcome not in chosen.outcomes:
            raise NotFoundError(
                f"outcome {outcome!r} is not in run {chosen.run.id} of {experiment}; "
                f"found: {counted(chosen.outcomes)}"
            )
        what = f"{chosen.outcomes[outcome]:,} of outcome {outcome} in run {chosen.run.id} of {experiment}"
        if not yes:
            _confirm(f"Delete {what} for good?")
        opened.drop_outcome(chosen.run.id, outcome)
    _console().print(f"deleted {what}", markup=False, highlight=False, soft_wrap=True)


@adapters_app.command("inspect")
def adapters_inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An adapter: a folder, or a file.")],
    model: Annotated[str | None, typer.Option(help="Say whether it fits this model, too.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Say what an adapter is, module by module, and what is wrong with it."""
    from serve.adapters.inspection import inspect, tables
    from serve.tables import show

    _check_writable(json_file)
    found = inspect(path, _base(model))
    show(_console(), *tables(found))
    _save_json(json_file, found.as_json())
    found.check()


@adapters_app.command("convert")
def adapters_convert(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An adapter: a folder, or a file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    to: Annotated[str, typer.Option(help="peft or mlx.")],
    base: BaseModel = None,
) -> None:
    """Write an adapter in PEFT's or in mlx-lm's layout; the way back gives the same bytes."""
    from serve.adapters.tools import convert

    _tell_written(convert(path, out, _layout(to), _base(base)))


@adapters_app.command("diff")
def adapters_diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="An adapter.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    base: BaseModel = None,
    json_file: JsonFile = None,
) -> None:
    """Say how far apart the updates of two adapters are, module by module."""
    from serve.adapters.difference import difference, tables
    from serve.adapters.opened import open_adapter
    from serve.tables import show

    _check_writable(json_file)
    model = _base(base)
    network = None if model is None else model.network
    found = difference(open_adapter(first, network), open_adapter(second, network))
    show(_console(), *tables(found, str(first), str(second)))
    _save_json(json_file, found.as_json())


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

    from serve.adapters.merging import Merge, Method
    from serve.adapters.tools import merge

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
    from serve.adapters import extraction, tools
    from serve.tables import show

    layout = _layout(to)
    _check_writable(json_file)
    tools.check_out(out)
    tuned, original = _loaded(model), _loaded(base)
    with _progress() as progress:
        found = extraction.extract(tuned, original, rank, progress)
    written = tools.save_extraction(found, out, layout, tuned, original)
    show(_console(), *extraction.tables(found))
    _save_json(json_file, found.as_json())
    _tell_written(written)


@adapters_app.command("list")
def adapters_list(url: ServerUrl = DEFAULT_URL, api_key: ApiKey = None, json_file: JsonFile = None) -> None:
    """List a running server's adapters: their versions, where each is, and who holds it."""
    from serve.remote_adapters import RemoteAdapters, summary, table
    from serve.tables import show

    _check_writable(json_file)
    found = RemoteAdapters(url, api_key).listing()
    show(_console(), table(found), summary(found))
    _save_json(json_file, found)


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

    _say(RemoteAdapters(url, api_key).load(name, path, replace=replace))


@adapters_app.command("unload")
def adapters_unload(name: AdapterName, url: ServerUrl = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Take an adapter and all its versions out of a running server."""
    from serve.remote_adapters import RemoteAdapters

    _say(RemoteAdapters(url, api_key).unload(name))


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

    _say(told(RemoteAdapters(url, api_key).change(name, "rollback", {"version": version})))


@adapters_app.command("pin")
def adapters_pin(name: AdapterName, url: ServerUrl = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Keep a slot for an adapter, whatever others are asked for."""
    from serve.remote_adapters import RemoteAdapters, told

    _say(told(RemoteAdapters(url, api_key).change(name, "pin", {})))


@adapters_app.command("unpin")
def adapters_unpin(name: AdapterName, url: ServerUrl = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Let an adapter give way again to others that are asked for."""
    from serve.remote_adapters import RemoteAdapters, told

    _say(told(RemoteAdapters(url, api_key).change(name, "unpin", {})))


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="An adapter: a folder, or a file.")],
    out: Annotated[Path, typer.Argument(help="The model folder to write.")],
    bits: Annotated[int | None, typer.Option(help="Quantize to 4 or 8 bits.")] = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = 64,
    dtype: Annotated[
        str | None, typer.Option(help="Of unquantized weights: float16, bfloat16, float32.")
    ] = None,
    quantize_vision: Annotated[
        bool, typer.Option("--quantize-vision", help="With --bits: towers and projectors too.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="Base model, if not where the adapter says.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Rows to measure fidelity on, all of them: a file, a folder or a recipe."),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="At most so many rows; without --data 64.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in OUT.")] = False,
    json_file: JsonFile = None,
) -> None:
    """Fuse an adapter into its base, quantize if asked, and measure what that changed."""
    from dataclasses import asdict

    from train.after.export import Form
    from train.after.export import export as fuse
    from train.after.fidelity import Rows

    form = Form(
        bits=None if bits is None else _one_of(bits, (4, 8), "--bits"),
        group_size=_one_of(group_size, (32, 64, 128), "--group-size"),
        dtype=None if dtype is None else _one_of(dtype, ("float16", "bfloat16", "float32"), "--dtype"),
        quantize_vision=quantize_vision,
    )
    _check_writable(json_file)
    report = fuse(adapter, out, form, base=base, rows=Rows(data, rows), force=force, console=_console())
    _save_json(json_file, asdict(report))


@bench_app.command("serve")
def bench_serve(
    url: Annotated[
        str | None,
        typer.Option(
            help="The address that `lathe serve` prints; http://127.0.0.1:8000 if nothing is started."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Start a server for it: what `lathe serve` takes, or tiny, 29M, 0.6B, 1.7B for a random model.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Models to ask in turn, a,b,c; else the first listed.")
    ] = None,
    adapters: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ask so many of the server's adapters; a random model is started with so many."
        ),
    ] = None,
    zipf: Annotated[
        float | None,
        typer.Option(min=0, help="Draw the models: the k-th 1/k^ZIPF as often as the first. Else in turn."),
    ] = None,
    concurrency: Annotated[
        str | None,
        typer.Option(
            "--concurrency",
            "--max-concurrency",
            help="Numbers of clients, one after the other (1,4,16); with a rate, the most under way.",
        ),
    ] = None,
    request_rate: Annotated[
        str | None,
        typer.Option(help="Open loop: requests a second, one rate after the other; inf is a burst."),
    ] = None,
    burstiness: Annotated[
        float,
        typer.Option(help="Of arrivals at a rate: 1 is Poisson, inf evenly spaced, less than 1 burstier."),
    ] = 1.0,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests", "--num-prompts", min=1, help="At each level; else 4 a client, or 10 s of a rate."
        ),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(
            help="Seconds of each level: later no request is sent, and a minute later none is heard."
        ),
    ] = None,
    prompt_tokens: Annotated[
        str,
        typer.Option(
            "--prompt-tokens",
            "--random-input-len",
            metavar="LENGTHS",
            help="128, uniform:64:512 or lognormal:MEDIAN:SIGMA[:MAX].",
        ),
    ] = "128",
    max_tokens: Annotated[
        str,
        typer.Option(
            "--max-tokens", "--random-output-len", metavar="LENGTHS", help="Of answers; as prompts."
        ),
    ] = "64",
    dataset_path: Annotated[
        Path | None,
        typer.Option(help="JSONL: prompt, messages or prompt_tokens a line, and output_tokens if it likes."),
    ] = None,
    num_prefixes: Annotated[
        int,
        typer.Option(
            "--num-prefixes", "--prefix-repetition-num-prefixes", min=0, help="Beginnings that prompts share."
        ),
    ] = 0,
    prefix_tokens: Annotated[
        int,
        typer.Option(
            "--prefix-tokens",
            "--prefix-repetition-prefix-len",
            min=1,
            help="Of each, beside --prompt-tokens.",
        ),
    ] = 256,
    prefix_zipf: Annotated[
        float, typer.Option(min=0, help="The k-th prefix 1/k^PREFIX_ZIPF as often as the first.")
    ] = 1.0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:MS", help="What is good: ttft:500, tpot:50, e2el:2000; repeatable."),
    ] = None,
    endpoint: Annotated[str, typer.Option(help="chat or completions.")] = "chat",
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for full-length answers, where the server can.")
    ] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="Size prompts with this folder's tokenizer.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same one, the same requests.")] = 0,
    overrides: Overrides = None,
    api_key: Annotated[str | None, typer.Option(envvar="LATHE_API_KEY")] = None,
    json_file: JsonFile = None,
    png: PngFile = None,
) -> None:
    """Measure any OpenAI-compatible server: time to first token, time per token, gaps, tokens per second, goodput."""
    from contextlib import ExitStack

    from serve.bench import dataset, lengths, plots
    from serve.bench import goodput as good
    from serve.bench.summary import notes, table
    from serve.bench.sweep import Sweep, run
    from serve.bench.workload import Prefixes, Workload
    from serve.tables import show

    rates = _rates(request_rate)
    levels = _numbers(concurrency or "1,4,16", "--concurrency")
    _one_of(endpoint, ("chat", "completions"), "--endpoint")
    _at_least(burstiness, "--burstiness")
    _at_least(time_limit, "--time-limit")
    if burstiness != 1.0 and not rates:
        raise typer.BadParameter(
            "clients are no arrivals; give --request-rate too", param_hint="--burstiness"
        )
    if start is None and overrides:
        raise typer.BadParameter("is of a server that --start starts", param_hint="--set")
    if start is not None and url is not None:
        raise typer.BadParameter("name a running server, or --start one", param_hint="--url, --start")
    if model is not None and adapters is not None:
        raise typer.BadParameter(
            "name the models, or say how many adapters", param_hint="--model, --adapters"
        )
    prompts, answers = (
        lengths.parse(prompt_tokens, "--prompt-tokens"),
        lengths.parse(max_tokens, "--max-tokens"),
    )
    objective = good.parse(goodput) if goodput else None
    lines = dataset.read(dataset_path) if dataset_path else None
    _check_writable(json_file)
    _check_writable(png, "--png")
    with ExitStack() as stack:
        progress = stack.enter_context(_progress())
        if start is not None:
            url = stack.enter_context(_benched_server(start, adapters, overrides or [], progress))
        url = url or f"http://127.0.0.1:{DEFAULT_PORT}"
        workload = Workload(
            models=_benched_models(url, model, adapters, api_key),
            prompt_tokens=prompts,
            max_tokens=answers,
            model_exponent=zipf,
            prefixes=Prefixes(num_prefixes, prefix_tokens, prefix_zipf) if num_prefixes else None,
            dataset=lines,
            seed=seed,
        )
        sweep = Sweep(
            url=url,
            workload=workload,
            concurrency=levels if concurrency or not rates else (),
            request_rates=rates,
            burstiness=burstiness,
            num_requests=requests,
            time_limit_s=time_limit,
            endpoint="completions" if endpoint == "completions" else "chat",
            tokenizer=tokenizer,
            extra={"ignore_eos": True} if ignore_eos else {},
            objective=objective,
            api_key=api_key,
        )
        outcome = run(sweep, progress)
    asked = f"{start or url}, {prompt_tokens} prompt tokens asked, {max_tokens} new"
    title = f"{asked}; p50 / p95 (gaps p50 / p95 / p99 / longest)"
    show(_console(), table(title, outcome.summaries), *_dim(notes(outcome.summaries)))
    _save_json(json_file, outcome.as_json(sweep))
    if png is not None:
        plots.save(plots.served(asked, outcome.rounds, outcome.summaries), png)


@contextmanager
def _benched_server(
    start: str, adapters: int | None, overrides: Sequence[str], progress: Callable[[str], None]
) -> Iterator[str]:
    """The address of a server that is there for as long as it is measured."""
    import tempfile

    from serve.bench import servers, standin

    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary:
        folder, model, paths = Path(temporary), start, {}
        if start in standin.SIZES:
            progress("writing a random model")
            model, size = str(folder / "model"), standin.SIZES[start]
            standin.write_model(Path(model), standin.default_dtype(), size)
            if adapters is not None:
                progress(f"writing {adapters} adapters")
                paths = standin.write_adapters(folder / "adapters", adapters, size)
        progress(f"starting a server for {start}")
        with servers.lathe(model, folder / "lathe.log", adapters=paths, overrides=overrides) as server:
            yield server.url


def _benched_models(
    url: str, model: str | None, adapters: int | None, api_key: str | None
) -> tuple[str, ...]:
    """Whom requests name."""
    from serve.errors import NotFoundError
    from serve.remote import choose_model, served_adapters

    if model is not None:
        return tuple(_words(model))
    if adapters is None:
        return (choose_model(url, None, api_key),)
    found = served_adapters(url, api_key)
    if len(found) < adapters:
        raise NotFoundError(f"{url} lists {len(found)} adapters; --adapters asks for {adapters}")
    return tuple(found[:adapters])


@bench_app.command("compare")
def bench_compare(
    concurrency: Annotated[str, typer.Option(help="Numbers of clients.")] = "1,4,16,32,64",
    only: Annotated[
        str, typer.Option(help="Who takes part, any of them.")
    ] = "lathe,bare,mlx_lm,mlx_vlm,vllm_mlx,unused,one,mixed8,mixed32",
    prompt_tokens: Annotated[int, typer.Option(min=16)] = 74,
    max_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="They take turns this many times.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="Of each client in a round.")] = 2,
    time_limit: Annotated[
        float | None, typer.Option(help="Seconds of all rounds; what would not end in time is not begun.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="Parameters of the random model: tiny, 29M, 0.6B or 1.7B.")
    ] = "29M",
    vllm_mlx: Annotated[
        str | None,
        typer.Option(
            envvar="LATHE_VLLM_MLX", metavar="EXECUTABLE", help="vllm-mlx's, where it is not on the path."
        ),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Keep model, adapters and server logs here.")] = None,
    json_file: JsonFile = None,
    png: PngFile = None,
) -> None:
    """Measure Lathe, its mixes of adapters, a bare batched loop and other servers on one random model, in turns."""
    import tempfile

    from serve.bench import compare, contest, plots, servers
    from serve.bench.standin import SIZES
    from serve.bench.summary import notes, table
    from serve.tables import show

    _at_least(time_limit, "--time-limit")
    asked = compare.Comparison(
        size=_one_of(size, tuple(SIZES), "--size"),
        concurrency=_numbers(concurrency, "--concurrency"),
        num_prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        rounds=rounds,
        requests_per_client=requests,
        only=tuple(_one_of(key, tuple(contest.KEYS), "--only") for key in _words(only) or [only]),
        time_limit_s=time_limit,
    )
    _check_writable(json_file)
    _check_writable(png, "--png")

    def keep(so_far: compare.Outcome) -> None:
        _save_json(json_file, so_far.as_json(asked))

    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary, _progress() as progress:
        executable = vllm_mlx or servers.find_vllm_mlx()
        outcome = compare.run(asked, folder or Path(temporary), progress, keep, executable)
    keep(outcome)
    title = "p50 / p95 over all rounds (gaps p50 / p95 / p99 / longest)"
    show(
        _console(),
        table(title, outcome.summaries),
        compare.table(outcome),
        *_dim([*notes(outcome.summaries), *compare.notes(outcome)]),
    )
    if png is not None:
        asked_for = f"{size} model, {prompt_tokens} prompt tokens, {max_tokens} new, {rounds} rounds"
        plots.save(plots.compared(asked_for, outcome), png)


@bench_app.command("adapters")
def bench_adapters(
    parts: Annotated[str, typer.Option(help="Any of them.")] = "mixes,unused,ranks,load,many",
    rounds: Annotated[int, typer.Option(min=1, help="What is compared takes turns this many times.")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="mixes, unused: requests that run together.")] = 32,
    ranked: Annotated[int, typer.Option(min=1, help="ranks: adapters of ranks 4 to 128, a row each.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=16)] = 74,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 48,
    streams: Annotated[int, typer.Option(min=1, help="load: rows that stream meanwhile.")] = 16,
    loads: Annotated[int, typer.Option(min=1, help="load: adapters loaded, replaced and unloaded.")] = 5,
    many: Annotated[int, typer.Option(min=2, help="many: adapters on disk.")] = 1000,
    slots: Annotated[int, typer.Option(min=1, help="many: that fit on the device together.")] = 16,
    clients: Annotated[int, typer.Option(min=1, help="many: clients.")] = 16,
    zipf: Annotated[float, typer.Option(min=0, help="many: the k-th 1/k^ZIPF as often as the first.")] = 1.0,
    size: Annotated[
        str, typer.Option(help="Parameters of the random model: tiny, 29M, 0.6B or 1.7B.")
    ] = "29M",
    folder: Annotated[Path | None, typer.Option(help="Keep model, adapters and server logs here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure what adapters cost: mixed, unused, of many ranks, loaded beside streams, and more than fit."""
    import tempfile

    from serve.bench import adapters, crowd, disturb, finding
    from serve.bench.standin import SIZES
    from serve.tables import show

    asked = adapters.Setting(
        parts=tuple(_one_of(part, adapters.PARTS, "--parts") for part in _words(parts) or [parts]),
        size=SIZES[_one_of(size, tuple(SIZES), "--size")],
        rows=rows,
        num_ranked=ranked,
        num_prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        rounds=rounds,
        load=disturb.Setting(num_rows=streams, rounds=loads),
        crowd=crowd.Setting(
            num_adapters=many,
            num_slots=slots,
            exponent=zipf,
            clients=clients,
            num_prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            rounds=rounds,
        ),
    )
    _check_writable(json_file)

    def keep(so_far: list[finding.Finding]) -> None:
        _save_json(json_file, adapters.as_json(asked, so_far))

    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary, _progress() as progress:
        findings = adapters.run(asked, folder or Path(temporary), progress, keep)
    title = f"Median of {rounds} round(s), and extremes"
    show(_console(), finding.table(title, findings), *_dim(finding.notes(findings)))


@bench_app.command("step")
def bench_step(
    rows: Annotated[str, typer.Option(help="Numbers of rows, measured one after the other.")] = "16,64",
    rounds: Annotated[int, typer.Option(min=1, help="Loop and engine take turns this many times.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Of each in a round.")] = 20,
    adapters: Annotated[
        bool,
        typer.Option(
            help="Of a 29M model's step instead: with adapters, mixed and alone, over the bare one."
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Measure what a decode step takes over mlx-lm's bare loop, on a tiny model, and where its time goes."""
    import tempfile

    from serve.bench import mixtures, step
    from serve.tables import show

    asked = step.Setting(_numbers(rows, "--rows"), rounds, steps)
    _check_writable(json_file)
    if adapters:
        mixed = mixtures.Setting(asked.rows, rounds)
        with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary, _progress() as progress:
            found = mixtures.run(mixed, Path(temporary), progress)
        show(_console(), mixtures.table(found))
        _save_json(json_file, mixtures.as_json(mixed, found))
        return
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary, _progress() as progress:
        results = step.run(asked, Path(temporary), progress)
    show(_console(), step.table(results), step.parts_table(results))
    _save_json(json_file, step.as_json(asked, results))


@bench_app.command("cache")
def bench_cache(
    parts: Annotated[str, typer.Option(help="Any of them.")] = "ragged,prefix,precision,throughput",
    rounds: Annotated[int, typer.Option(min=1, help="What is compared takes turns this many times.")] = 1,
    rows: Annotated[int, typer.Option(min=2, help="ragged: rows in the batch.")] = 16,
    long_tokens: Annotated[int, typer.Option(min=64, help="ragged: the long row's prompt.")] = 2000,
    prefix_tokens: Annotated[str, typer.Option(help="prefix: lengths of documents.")] = "2048,8192",
    prefill_tokens: Annotated[int, typer.Option(min=64, help="precision: the prompt's length.")] = 4096,
    clients: Annotated[int, typer.Option(min=1, help="throughput: clients.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=8, help="ragged and throughput: of each answer.")] = 64,
    size: Annotated[
        str, typer.Option(help="Parameters of the random model: tiny, 29M, 0.6B or 1.7B.")
    ] = "29M",
    folder: Annotated[Path | None, typer.Option(help="Keep model, prefixes and server logs here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure rows of mixed lengths, prefixes in memory and on disk, quantized KV, and what the cache costs."""
    import tempfile

    from serve.bench import cache, finding, precision, prefix, ragged, throughput
    from serve.bench.standin import SIZES
    from serve.tables import show

    asked = cache.Setting(
        parts=tuple(_one_of(part, cache.PARTS, "--parts") for part in _words(parts) or [parts]),
        size=_one_of(size, tuple(SIZES), "--size"),
        ragged=ragged.Setting(num_rows=rows, long_tokens=long_tokens, max_tokens=max_tokens, rounds=rounds),
        prefix=prefix.Setting(_numbers(prefix_tokens, "--prefix-tokens"), rounds),
        precision=precision.Setting(prefill_tokens),
        throughput=throughput.Setting(clients, max_tokens=max_tokens, rounds=rounds),
    )
    _check_writable(json_file)

    def keep(so_far: list[finding.Finding]) -> None:
        _save_json(json_file, cache.as_json(asked, so_far))

    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary, _progress() as progress:
        findings = cache.run(asked, folder or Path(temporary), progress, keep)
    title = f"Median of {rounds} round(s), and extremes"
    show(_console(), finding.table(title, findings), *_dim(finding.notes(findings)))


@bench_app.command("images")
def bench_images(
    parts: Annotated[str, typer.Option(help="Any of them.")] = "again,clip,requests,stall",
    rounds: Annotated[int, typer.Option(min=1, help="The servers take turns this many times.")] = 3,
    edge: Annotated[int, typer.Option(min=28, help="Of a picture, in pixels.")] = 448,
    tower_layers: Annotated[int, typer.Option(min=1, help="Of what looks at it.")] = 24,
    frames: Annotated[int, typer.Option(min=2, help="clip: of a film.")] = 32,
    clients: Annotated[str, typer.Option(help="requests: numbers of clients.")] = "1,8",
    streams: Annotated[int, typer.Option(min=1, help="stall: text streams beside the picture.")] = 4,
    stream_tokens: Annotated[int, typer.Option(min=16, help="stall: of each.")] = 400,
    folder: Annotated[Path | None, typer.Option(help="Keep model, films and server logs here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure pictures and clips, new and known, with Lathe and mlx_vlm.server on one random model, in turns."""
    import tempfile

    from serve.bench import finding, images
    from serve.bench.standin_vlm import Size
    from serve.tables import show

    asked = images.Setting(
        parts=tuple(_one_of(part, images.PARTS, "--parts") for part in _words(parts) or [parts]),
        size=Size(tower_layers=tower_layers, max_pixels=edge * edge),
        edge=edge,
        num_frames=frames,
        clients=_numbers(clients, "--clients"),
        num_streams=streams,
        stream_tokens=stream_tokens,
        rounds=rounds,
    )
    _check_writable(json_file)

    def keep(so_far: list[finding.Finding]) -> None:
        _save_json(json_file, images.as_json(asked, so_far))

    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary, _progress() as progress:
        findings = images.run(asked, folder or Path(temporary), progress, keep)
    title = f"Pictures of {edge} px; median of {rounds} round(s), and extremes"
    show(_console(), finding.table(title, findings), *_dim(finding.notes(findings)))


@bench_app.command("conversations")
def bench_conversations(
    conversations: Annotated[int, typer.Option(min=1)] = 24,
    turns: Annotated[int, typer.Option(min=1, help="Of each conversation.")] = 5,
    systems: Annotated[
        int, typer.Option(min=1, help="System prompts, shared as Zipf has it: the k-th 1/k as often.")
    ] = 5,
    system_tokens: Annotated[int, typer.Option(min=1)] = 384,
    message_tokens: Annotated[int, typer.Option(min=1)] = 32,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 16,
    held: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the conversations that the caches hold.")
    ] = 0.25,
    clients: Annotated[int, typer.Option(min=1)] = 4,
    size: Annotated[
        str, typer.Option(help="Parameters of the random model: tiny, 29M, 0.6B or 1.7B.")
    ] = "29M",
    folder: Annotated[Path | None, typer.Option(help="Keep model and server logs here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the prefix caches of Lathe and mlx_vlm.server on chats that share system prompts, in turns."""
    import tempfile

    from serve.bench import conversations as played
    from serve.bench.scripts import Setting
    from serve.bench.standin import SIZES
    from serve.tables import show

    asked = Setting(
        num_conversations=conversations,
        num_turns=turns,
        num_systems=systems,
        system_words=system_tokens,
        message_words=message_tokens,
        max_tokens=max_tokens,
        held_frac=held,
        clients=clients,
        size=_one_of(size, tuple(SIZES), "--size"),
    )
    _check_writable(json_file)
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary, _progress() as progress:
        outcome = played.run(asked, folder or Path(temporary), progress)
    show(_console(), played.table(outcome, asked), *_dim(played.notes(outcome)))
    _save_json(json_file, outcome.as_json(asked))


@bench_app.command("train")
def bench_train(
    iters: Annotated[int, typer.Option(help="Batches; one pass over as many times --batch-size chats.")] = 12,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    rounds: Annotated[int, typer.Option(help="The loops take turns this many times.")] = 1,
    model: Annotated[
        str | None, typer.Option(help="A model in place of the random one with 32k tokens.")
    ] = None,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Rows with pictures, beside mlx-vlm's own trainer.")
    ] = False,
    folder: Annotated[Path | None, typer.Option(help="Keep model, rows, recipes and logs here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Train the same chats with Lathe and with mlx_lm.lora, in turns: data tokens per second, peak memory."""
    import tempfile

    from serve.tables import show
    from train.bench import compare, sighted_compare

    _check_writable(json_file)
    if pictures:
        if model is not None:
            raise typer.BadParameter("the rows are made for the random models", param_hint="--model")
        seeing = sighted_compare.SightedBench(num_batches=iters, batch_size=batch_size, rounds=rounds)
        with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary, _progress() as progress:
            seen = sighted_compare.run(seeing, folder or Path(temporary), progress)
        show(_console(), *sighted_compare.tables(seen), *_dim(sighted_compare.notes(seen)))
        _save_json(json_file, seen.as_json(seeing))
        return
    asked = compare.TrainBench(num_batches=iters, batch_size=batch_size, rounds=rounds, model=model)
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as temporary, _progress() as progress:
        outcome = compare.run(asked, folder or Path(temporary), progress)
    show(_console(), *compare.tables(outcome), *_dim(compare.notes(outcome)))
    _save_json(json_file, outcome.as_json(asked))


@app.command()
def demo(
    json_file: JsonFile = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the server running and say what to try.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Where to write; emptied first.")] = Path("runs/demo"),
) -> None:
    """Do the whole job once, on the embedded model: train two adapters, serve, compare, export; about two minutes."""
    from train.demo import run

    _save_json(json_file, run(HOME, folder, _console(), keep=keep))


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Option(help="Try what combines for this model, a folder or a hub name, instead.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="With --model: this adapter folder, not random ones of every kind.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Say what this machine is, how fast its matmul is, and what is missing; or what combines for a model."""
    if model is None:
        from serve.doctor import diagnose, show

        if adapter is not None:
            raise typer.BadParameter(
                "an adapter is tried on a model: name it with --model", param_hint="--adapter"
            )
        found = diagnose(EMBEDDED_MODEL)
        show(found, _console())
        _save_json(json_file, found.as_json())
        return
    from serve.combinations import probe, table
    from serve.tables import show as show_tables

    _check_writable(json_file)
    combined = probe(model, adapter)
    drawn, notes = table(combined)
    show_tables(_console(), drawn, *notes)
    _save_json(json_file, combined.as_json())


def _serve_config(
    model: str, adapters: list[str], host: str | None, port: int | None, overrides: list[str]
) -> ServeConfig:
    """The configuration that `lathe serve` was asked for: a file's, or one made of words."""
    from serve.config import load_config

    changes: dict[str, Any] = {"host": host, "port": port}
    if adapters:
        changes["adapters"] = [_adapter(words) for words in adapters]
    return load_config(model, overrides, **changes)


def _base(name: str | None) -> LoadedModel | None:
    return None if name is None else _loaded(name)


def _loaded(name: str) -> LoadedModel:
    """A model in full precision."""
    from serve.model.loading import load

    return load(name, dequantize=True)


def _layout(word: str) -> Any:
    """'mlx' or 'peft' -> the layout."""
    from serve.adapters.tools import LAYOUTS

    return LAYOUTS[_one_of(word, tuple(LAYOUTS), "--to")]


def _say(text: str) -> None:
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


def _tell_written(written: Written) -> None:
    said = f"wrote {written.out}: {written.layout}, {written.num_modules} modules"
    _console().print(said, markup=False, highlight=False, soft_wrap=True)
    for note in written.notes:
        _console().print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _as_overrides(keys: Mapping[str, float | str | list[str] | None]) -> list[str]:
    """The keys that were given, as --set takes them: part of the file before it is checked."""
    import json

    return [f"{key}={json.dumps(value)}" for key, value in keys.items() if value is not None]


def _adapter(words: str) -> dict[str, str]:
    """'NAME=PATH' -> its parts."""
    name, equals, path = words.partition("=")
    if not (name and equals and path):
        raise typer.BadParameter(f"found {words!r}; expected NAME=PATH", param_hint="--adapter")
    return {"name": name, "path": path}


@contextmanager
def _store(url: str) -> Iterator[Store]:
    """A store that is there, open for as long as it is needed."""
    from serve.experiments.store import Store

    opened = Store(url, create=False)
    try:
        yield opened
    finally:
        opened.close()


def _confirm(question: str) -> None:
    """Go on only if a person says yes."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise typer.BadParameter("nobody is there to be asked; say --yes to go on", param_hint="--yes")
    typer.confirm(question, abort=True)


@contextmanager
def _server_for(model: str | None, adapters: list[str], url: str | None) -> Iterator[str]:
    """The address of a server: the one that was named, or one started here for as long as it is needed."""
    if (model is None) == (url is None):
        raise typer.BadParameter(
            "name what to serve, or a running server with --url", param_hint="MODEL, --url"
        )
    if url is not None:
        yield url
        return
    from serve.api.server import serving
    from serve.runtime import Runtime

    runtime = Runtime.start(_serve_config(str(model), adapters, None, None, []))
    try:
        with serving(runtime) as served_url:
            yield served_url
    finally:
        runtime.close()


def _talk(conversation: Conversation) -> None:
    from serve import chat as terminal

    if sys.stdin.isatty():
        with terminal.Keyboard() as keyboard:
            terminal.at_terminal(conversation, keyboard.read, _console())
    else:
        terminal.from_pipe(conversation, sys.stdin.buffer, _console())


def _dim(notes: Sequence[str]) -> list[Text]:
    from rich.text import Text

    return [Text(note, style="dim") for note in notes]


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, emoji=False)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Tell what runs: one changing line in a terminal, lines elsewhere."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield lambda message: console.print(message, markup=False, soft_wrap=True)
        return
    with console.status("") as status:
        yield status.update


def _save_json(path: Path | None, numbers: dict[str, Any]) -> None:
    """Write `numbers` to `path`, if any: whole or not at all."""
    if path is None:
        return
    import json
    import os

    from serve.errors import StorageError

    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(numbers, indent=2) + "\n")
        os.replace(new, path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error


def _check_writable(path: Path | None, option: str = "--json") -> None:
    """Before minutes of work, not after them."""
    if path is None:
        return
    import os

    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if path.is_dir() or not os.access(there, os.W_OK) or (there != path and not there.is_dir()):
        raise typer.BadParameter(f"{path} cannot be written; expected a file", param_hint=option)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """'1,4,16' -> (1, 4, 16)."""
    words = _words(text)
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(
            f"found {text!r}; expected positive whole numbers like 1,4,16", param_hint=option
        )
    return tuple(int(word) for word in words)


def _rates(text: str | None) -> tuple[float, ...]:
    """'0.5,4,inf' -> (0.5, 4.0, inf); nothing -> ()."""
    if text is None:
        return ()
    try:
        rates = tuple(float(word) for word in _words(text))
    except ValueError:
        rates = ()
    if not rates or not all(rate > 0 for rate in rates):
        raise typer.BadParameter(
            f"found {text!r}; expected requests a second like 0.5,4,inf", param_hint="--request-rate"
        )
    return rates


def _at_least(found: float | None, option: str) -> None:
    """A number above nothing; NaN is none."""
    if found is not None and not found > 0:
        raise typer.BadParameter(f"found {found}; expected a number above 0", param_hint=option)


def _one_of(found: Any, choices: tuple[Any, ...], option: str) -> Any:
    if found not in choices:
        expected = " or ".join(map(str, choices))
        raise typer.BadParameter(f"found {found}; expected {expected}", param_hint=option)
    return found


if __name__ == "__main__":
    command()
