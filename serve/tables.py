"""The one way to print a table. Columns and cells in; lines out that hold every number and name whole, at any width.

Too wide for the console, a table first breaks its headings, then its columns of words, at spaces. If that is not
enough it becomes a list: a record a row, a line a cell. Nothing is cut, and nothing is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

GAP = 2
INDENT = 2
LEAST_OF_WORDS = 20
"""Cells for a last column of words: a longer word stands out of it to the right, where nothing follows."""


@dataclass(frozen=True)
class Column:
    """`justify` is for cells and heading. Cells of words may go on in the next line; others never do."""

    heading: str
    justify: Literal["left", "right"] = "left"
    is_words: bool = False


def numbers(*headings: str) -> tuple[Column, ...]:
    """A column for each heading, aligned for numbers."""
    return tuple(Column(heading, "right") for heading in headings)


def words(heading: str) -> Column:
    """A column of words."""
    return Column(heading, is_words=True)


class Table:
    """Rows under headings. The first column names the row. Not a rich renderable, since `Console.print` would cut
    it to the console's width: print it with `show`."""

    def __init__(self, *columns: Column | str, title: str = "", has_headings: bool = True) -> None:
        self.columns = tuple(Column(each) if isinstance(each, str) else each for each in columns)
        self.title = title
        self.rows: list[tuple[Text, ...]] = []
        self._has_headings = has_headings

    def add(self, *cells: str | Text) -> None:
        """A row: a cell a column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"found {len(cells)} cells; the table has {len(self.columns)} columns")
        self.rows.append(tuple(Text(each) if isinstance(each, str) else each for each in cells))

    def lines(self, width: int) -> Iterator[Text]:
        """What to print on a console of so many cells. Only a title, or a long word at a line's end, is wider."""
        if self.title:
            yield Text(self.title, style="italic")
        widths = self._widths(width)
        yield from self._list(width) if widths is None else self._grid(widths)

    def _widths(self, width: int) -> list[int] | None:
        """Of the columns, as little broken as fits; None if nothing does."""
        room = width - GAP * (len(self.columns) - 1)
        cells = [[row[index] for row in self.rows] for index in range(len(self.columns))]
        whole = [_longest(line for cell in each for line in cell.plain.split("\n")) for each in cells]
        single = [_longest(word for cell in each for word in cell.plain.split()) for each in cells]
        headings = [column.heading if self._has_headings else "" for column in self.columns]
        heads = [_longest([heading]) for heading in headings]
        broken_heads = [_longest(heading.split()) for heading in headings]
        least = [
            word if column.is_words else whole_cell
            for column, word, whole_cell in zip(self.columns, single, whole, strict=True)
        ]
        if self.columns[-1].is_words and self.columns[-1].justify == "left":
            least[-1] = min(least[-1], LEAST_OF_WORDS)
        for wanted in (_each_max(whole, heads), _each_max(whole, broken_heads)):
            if sum(wanted) <= room:
                return wanted
        narrowest = _each_max(least, broken_heads)
        return _grown(narrowest, wanted, room) if sum(narrowest) <= room else None

    def _grid(self, widths: Sequence[int]) -> Iterator[Text]:
        if self._has_headings:
            yield from self._row([Text(each.heading, style="bold") for each in self.columns], widths)
            yield Text("─" * (sum(widths) + GAP * (len(widths) - 1)), style="dim")
        for cells in self.rows:
            yield from self._row(cells, widths)

    def _row(self, cells: Sequence[Text], widths: Sequence[int]) -> Iterator[Text]:
        """As many lines as the tallest cell has. No line ends in spaces."""
        broken = [list(_wrapped(cell, width)) for cell, width in zip(cells, widths, strict=True)]
        for number in range(max(map(len, broken))):
            parts = [lines[number] if number < len(lines) else Text() for lines in broken]
            filled = [
                _filled(part, width, column.justify)
                for part, width, column in zip(parts, widths, self.columns, strict=True)
            ]
            line = Text(" " * GAP).join(filled)
            line.rstrip()
            yield line

    def _list(self, width: int) -> Iterator[Text]:
        """Each row's first cell, and under it the others that hold something, each after its heading."""
        columns = self.columns[1:]
        label = _longest(column.heading for column in columns) + GAP if self._has_headings else 0
        for name, *cells in self.rows:
            yield from _wrapped(name, width)
            for column, cell in zip(columns, cells, strict=True):
                if cell.plain.strip():
                    heading = column.heading if self._has_headings else ""
                    yield from _item(heading, label, cell, width)


def _item(heading: str, label: int, cell: Text, width: int) -> Iterator[Text]:
    """A heading and a cell beside it, or under it if it does not fit there whole."""
    beside = width - INDENT - label
    if not heading or _longest(cell.plain.split()) <= beside:
        starts = [" " * INDENT + heading + " " * (label - cell_len(heading)), " " * (INDENT + label)]
    else:
        for part in _wrapped(Text(heading), width - INDENT):
            yield Text(" " * INDENT).append_text(part)
        starts = [" " * 2 * INDENT] * 2
    for number, part in enumerate(_wrapped(cell, width - cell_len(starts[0]))):
        yield Text(starts[min(number, 1)]).append_text(part)


def show(console: Console, *parts: Table | Text | str) -> None:
    """Print tables, and lines of words between them: in a terminal broken at spaces and never inside a word,
    elsewhere (a file, a pipe) a line each."""
    for part in parts:
        if isinstance(part, Table):
            lines = part.lines(console.width)
        else:
            text = Text(part) if isinstance(part, str) else part
            lines = _wrapped(text, console.width) if console.is_terminal else iter([text])
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)


def _longest(texts: Iterable[str]) -> int:
    """Cells of a terminal, not letters."""
    return max(map(cell_len, texts), default=0)


def _each_max(first: Sequence[int], second: Sequence[int]) -> list[int]:
    return [max(pair) for pair in zip(first, second, strict=True)]


def _grown(least: Sequence[int], wanted: Sequence[int], room: int) -> list[int]:
    """`least`, and what is left of the room to those that lack most, a cell at a time."""
    widths = list(least)
    for _ in range(room - sum(widths)):
        lacks = [want - width for want, width in zip(wanted, widths, strict=True)]
        widths[lacks.index(max(lacks))] += 1
    return widths


def _filled(part: Text, width: int, justify: Literal["left", "right"]) -> Text:
    room = Text(" " * (width - cell_len(part.plain)))
    return room.append_text(part) if justify == "right" else part.copy().append_text(room)


def _wrapped(cell: Text, width: int) -> Iterator[Text]:
    """Lines of whole words, as many to a line as fit; a longer word has a line of its own."""
    for line in cell.split("\n", allow_blank=True):
        breaks: list[int] = []
        for word in re.finditer(r"\S+", line.plain):
            start = breaks[-1] if breaks else 0
            if word.start() > start and cell_len(line.plain[start : word.end()]) > width:
                breaks.append(word.start())
        for part in line.divide(breaks):
            part.rstrip()
            yield part
