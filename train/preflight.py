"""Everything about a run that can be known without loading weights; `--dry-run` prints it and ends there.

A recipe goes in; out come tokenized rows, batches and what was dropped and why. Shares all of it with the real run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.table import Table

from serve.errors import DataError
from serve.model.loading import load_tokenizer
from serve.model.template import ChatTemplate
from serve.settings import dump
from train.data.batches import Batch, BatchPlan, collate, validation_rows
from train.data.example import Example
from train.data.sources import Split as SplitName
from train.data.sources import read
from train.data.tokens import TokenizedExample, TokenizeReport, tokenize
from train.recipe import Recipe

BAR_WIDTH = 30


@dataclass(frozen=True)
class Split:
    """One split of the data, as examples and as token rows."""

    name: str
    examples: list[Example]
    rows: list[TokenizedExample]
    report: TokenizeReport

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.rows]


@dataclass(frozen=True)
class Preflight:
    """A run that is ready to start, but for its weights. `num_iterations` counts batches."""

    recipe: Recipe
    tokenizer: TokenizerWrapper
    template: ChatTemplate
    train: Split
    valid: Split | None
    test: Split | None
    plan: BatchPlan
    num_iterations: int

    @property
    def num_steps(self) -> int:
        """Optimizer updates."""
        return -(-self.num_iterations // self.recipe.grad_accumulation_steps)

    @property
    def data_hash(self) -> str:
        """Of the training rows as trained on: their tokens, in order, and which of them count."""
        digest = hashlib.sha256()
        for row in self.train.rows:
            digest.update(row.token_ids.tobytes() + b"|" + row.is_target.tobytes() + b"\n")
        return f"sha256:{digest.hexdigest()}"

    def batch_at(self, iteration: int) -> Batch:
        """The batch of any iteration, from its number alone."""
        return collate(self.train.rows, self.plan.rows(iteration))

    def name_row(self, row_id: int) -> str:
        """`file:line` of a training row."""
        row = self.train.rows[row_id]
        return f"{row.source}:{row.line}"

    def valid_batches(self) -> list[Batch]:
        """The fixed validation batches."""
        return _fixed_batches(self.valid, self.recipe.batch_size, self.recipe.val_batches)

    def test_batches(self) -> list[Batch]:
        """The batches of the test after training."""
        return _fixed_batches(self.test, self.recipe.batch_size, self.recipe.test_batches)


def prepare(recipe: Recipe) -> Preflight:
    """Read, tokenize and plan. DataError when there is nothing to train on, or no validation where one is needed."""
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=recipe.trust_remote_code)
    template = ChatTemplate(tokenizer)
    train = _split("train", recipe, tokenizer, template)
    valid = _split("valid", recipe, tokenizer, template) if recipe.val_batches else None
    test = _split("test", recipe, tokenizer, template) if recipe.test else None
    if not train.rows:
        raise DataError(f"no training rows are left: {_reasons(train.report) or 'the source is empty'}")
    needs = [
        name
        for name in ("load_best_model_at_end", "early_stopping_patience", "metric")
        if getattr(recipe, name)
    ]
    if needs and not (valid and valid.rows):
        raise DataError(f"{', '.join(needs)} need validation rows; add a valid split, or set val_set_size")
    plan = BatchPlan(train.lengths, recipe.batch_size, recipe.seed)
    num_iterations = recipe.iters or math.ceil((recipe.epochs or 1.0) * plan.batches_per_epoch)
    return Preflight(
        recipe=recipe,
        tokenizer=tokenizer,
        template=template,
        train=train,
        valid=valid if valid and valid.rows else None,
        test=test if test and test.rows else None,
        plan=plan,
        num_iterations=num_iterations,
    )


def _split(name: SplitName, recipe: Recipe, tokenizer: TokenizerWrapper, template: ChatTemplate) -> Split:
    examples = read(recipe, name)
    rows, report = tokenize(examples, template, tokenizer, recipe)
    return Split(name, examples, rows, report)


def _fixed_batches(split: Split | None, batch_size: int, num_batches: int) -> list[Batch]:
    if split is None:
        return []
    return [collate(split.rows, rows) for rows in validation_rows(split.lengths, batch_size, num_batches)]


def show(preflight: Preflight, console: Console, *, with_recipe: bool = False) -> None:
    """Print it. `with_recipe` adds the resolved recipe and the histogram of lengths."""
    if with_recipe:
        console.print("[bold]resolved recipe")
        console.print(dump(preflight.recipe), highlight=False, markup=False)
    console.print(_rows_table([s for s in (preflight.train, preflight.valid, preflight.test) if s]))
    for split in (preflight.train, preflight.valid, preflight.test):
        if split and split.report.dropped:
            places = ", ".join(split.report.dropped_places)
            console.print(f"{split.name}: dropped {_reasons(split.report)}; first: {places}", highlight=False)
    if with_recipe:
        console.print(_histogram(preflight.train.report))
    console.print(_clocks(preflight), highlight=False)


def _rows_table(splits: Sequence[Split]) -> Table:
    table = Table("data", *(split.name for split in splits))
    for column in table.columns[1:]:
        column.justify = "right"
    reports = [split.report for split in splits]
    counts = {
        "rows read": [report.num_read for report in reports],
        "sequences": [report.num_sequences for report in reports],
        "truncated": [report.num_truncated for report in reports],
        "dropped": [sum(report.dropped.values()) for report in reports],
        "tokens": [report.num_tokens for report in reports],
        "targets": [report.num_targets for report in reports],
        "longest": [report.longest for report in reports],
    }
    for name, values in counts.items():
        table.add_row(name, *(f"{value:,}" for value in values))
    table.add_row("target share", *(f"{r.num_targets / max(r.num_tokens, 1):.1%}" for r in reports))
    return table


def _histogram(report: TokenizeReport) -> Table:
    table = Table("tokens up to", "sequences", "", title="length of training sequences", title_justify="left")
    most = max((count for _, count in report.histogram), default=1)
    for bound, count in report.histogram:
        table.add_row(f"{bound:,}", f"{count:,}", "█" * round(BAR_WIDTH * count / max(most, 1)))
    return table


def _clocks(preflight: Preflight) -> str:
    recipe, per_epoch = preflight.recipe, preflight.plan.batches_per_epoch
    source = f"iters {recipe.iters}" if recipe.iters else f"epochs {recipe.epochs:g}"
    return (
        f"{source} is the clock: {preflight.num_iterations:,} batches of {recipe.batch_size}, "
        f"{preflight.num_steps:,} optimizer steps of {recipe.grad_accumulation_steps} batches; "
        f"an epoch is {per_epoch:,} batches, the run {preflight.num_iterations / per_epoch:.2f} epochs; "
        f"padding {preflight.plan.padding_share:.1%}"
    )


def _reasons(report: TokenizeReport) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in report.dropped.items())
