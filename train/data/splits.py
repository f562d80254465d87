"""A recipe's rows, split by split, ready to be batched: read, tokenized or taken from the cache, or streamed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from serve.model.loading import load_tokenizer
from serve.model.template import ChatTemplate
from serve.model.template_rules import make_template
from train.data.bad_rows import BadRows
from train.data.batches import WINDOW_BATCHES
from train.data.duplicates import DuplicateReport, content_key, report
from train.data.example import Example
from train.data.media_reader import MediaReader
from train.data.prepared import prepare_rows
from train.data.rows import Need
from train.data.rules import TokenRules
from train.data.sources import read, read_corpus, streamed_validation
from train.data.stream import StreamedRows, is_streamed
from train.data.tokens import TokenizedExample, TokenizeReport
from train.recipe.recipe import Recipe


@dataclass(frozen=True)
class Split:
    """One split of the data, as examples and as token rows. Of a stream: its first window, and no examples."""

    name: str
    examples: list[Example]
    rows: Sequence[TokenizedExample]
    report: TokenizeReport
    notes: tuple[str, ...] = ()
    """How its tokens were made, for a person."""

    @property
    def lengths(self) -> list[int]:
        return [row.length for row in self.rows]


@dataclass(frozen=True)
class Splits:
    """All that a run reads."""

    train: Split
    valid: Split | None
    test: Split | None
    duplicates: DuplicateReport


def read_splits(
    recipe: Recipe,
    template: ChatTemplate,
    rules: TokenRules,
    console: Console | None = None,
    needs: tuple[Need, ...] = (),
    reader: MediaReader | None = None,
) -> Splits:
    """The splits a recipe asks for; `console` shows progress. DataError as `sources.read` and `tokens.tokenize`.

    needs   columns without which a row of prompts cannot be used
    reader  of what rows show, where the model takes media
    """

    def prepared(name: str, examples: list[Example], bad: Iterable[str]) -> Split:
        made = prepare_rows(name, examples, recipe, template, rules, console, reader)
        return Split(name, examples, made.rows, made.report, (*bad, *made.notes))

    wants_valid = bool(recipe.val_batches)
    if is_streamed(recipe):
        bad_valid = BadRows(recipe.on_bad_row)
        held_out = streamed_validation(recipe, bad_valid) if wants_valid or recipe.val_set_size else []
        train, duplicates = _streamed(recipe, rules, held_out, reader), report([], held_out)
        notes = tuple(bad_valid.lines("valid"))
    else:
        corpus = read_corpus(recipe, needs)
        train = prepared("train", corpus.train, corpus.notes["train"])
        held_out, duplicates, notes = corpus.valid, corpus.duplicates, corpus.notes["valid"]
    valid = prepared("valid", held_out, notes) if wants_valid and held_out else None
    bad_test = BadRows(recipe.on_bad_row)
    test_rows = read(recipe, "test", bad_test, needs) if recipe.test else []
    test = prepared("test", test_rows, bad_test.lines("test")) if recipe.test else None
    return Splits(
        train=train,
        valid=valid if valid and valid.rows else None,
        test=test if test and test.rows else None,
        duplicates=duplicates,
    )


def _streamed(
    recipe: Recipe, rules: TokenRules, held_out: Sequence[Example], reader: MediaReader | None
) -> Split:
    def own_template() -> ChatTemplate:
        tokenizer = load_tokenizer(recipe.prompting_model, trust_remote_code=recipe.trust_remote_code)
        return make_template(tokenizer, rules.template)

    rows = StreamedRows(
        recipe,
        rules,
        own_template,
        window_rows=rows_per_batch(recipe) * WINDOW_BATCHES,
        first=int(recipe.val_set_size),
        held_out=[content_key(example) for example in held_out],
        marks=Path(recipe.adapter_path) / "stream.json",
        reader=reader,
    )
    found = rows.report(0)
    return Split("train", [], rows, found, ("train: streamed; counts are those of the first window of rows",))


def rows_per_batch(recipe: Recipe) -> int:
    """Rows of data in a batch: fewer than `batch_size` where each is answered several times."""
    return recipe.batch_size // (recipe.answering.num_generations if recipe.answering is not None else 1)
