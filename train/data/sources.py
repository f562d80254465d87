"""A recipe's data -> Examples, split and weighted. Files are `files`', single rows are `rows`'.

Bad rows are raised as one DataError that names file and line (for .json, .parquet and hub rows, the row's number), or
left out, as the recipe says. The validation split is drawn from the recipe's seed alone; no tokens are made here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from serve.errors import DataError
from train.data.bad_rows import BadRows
from train.data.duplicates import DuplicateReport, content_key, without_duplicates
from train.data.duplicates import report as report_duplicates
from train.data.example import Example
from train.data.files import TABLES, Row, Split, rows_of, suffix_of
from train.data.rows import Need, Rules, parse_row, unusable
from train.recipe.recipe import DatasetSource, Recipe


@dataclass(frozen=True)
class Corpus:
    """A recipe's training and validation rows, and what repeats in them. Training rows are weighted already."""

    train: list[Example]
    valid: list[Example]
    duplicates: DuplicateReport
    notes: dict[str, tuple[str, ...]]
    """Split → what a person is told of its bad rows, where those are left out."""


def read(
    recipe: Recipe, split: Split, bad: BadRows | None = None, needs: tuple[Need, ...] = ()
) -> list[Example]:
    """The rows of a split, in the order written; sources follow each other.

    `valid` is the sources' own validation rows, or the share `val_set_size` takes from the training rows, or nothing.
    bad    takes note of rows that cannot be used; None: as on_bad_row says, without a word of those left out
    needs  columns without which a row cannot be used
    DataError for broken rows, for no training or test rows at all, and for validation rows given in two ways.
    """
    entries = recipe.sources()
    bad = bad or BadRows(recipe.on_bad_row)
    if split == "test":
        test = [example for rows in _read_all(entries, "test", recipe, bad, needs) for example in rows]
        if not test:
            raise DataError(
                f"no test rows in {_names(entries)}; a folder's stand in test.jsonl, or name test_split"
            )
        return test
    if split == "valid" and not recipe.val_set_size:
        return _own_validation(recipe, bad, needs)
    return getattr(read_corpus(recipe, needs), split)


def read_corpus(recipe: Recipe, needs: tuple[Need, ...] = ()) -> Corpus:
    """Training and validation rows of a recipe that does not stream. `needs` and what is raised as in `read`."""
    entries = recipe.sources()
    bad = {"train": BadRows(recipe.on_bad_row), "valid": BadRows(recipe.on_bad_row)}
    valid = _own_validation(recipe, bad["valid"], needs)
    train = _read_all(entries, "train", recipe, bad["train"], needs)
    if not any(train):
        why = "\n".join(["", *bad["train"].lines("train")])
        raise DataError(f"no training rows in {_names(entries)}{why.rstrip()}")
    duplicates = report_duplicates(
        [example for rows in train for example in rows], valid, removed=recipe.dataset_exact_deduplication
    )
    if recipe.dataset_exact_deduplication:
        seen = list(valid)
        for index, rows in enumerate(train):
            train[index] = without_duplicates(rows, seen)
            seen += train[index]
        if not any(train):
            raise DataError(
                "dataset_exact_deduplication leaves no training rows: all stand in the validation rows"
            )
    if recipe.val_set_size:
        held_out = _validation_indices([example for rows in train for example in rows], recipe)
        valid, train = _divide(train, held_out)
    weighted = [
        example
        for entry, rows in zip(entries, train, strict=True)
        for example in _weighted(rows, entry.weight, recipe.seed)
    ]
    return Corpus(weighted, valid, duplicates, {name: tuple(rows.lines(name)) for name, rows in bad.items()})


def streamed_validation(recipe: Recipe, bad: BadRows) -> list[Example]:
    """Validation rows of a recipe that streams: the sources' own, or the first `val_set_size` of the stream."""
    valid = _own_validation(recipe, bad)
    if valid or not recipe.val_set_size:
        return valid
    wanted = int(recipe.val_set_size)
    examples = list(bad.of_split(islice(stream_examples(recipe), wanted)))
    bad.finish()
    return examples


