"""A source's files or hub name -> its rows as they stand there, one after the other. Knows no kinds of rows.

A file is read as its rows are asked for, but for .json, which is parsed whole.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

from serve.errors import DataError
from train.recipe.recipe import DatasetSource

Split = Literal["train", "valid", "test"]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
TABLES = (".parquet", ".csv")
"""Files whose rows all have the same columns."""
CSV_CELL_BYTES = 1 << 30
PARQUET_BATCH_ROWS = 1024

Row = tuple[str, int, Any]
"""(source, line, row): `line` counts from 1; a row that cannot be parsed is given as its DataError."""


def rows_of(entry: DatasetSource, split: Split) -> Iterator[Row]:
    """The rows of a split of a source. DataError if there is no such thing; nothing for a split it may lack."""
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
        suffix_of(path) in SUFFIXES
        or path.is_absolute()
        or entry.path.startswith(".")
        or entry.path.count("/") > 1
    ):
        raise DataError(f"{path}: no such file or folder")
    else:
        yield from _hub_rows(entry, named, split)


def suffix_of(path: Path) -> str:
    """`.jsonl.gz` counts as one."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), path.suffix)


def _folder_rows(folder: Path, named: str | None, split: Split) -> Iterator[Row]:
    stem = named or split
    files = [folder / f"{stem}{suffix}" for suffix in SUFFIXES]
    present = [file for file in files if file.is_file()]
    if len(present) > 1:
        raise DataError(f"{folder}: found {' and '.join(file.name for file in present)}; keep one")
    if present:
        yield from _file_rows(present[0])
    elif split == "train" or named is not None:
        raise DataError(f"{folder}: expected {_listing(stem)} in it; found none")


def _listing(stem: str = "") -> str:
    return f"{', '.join(stem + suffix for suffix in SUFFIXES[:-1])} or {stem}{SUFFIXES[-1]}"


def _file_rows(path: Path) -> Iterator[Row]:
    readers = {
        ".jsonl": _jsonl_rows,
        ".jsonl.gz": _jsonl_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
        ".csv": _csv_rows,
    }
    suffix = suffix_of(path)
    if suffix not in readers:
        raise DataError(f"{path}: found a {suffix or 'nameless'} file; expected {_listing()}")
    yield from readers[suffix](path)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    source = str(path)
    try:
        with _opened(path) as lines:
            for number, raw in enumerate(lines, 1):
                if raw.strip():
                    yield source, number, _parsed(raw, source, number)
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not readable as gzip: {error}") from None


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.name.endswith(".gz") else path.open("rb")


def _parsed(raw: bytes, source: str, number: int) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        return DataError(f"{source}:{number}: not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return DataError(f"{source}:{number}: not UTF-8: {error.reason} at byte {error.start}")


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

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield str(path), number, _without_nulls(row)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from None


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows by the header's names, an empty cell being absent. `line` is where a row starts; cells may have lines."""
    csv.field_size_limit(CSV_CELL_BYTES)  # Python's own bound, 128 KiB, is shorter than documents
    source = str(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            cells = csv.reader(file, strict=True)
            header = _header(next(cells, []), source)
            line = cells.line_num + 1
            for row in cells:
                if row:
                    yield source, line, _csv_row(header, row, source, line)
                line = cells.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}: not readable as CSV: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def _header(names: Sequence[str], source: str) -> Sequence[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not all(name.strip() for name in names):
        found = ", ".join(map(repr, names))
        raise DataError(f"{source}:1: found the header {found}; expected a different name for each column")
    return names


def _csv_row(header: Sequence[str], row: Sequence[str], source: str, line: int) -> Any:
    if len(row) != len(header):
        return DataError(f"{source}:{line}: found {len(row)} cells; the header has {len(header)}")
    return {name: cell for name, cell in zip(header, row, strict=True) if cell}


def _hub_rows(entry: DatasetSource, named: str | None, split: Split) -> Iterator[Row]:
    """A hub dataset's split; validation and test rows that are not named are taken if the dataset has them."""
    import datasets

    source = f"{entry.path}[{named or split}]"
    further = {**entry.config, "streaming": True} if entry.streaming else entry.config
    try:
        if named is not None:
            rows = datasets.load_dataset(entry.path, split=named, **further)
        else:
            rows = datasets.load_dataset(entry.path, **further).get(split, [])
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: not a file here, and the hub gives no such data: {error}") from error
    for number, row in enumerate(rows, 1):
        yield source, number, _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    """Columnar formats fill keys a row does not have with null; templates want them absent."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
