"""A source's files or hub name -> its rows as they stand there, one after the other. Knows no kinds of rows.

A file is read as its rows are asked for, but for .json, which is parsed whole.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal, cast

from serve.errors import DataError
from train.recipe.recipe import DatasetSource

Split = Literal["train", "valid", "test"]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv")
TABLES = (".parquet", ".csv")
"""Files whose rows all have the same columns."""
CSV_CELL_BYTES = 1 << 30
PARQUET_BATCH_ROWS = 1024

ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
"""First bytes of files that Windows programs write; the first that fits counts."""
CONTAINERS = ((b"\x1f\x8b", "gzip"), (b"PAR1", "parquet"), (b"PK\x03\x04", "a zip archive"))

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
    source, is_first = str(path), True
    try:
        with _opened(path) as lines:
            _check_encoding(path, lines.peek(8)[:8])
            for number, raw in enumerate(lines, 1):
                if not raw.strip():
                    continue
                row = _parsed(raw, source, number)
                if is_first:
                    _check_layout(path, raw.strip(), row, lines.peek(1))
                    is_first = False
                yield source, number, row
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not readable as gzip: {error}") from None


def _opened(path: Path) -> BufferedReader:
    return cast(BufferedReader, gzip.open(path) if path.name.endswith(".gz") else path.open("rb"))


def _check_encoding(path: Path, head: bytes) -> None:
    """DataError, with what to do, for a file whose first bytes say that it is none of UTF-8."""
    kind = next((kind for mark, kind in ENCODINGS if head.startswith(mark)), None)
    if kind is None and b"\0" in head[:4]:
        kind = "UTF-16LE" if head[1:2] == b"\0" else "UTF-16BE"
    if kind is not None:
        command = f"iconv -f {kind} -t UTF-8 {path.name} > utf8{suffix_of(path)}"
        raise DataError(f"{path}: is {kind}, not UTF-8; save it as UTF-8, for example by: {command}")
    what = next((what for mark, what in CONTAINERS if head.startswith(mark)), None)
    if what is not None:
        raise DataError(f"{path}: is {what}, whatever its name says; expected UTF-8 text here")


def _check_layout(path: Path, first: bytes, row: Any, following: bytes) -> None:
    """DataError for a .jsonl file that has not one row a line, told by its first line and what follows."""
    is_whole_file = not following.strip()
    if first.startswith(b"[") and (isinstance(row, DataError) or is_whole_file):
        raise DataError(
            f"{path}: holds one JSON array, and a .jsonl file has one row a line; name it "
            f"{path.name.removesuffix('.gz').removesuffix('.jsonl')}.json, which holds an array of rows"
        )
    if first == b"{" and following.lstrip().startswith(b'"'):
        raise DataError(
            f"{path}: its rows go over several lines, and a .jsonl file has each on one; write them so, or as an "
            f"array of rows in a .json file"
        )


class _RepeatedKey(ValueError):
    """A key that stands twice in one object: parsers differ in which one counts."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        values: dict[str, list[Any]] = {}
        for name, value in pairs:
            values.setdefault(name, []).append(value)
        name, (first, second, *_) = next((name, given) for name, given in values.items() if len(given) > 1)
        raise _RepeatedKey(
            f"the key {name!r} stands twice in one object, with {first!a:.40} and {second!a:.40}; keep one"
        )
    return found


def _parsed(raw: bytes, source: str, number: int) -> Any:
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        return DataError(f"{source}:{number}: not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return DataError(f"{source}:{number}: not UTF-8: {error.reason} at byte {error.start}")
    except _RepeatedKey as error:
        return DataError(f"{source}:{number}: {error}")


def _json_rows(path: Path) -> Iterator[Row]:
    raw = path.read_bytes()
    _check_encoding(path, raw[:8])
    try:
        rows = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        hint = "; a file of one row a line is named .jsonl" if error.msg == "Extra data" else ""
        raise DataError(
            f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}{hint}"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except _RepeatedKey as error:
        raise DataError(f"{path}: {error}") from None
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
        with path.open("rb") as file:
            _check_encoding(path, file.read(8))
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
        rows = _as_stored(rows)
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: not a file here, and the hub gives no such data: {error}") from error
    for number, row in enumerate(rows, 1):
        yield source, number, _without_nulls(row)


def _as_stored(rows: Any) -> Any:
    """A hub split whose pictures and sounds stay as their files are: they are decoded when they are needed."""
    for name, feature in (getattr(rows, "features", None) or {}).items():
        stored = _stored_feature(feature)
        if stored != feature:
            rows = rows.cast_column(name, stored)
    return rows


def _stored_feature(feature: Any) -> Any:
    if isinstance(feature, Mapping):
        return {name: _stored_feature(inside) for name, inside in feature.items()}
    if isinstance(feature, list):
        return [_stored_feature(inside) for inside in feature]
    if getattr(feature, "decode", None) is True:
        return dataclasses.replace(feature, decode=False)
    inside = getattr(feature, "feature", None)
    return dataclasses.replace(feature, feature=_stored_feature(inside)) if inside is not None else feature


def _without_nulls(value: Any) -> Any:
    """Columnar formats fill keys a row does not have with null; templates want them absent."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
