"""`lathe ab`: experiments, read from the server's store."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from serve.commands.options import JsonFile
from serve.commands.output import new_console, save_json, say

if TYPE_CHECKING:
    from serve.experiments.store import Store

app = typer.Typer()
ab_app = typer.Typer(help="Look at experiments.", no_args_is_help=True)
app.add_typer(ab_app, name="ab")

DEFAULT_STORE = "sqlite:///lathe.sqlite"
ExperimentName = Annotated[str, typer.Argument(metavar="NAME", help="The experiment's public name.")]
StoreUrl = Annotated[str, typer.Option(help="The server's `store`.")]


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
    show(new_console(), *render(found))
    save_json(json_file, found.to_dict())


@ab_app.command("runs")
def ab_runs(experiment: ExperimentName, store: StoreUrl = DEFAULT_STORE) -> None:
    """List an experiment's runs, the newest first: other variants, weights or salt begin another."""
    from serve.experiments.report import runs_table
    from serve.tables import show

    with _store(store) as opened:
        show(new_console(), runs_table(opened.runs(experiment)))


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
    say(f"deleted {what}")


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