def stream_examples(recipe: Recipe) -> Iterator[Example | DataError]:
    """The training rows of a recipe that streams, without end: sources take turns by weight and start over.

    The same rows each time. A row that cannot be used is given as its DataError; DataError for an empty source.
    """
    entries = recipe.sources()
    readers = [_endless(Rules.of(recipe, entry)) for entry in entries]
    taken = [0] * len(entries)
    while True:
        # The source that is furthest behind its weight: every prefix of the stream holds them in proportion.
        source = min(range(len(entries)), key=lambda i: ((taken[i] + 1) / entries[i].weight, i))
        taken[source] += 1
        yield next(readers[source])


def _endless(rules: Rules) -> Iterator[Example | DataError]:
    while True:
        count = 0
        for found in _examples(rules, "train"):
            count += 1
            yield found
        if not count:
            raise DataError(f"no training rows in {rules.entry.path}")


def _own_validation(recipe: Recipe, bad: BadRows, needs: tuple[Need, ...] = ()) -> list[Example]:
    """Validation rows that the sources bring themselves."""
    valid = [example for rows in _read_all(recipe.sources(), "valid", recipe, bad, needs) for example in rows]
    if valid and recipe.val_set_size:
        raise DataError(
            f"val_set_size is {recipe.val_set_size}, but {valid[0].source} holds validation rows already; keep one"
        )
    return valid


def _names(entries: Sequence[DatasetSource]) -> str:
    return ", ".join(entry.path for entry in entries)


def _read_all(
    entries: Sequence[DatasetSource], split: Split, recipe: Recipe, bad: BadRows, needs: tuple[Need, ...]
) -> list[list[Example]]:
    """The Examples of each source. DataError for bad rows, where they are raised."""
    sources = [list(bad.of_split(_examples(Rules.of(recipe, entry, needs), split))) for entry in entries]
    bad.finish()
    return sources


def _examples(rules: Rules, split: Split) -> Iterator[Example | DataError]:
    """A source's rows as Examples; one that cannot be used is given as its DataError."""
    is_first = True
    for source, line, row in rows_of(rules.entry, split):
        if is_first:
            _check_columns((source, line, row), rules)
            is_first = False
        try:
            if isinstance(row, DataError):
                raise row
            yield parse_row(row, rules, source, line)
        except DataError as error:
            yield error


def _check_columns(first: Row, rules: Rules) -> None:
    """A table whose columns are the wrong ones is one problem, not one a row."""
    source, _, row = first
    if suffix_of(Path(source)) not in TABLES or isinstance(row, DataError):
        return
    reason = unusable(row, rules)
    if reason:
        raise DataError(f"{source}: its columns are no use: {reason}")


# Dividing and weighting


def _validation_indices(rows: Sequence[Example], recipe: Recipe) -> set[int]:
    """Rows to hold out, rows of one content together: duplicates never stand on both sides."""
    size, total = recipe.val_set_size, len(rows)
    count = max(1, round(size * total)) if isinstance(size, float) else size
    if count >= total:
        raise DataError(f"val_set_size {size} takes {count} of {total} rows and leaves none to train on")
    groups: dict[bytes, list[int]] = {}
    for index, example in enumerate(rows):
        groups.setdefault(content_key(example), []).append(index)
    apart = list(groups.values())
    if len(apart) < 2:
        raise DataError(
            f"val_set_size {size}: all {total} rows have the same content; there is nothing to divide"
        )
    taken: set[int] = set()
    for place in np.random.default_rng([recipe.seed, 1]).permutation(len(apart)).tolist():
        if len(taken) + len(apart[place]) <= count:
            taken.update(apart[place])
        if len(taken) == count:
            break
    if not taken:
        smallest = min(map(len, apart))
        raise DataError(
            f"val_set_size {size} is {count} rows, but the same content stands in {smallest} at least"
        )
    return taken


def _divide(
    groups: Sequence[Sequence[Example]], taken: set[int]
) -> tuple[list[Example], list[list[Example]]]:
    held_out: list[Example] = []
    remaining: list[list[Example]] = []
    index = 0
    for rows in groups:
        remaining.append([])
        for example in rows:
            (held_out if index in taken else remaining[-1]).append(example)
            index += 1
    return held_out, remaining


def _weighted(rows: list[Example], weight: float, seed: int) -> list[Example]:
    """All rows as often as `weight` is whole, and a fixed share of them for its fraction."""
    whole, part = int(weight), round((weight - int(weight)) * len(rows))
    some = sorted(np.random.default_rng([seed, 2]).permutation(len(rows))[:part].tolist())
    return rows * whole + [rows[index] for index in some]
