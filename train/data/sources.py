"""A recipe's data -> Examples: local .jsonl, .json and .parquet files, folders of them, and hub datasets.

Problems are collected, up to 20, and raised as one DataError that names file and line (for .json, .parquet and hub
rows, the row's number). The validation split is drawn from the recipe's seed alone; no tokens are made here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from serve.errors import DataError
from train.data.example import Example
from train.data.rows import parse_row
from train.recipe import DatasetSource, Recipe

Split = Literal["train", "valid", "test"]
SUFFIXES = (".jsonl", ".json", ".parquet")
MAX_PROBLEMS = 20


def read(recipe: Recipe, split: Split) -> list[Example]:
    """The rows of a split, in the order written; sources follow each other.

    `valid` is the sources' own validation rows, or the share `val_set_size` takes from the training rows, or nothing.
    DataError for broken rows, for no training or test rows at all, and for validation rows given in two ways.
    """
    entries = recipe.sources()
    if split == "test":
        test = [example for rows in _read_all(entries, "test", recipe) for example in rows]
        if not test:
            raise DataError(
                f"no test rows in {_names(entries)}; a folder's stand in test.jsonl, or name test_split"
            )
        return test
    valid = [example for rows in _read_all(entries, "valid", recipe) for example in rows]
    if valid and recipe.val_set_size:
        raise DataError(
            f"val_set_size is {recipe.val_set_size}, but {valid[0].source} holds validation rows already; keep one"
        )
    if split == "valid" and not recipe.val_set_size:
        return valid
    train = _read_all(entries, "train", recipe)
    if not any(train):
        raise DataError(f"no training rows in {_names(entries)}")
    taken = _validation_indices(sum(map(len, train)), recipe)
    held_out, remaining = _divide(train, taken)
    if split == "valid":
        return held_out
    return [
        example
        for entry, rows in zip(entries, remaining, strict=True)
        for example in _weighted(rows, entry.weight, recipe.seed)
    ]


def _names(entries: Sequence[DatasetSource]) -> str:
    return ", ".join(entry.path for entry in entries)


def _read_all(entries: Sequence[DatasetSource], split: Split, recipe: Recipe) -> list[list[Example]]:
    roles = recipe.roles_to_train if recipe.mask_prompt else ()
    problems: list[str] = []
    found: list[list[Example]] = []
    for entry in entries:
        examples: list[Example] = []
        for source, line, row in _rows(entry, split):
            try:
                if isinstance(row, DataError):
                    raise row
                examples.append(parse_row(row, entry, roles, source, line))
            except DataError as error:
                problems += str(error).splitlines()
            if len(problems) >= MAX_PROBLEMS:
                problems.append("… and perhaps more; these are the first")
                raise DataError("\n".join(problems))
        found.append(examples)
    if problems:
        raise DataError("\n".join(problems))
    return found


# Files and hub names -> (source, line, row). A row that cannot be parsed is given as its DataError.

Row = tuple[str, int, Any]


def _rows(entry: DatasetSource, split: Split) -> Iterator[Row]:
    path = Path(entry.path)
    named = {"train": entry.split, "valid": entry.valid_split, "test": entry.test_split}[split]
    if path.is_dir():
        yield from _folder_rows(path, named, split)
    elif path.is_file():
        if entry.split != "train" or entry.valid_split or entry.test_split:
            raise DataError(
                f"{path}: a single file has no splits; give a folder, or take rows by val_set_size"
            )
        if split == "train":
            yield from _file_rows(path)
    elif (
        path.suffix in SUFFIXES
        or path.is_absolute()
        or entry.path.startswith(".")
        or entry.path.count("/") > 1
    ):
        raise DataError(f"{path}: no such file or folder")
    else:
        yield from _hub_rows(entry, named, split)


def _folder_rows(folder: Path, named: str | None, split: Split) -> Iterator[Row]:
    stem = named or split
    files = [folder / f"{stem}{suffix}" for suffix in SUFFIXES]
    present = [file for file in files if file.is_file()]
    if len(present) > 1:
        raise DataError(f"{folder}: found {' and '.join(file.name for file in present)}; keep one")
    if present:
        yield from _file_rows(present[0])
    elif split == "train" or named is not None:
        raise DataError(f"{folder}: expected {stem}.jsonl, {stem}.json or {stem}.parquet in it; found none")


def _file_rows(path: Path) -> Iterator[Row]:
    if path.suffix == ".jsonl":
        yield from _jsonl_rows(path)
    elif path.suffix == ".json":
        yield from _json_rows(path)
    elif path.suffix == ".parquet":
        yield from _parquet_rows(path)
    else:
        raise DataError(f"{path}: found a {path.suffix or 'nameless'} file; expected {', '.join(SUFFIXES)}")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            try:
                yield str(path), number, json.loads(raw.decode("utf-8-sig"))
            except json.JSONDecodeError as error:
                message = f"{path}:{number}: not JSON: {error.msg} at column {error.colno}"
                yield str(path), number, DataError(message)
            except UnicodeDecodeError as error:
                message = f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start}"
                yield str(path), number, DataError(message)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: found one {type(rows).__name__}; expected a list of rows (or one row a line in .jsonl)"
        )
    for number, row in enumerate(rows, 1):
        yield str(path), number, row


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield str(path), number, _without_nulls(row)


def _hub_rows(entry: DatasetSource, named: str | None, split: Split) -> Iterator[Row]:
    """A hub dataset's split; validation and test rows that are not named are taken if the dataset has them."""
    import datasets

    source = f"{entry.path}[{named or split}]"
    try:
        if named is not None:
            rows = datasets.load_dataset(entry.path, split=named, **entry.config)
        else:
            rows = datasets.load_dataset(entry.path, **entry.config).get(split, [])
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: not a file here, and the hub gives no such data: {error}") from error
    for number, row in enumerate(rows, 1):
        yield source, number, _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Columnar formats fill keys a row does not have with null; templates want them absent."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# Dividing and weighting


def _validation_indices(total: int, recipe: Recipe) -> set[int]:
    size = recipe.val_set_size
    if not size:
        return set()
    count = max(1, round(size * total)) if isinstance(size, float) else size
    if count >= total:
        raise DataError(f"val_set_size {size} takes {count} of {total} rows and leaves none to train on")
    rng = np.random.default_rng([recipe.seed, 1])
    return set(rng.permutation(total)[:count].tolist())


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
