"""`lathe train`, `runs`, `export`, `demo` and `data`: from rows to an adapter, and on to a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.commands.options import ApiKey, JsonFile, Overrides, check_writable, one_of, overrides_of
from serve.commands.output import new_console, save_json

HOME = Path(__file__).resolve().parents[1]
"""Where data/ and recipes/ stand: a checkout of the project."""
app = typer.Typer()
data_app = typer.Typer(help="Look at training rows.", no_args_is_help=True)
app.add_typer(data_app, name="data")


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
    api_key: ApiKey = None,
    overrides: Overrides = None,
) -> None:
    """Train an adapter, or the whole model, from a recipe."""
    from train.recipe.recipe import load_recipe

    keys = overrides_of({"serve_to": serve_to})
    checked = load_recipe(recipe, [*keys, *(overrides or ())])
    from train.run import run  # seconds, which a recipe that is wrong need not wait for

    summary = run(
        checked,
        dry_run=dry_run,
        resume=resume,
        overwrite=overwrite,
        console=new_console(),
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

    console = new_console()
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
    save_json(json_file, listing.as_json(found))


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

    chosen = one_of(split, ("train", "valid", "test"), "--split")
    show(load_recipe(recipe, overrides or ()), new_console(), split=chosen, rows=rows, row=row)


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
        bits=None if bits is None else one_of(bits, (4, 8), "--bits"),
        group_size=one_of(group_size, (32, 64, 128), "--group-size"),
        dtype=None if dtype is None else one_of(dtype, ("float16", "bfloat16", "float32"), "--dtype"),
        quantize_vision=quantize_vision,
    )
    check_writable(json_file)
    report = fuse(adapter, out, form, base=base, rows=Rows(data, rows), force=force, console=new_console())
    save_json(json_file, asdict(report))


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

    save_json(json_file, run(HOME, folder, new_console(), keep=keep))
