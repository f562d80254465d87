"""What a person is told of a run's rows before it starts: counts, what was left out and why, lengths, duplicates.

One function a block; each gives what `serve.tables.show` prints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from serve.tables import Column, Table, numbers
from train.data.duplicates import DuplicateReport
from train.data.splits import Split
from train.data.tokens import TokenizeReport

BAR_WIDTH = 30
MAX_PLACES = 3
MAX_SOURCES = 20


def rows_table(splits: Sequence[Split]) -> Table:
    """A column a split."""
    table = Table("data", *numbers(*(split.name for split in splits)))
    reports = [split.report for split in splits]
    counts = {
        "rows read": [report.num_read for report in reports],
        "sequences": [report.num_sequences for report in reports],
        "truncated": [report.num_truncated for report in reports],
        "dropped": [sum(report.dropped.values()) for report in reports],
        "  without targets": [report.num_without_targets for report in reports],
        "tokens": [report.num_tokens for report in reports],
        "targets": [report.num_targets for report in reports],
        "longest": [report.longest for report in reports],
    }
    if any(report.num_media for report in reports):
        counts["media"] = [report.num_media for report in reports]
        counts["image tokens"] = [report.num_placeholders for report in reports]
    for name, values in counts.items():
        table.add(name, *(f"{value:,}" for value in values))
    table.add("target share", *(f"{r.num_targets / max(r.num_tokens, 1):.1%}" for r in reports))
    return table


def sources_table(split: Split) -> Table | None:
    """A line a file or hub split, where there are several."""
    if len(split.report.sources) < 2:
        return None
    names = ("rows", "sequences", "truncated", "dropped", "tokens", "targets")
    table = Table(f"{split.name} from", *numbers(*names))
    listed = list(split.report.sources.items())
    for source, counts in listed[:MAX_SOURCES]:
        values = (
            counts.num_read,
            counts.num_sequences,
            counts.num_truncated,
            counts.num_dropped,
            counts.num_tokens,
            counts.num_targets,
        )
        table.add(source, *(f"{value:,}" for value in values))
    if len(listed) > MAX_SOURCES:
        table.add(f"… and {len(listed) - MAX_SOURCES} more", *[""] * len(names))
    return table


def dropped_lines(split: Split) -> Iterator[str]:
    """A line a reason, with the first places."""
    for reason, count in split.report.dropped.items():
        yield f"{split.name}: {count:,} dropped: {reason}; {_first(split.report.places[reason], count)}"


def template_lines(split: Split) -> Iterator[str]:
    """What rows say and the chat template has no place for, and what was changed of them, once each."""
    for name, (count, first) in split.report.lost.items():
        yield (
            f"{split.name}: the chat template leaves out {name} in {count:,} rows (first: {first}); "
            f"what is trained does not hold it"
        )
    for note, (count, first) in split.report.notes.items():
        yield f"{split.name}: {count:,} rows {note} (first: {first})"


def duplicate_lines(found: DuplicateReport) -> Iterator[str]:
    """Repeats among the training rows, and rows that stand on both sides of the validation."""
    done = "left out" if found.removed else "kept; dataset_exact_deduplication: true leaves them out"
    if found.num_repeats:
        groups = "; ".join(" = ".join(places) for places in found.groups)
        yield f"train: {found.num_repeats:,} rows repeat the content of an earlier one ({done}): {groups}"
    if found.num_leaked:
        pairs = "; ".join(f"{train} = {valid}" for train, valid in found.leaks)
        yield f"leakage: {found.num_leaked:,} training rows stand in the validation rows too ({done}): {pairs}"


def histogram(report: TokenizeReport) -> Table:
    """How long the sequences are."""
    columns = (*numbers("tokens up to", "sequences"), Column(""))
    table = Table(*columns, title="length of training sequences")
    return _with_bars(table, report.histogram)


def media_histogram(report: TokenizeReport) -> Table | None:
    """How many tokens of the sequences stand for pictures, clips and sounds; None where none does."""
    if not report.media_histogram:
        return None
    columns = (*numbers("image tokens up to", "sequences"), Column(""))
    table = Table(*columns, title="image tokens of training sequences that show something")
    return _with_bars(table, report.media_histogram)


def _with_bars(table: Table, bins: Sequence[tuple[int, int]]) -> Table:
    most = max((count for _, count in bins), default=1)
    for bound, count in bins:
        table.add(f"{bound:,}", f"{count:,}", "█" * round(BAR_WIDTH * count / max(most, 1)))
    return table


def reasons(report: TokenizeReport) -> str:
    """Why rows were dropped, in a line."""
    return ", ".join(f"{reason}: {count}" for reason, count in report.dropped.items())


def _first(places: Sequence[str], count: int) -> str:
    shown = ", ".join(places[:MAX_PLACES])
    return f"first: {shown}" if count > MAX_PLACES else f"at {shown}"
