"""A split's Examples -> token rows and their report: from the cache on disk if they are there, else tokenized.

A row that stands several times (`weight: 2`) is tokenized once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from serve.errors import StorageError
from serve.model.template import ChatTemplate
from train.data import cache
from train.data.example import Example
from train.data.media_reader import MediaReader
from train.data.parallel import Told, outcomes_of
from train.data.rules import TokenRules
from train.data.tokens import Outcome, TokenizedExample, TokenizeReport, collect
from train.recipe.recipe import Recipe

KEPT_FROM_S = 1.0
"""Rows that took longer to tokenize are kept in the default folder; a named folder keeps all."""


@dataclass(frozen=True)
class Prepared:
    """Rows, what became of the examples, and what a person is told of how they were made."""

    rows: list[TokenizedExample]
    report: TokenizeReport
    notes: tuple[str, ...] = ()


def prepare_rows(
    name: str,
    examples: Sequence[Example],
    recipe: Recipe,
    template: ChatTemplate,
    rules: TokenRules,
    console: Console | None = None,
    reader: MediaReader | None = None,
) -> Prepared:
    """Tokenize a split, or take it from the cache; `name` is the split's. DataError as `tokens.tokenize`.

    reader  of what rows show, where the model takes media
    """
    unique = list({id(example): example for example in examples}.values())
    folder = Path(recipe.dataset_prepared_path or cache.default_folder()).expanduser()
    path = folder / f"{cache.key_of(unique, template, rules, reader)}{cache.SUFFIX}"
    outcomes, notes = _from_cache(name, path, unique, reader)
    if outcomes is None:
        outcomes, made = _tokenized(name, path, unique, recipe, template, rules, console, reader)
        notes += made
    if recipe.on_bad_row == "drop":
        outcomes = [without_problems(outcome, e) for outcome, e in zip(outcomes, unique, strict=True)]
    by_example = {id(example): outcome for example, outcome in zip(unique, outcomes, strict=True)}
    rows, report = collect(examples, (by_example[id(example)] for example in examples))
    return Prepared(rows, report, notes)


def without_problems(outcome: Outcome, example: Example) -> Outcome:
    """The outcome of a row with problems as that of a row left out because of them, whole."""
    if not outcome.problems:
        return outcome
    reasons = [problem.removeprefix(f"{example.place}: ") for problem in outcome.problems]
    return Outcome(dropped=("; ".join(reasons),))


def _from_cache(
    name: str, path: Path, examples: Sequence[Example], reader: MediaReader | None
) -> tuple[list[Outcome] | None, tuple[str, ...]]:
    start_s = time.perf_counter()
    try:
        outcomes = cache.load(path, examples, reader)
    except FileNotFoundError:
        return None, ()
    except cache.Damaged as error:
        return None, (f"{name}: {path} is damaged ({error}) and is made again",)
    seconds = time.perf_counter() - start_s
    return outcomes, (f"{name}: tokens of {len(examples):,} rows taken from {path} in {seconds:.2f} s",)


def _tokenized(
    name: str,
    path: Path,
    examples: Sequence[Example],
    recipe: Recipe,
    template: ChatTemplate,
    rules: TokenRules,
    console: Console | None,
    reader: MediaReader | None,
) -> tuple[list[Outcome], tuple[str, ...]]:
    start_s = time.perf_counter()
    with _bar(f"tokenize {name}", len(examples), console) as told:
        outcomes, num_processes = outcomes_of(examples, recipe, template, rules, told, reader)
    seconds = time.perf_counter() - start_s
    said = f"{name}: {len(examples):,} rows tokenized in {seconds:.2f} s"
    said += f" by {num_processes} processes" if num_processes > 1 else ""
    is_default = recipe.dataset_prepared_path is None
    if any(outcome.problems for outcome in outcomes) or (is_default and seconds < KEPT_FROM_S):
        return outcomes, (said,) if seconds >= KEPT_FROM_S else ()
    try:
        cache.save(path, outcomes)
        if is_default:
            cache.prune(path.parent)
    except (StorageError, OSError) as error:
        return outcomes, (said, str(error))
    return outcomes, (f"{said}, kept in {path}",)


@contextmanager
def _bar(title: str, total: int, console: Console | None) -> Iterator[Told]:
    """A progress bar on a terminal, nothing elsewhere."""
    bar = Progress(
        TextColumn(f"[bold]{title}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
        disable=console is None or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.update(task, completed=count)
