"""`lathe bench`: the servers' benchmarks and, beside them, training's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serve.commands import bench, bench_serve
from serve.commands.options import JsonFile, check_writable
from serve.commands.output import at_work, dim, new_console, save_json

app = typer.Typer()
bench_app = typer.Typer(help="Measure servers and training.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
training = typer.Typer()
for each in (bench_serve.app, bench.app, training):
    bench_app.add_typer(each)


@training.command("train")
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
    from serve.tables import show
    from train.bench import compare, sighted_compare

    check_writable(json_file)
    if pictures:
        if model is not None:
            raise typer.BadParameter("the rows are made for the random models", param_hint="--model")
        seeing = sighted_compare.SightedBench(num_batches=iters, batch_size=batch_size, rounds=rounds)
        with at_work(folder) as (home, progress):
            seen = sighted_compare.run(seeing, home, progress)
        show(new_console(), *sighted_compare.tables(seen), *dim(sighted_compare.notes(seen)))
        save_json(json_file, seen.as_json(seeing))
        return
    asked = compare.TrainBench(num_batches=iters, batch_size=batch_size, rounds=rounds, model=model)
    with at_work(folder) as (home, progress):
        outcome = compare.run(asked, home, progress)
    show(new_console(), *compare.tables(outcome), *dim(compare.notes(outcome)))
    save_json(json_file, outcome.as_json(asked))
