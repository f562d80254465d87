"""Rows that are read as training goes: batch k of a stream for any k, with one window of rows in memory at a time.

A window is the next `128 * batch_size` sequences that are kept; inside it batches go by length and are shuffled, as
in an epoch of `BatchPlan`. While one window trains, a thread reads and tokenizes the next. What batch k holds follows
from the recipe alone: a run that goes on at k reads forward to its window, and one that goes back starts over. Where
windows end is written down beside the run, so that rows before k are only counted then, not tokenized again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import overload

from serve.errors import DataError
from serve.model.template import ChatTemplate
from train.data import cache
from train.data.batches import WINDOW_BATCHES, Batch, BatchPlan, collate
from train.data.duplicates import content_key
from train.data.example import Example
from train.data.media_reader import MediaReader
from train.data.rules import TokenRules
from train.data.sources import stream_examples
from train.data.tokens import Outcome, TokenizedExample, TokenizeReport, collect, tokenize_row
from train.recipe.recipe import Recipe

MAX_BARREN_ROWS = 10_000
"""Rows in a row of which nothing is kept that end a run."""
HELD_OUT = "stands in the validation rows too"
NOT_USABLE = "not usable as it stands"
KEPT_WINDOWS = 3

MakeTemplate = Callable[[], ChatTemplate]
"""The reading thread has its own template, over its own tokenizer: a tokenizer serves one thread at a time."""


@dataclass
class _Read:
    """A window and what was read for it."""

    rows: list[TokenizedExample] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    end: tuple[int, int] = (0, 0)
    """(examples read from the stream so far, sequences of the last one that are left for the next window)."""


class StreamedRows(Sequence[TokenizedExample]):
    """The sequences of a stream by number, those of the last few windows only. Owns the thread that reads ahead.

    first     examples at the beginning that are not trained on (they validate)
    held_out  content keys of validation rows; a row with one of them is left out
    marks     a file for where windows end, written once a second window is read; None: none
    reader    of what rows show, where the model takes media
    """

    def __init__(
        self,
        recipe: Recipe,
        rules: TokenRules,
        make_template: MakeTemplate,
        window_rows: int,
        first: int = 0,
        held_out: Collection[bytes] = (),
        max_barren_rows: int = MAX_BARREN_ROWS,
        marks: Path | None = None,
        reader: MediaReader | None = None,
    ) -> None:
        self.window_rows = window_rows
        self._recipe = recipe
        self._raises = recipe.on_bad_row == "raise"
        self._rules = rules
        self._reader = reader
        self._make_template = make_template
        self._made_template: ChatTemplate | None = None
        self._first = first
        self._held_out = frozenset(held_out)
        self._max_barren_rows = max_barren_rows
        self._windows: dict[int, _Read] = {}
        self._dropped: dict[str, list[str]] = {}
        self._next = 0
        self._over: list[TokenizedExample] = []
        self._ahead: Future[_Read] | None = None
        self._num_read = 0
        self._marks = marks
        self._ends: dict[int, tuple[int, int]] = {}
        self._made_of_hash: str | None = None
        self._source = self._examples()

    def __len__(self) -> int:
        """Rows of a window: how many a stream has is not known."""
        return self.window_rows

    @overload
    def __getitem__(self, row_id: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, row_id: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, row_id: int | slice) -> TokenizedExample | list[TokenizedExample]:
        """A row of one of the windows asked for last."""
        if isinstance(row_id, slice):
            return [self[number] for number in range(*row_id.indices(self.window_rows))]
        index, place = divmod(row_id, self.window_rows)
        if index not in self._windows:
            raise IndexError(f"row {row_id} of the stream is in no window that is held")
        return self._windows[index].rows[place]

    def window(self, index: int) -> Sequence[TokenizedExample]:
        """The rows of window `index`, read up to there if need be; reading of the next one begins."""
        if index not in self._windows:
            if index != self._next and not self._jump(index) and index < self._next:
                self._start_over()
            while self._next <= index:
                self._take()
        if self._ahead is None and self._next == index + 1:
            self._ahead = self._submit()
        return self._windows[index].rows

    def report(self, index: int = 0) -> TokenizeReport:
        """What became of the rows that were read for a window."""
        self.window(index)
        read = self._windows[index]
        return collect(read.examples, read.outcomes)[1]

    def take_notes(self) -> list[str]:
        """What was left out since the last time this was asked, in words."""
        notes = []
        for reason in list(self._dropped):
            places = self._dropped.pop(reason)
            notes.append(f"stream: {len(places):,} rows left out, {reason}; first: {places[0]}")
        return notes

    def __iter__(self) -> Iterator[TokenizedExample]:
        """The rows of the first window."""
        return iter(self.window(0))

    @property
    def identity(self) -> str:
        """What the stream is read from: names, sizes of files, weights."""
        parts = []
        for entry in self._recipe.sources():
            path = Path(entry.path)
            files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
            parts.append((entry.model_dump_json(), [file.stat().st_size for file in files]))
        return repr((parts, self._first, sorted(self._held_out)))

    def _take(self) -> None:
        """Make the next window one that is held, and let go of the oldest."""
        read = (self._ahead or self._submit()).result()
        self._ahead = None
        self._windows[self._next] = read
        self._windows.pop(self._next - KEPT_WINDOWS, None)
        self._ends[self._next] = read.end
        self._next += 1
        if self._next > 1:
            self._write_marks()

    def _start_over(self) -> None:
        if self._ahead is not None:
            self._ahead.exception()  # waits until the thread has let go of the source
        self._windows.clear()
        self._dropped.clear()
        self._next, self._over, self._ahead, self._num_read = 0, [], None, 0
        self._source = self._examples()

    # Where windows end

    def _jump(self, index: int) -> bool:
        """Go to the beginning of a window without tokenizing what is before it, if it is known where that is."""
        if self._ahead is not None:
            self._ahead.exception()  # waits: the tokenizer serves one thread at a time
        ends = {**self._read_marks(), **self._ends}
        if index - 1 not in ends:
            return False
        num_read, num_over = ends[index - 1]
        self._start_over()
        self._source = islice(self._examples(), num_read - 1, None)
        last = next(self._source)
        rows = [] if isinstance(last, DataError) else self._tokenized(last).rows
        if len(rows) < num_over:
            self._start_over()  # other rows than those the marks were made of
            return False
        self._over, self._num_read, self._next = list(rows[len(rows) - num_over :]), num_read, index
        return True

    def _read_marks(self) -> dict[int, tuple[int, int]]:
        try:
            said = json.loads(self._marks.read_text()) if self._marks is not None else {}
            ends = said["ends"] if said["of"] == self._made_of() else []
            return {index: (int(num_read), int(num_over)) for index, (num_read, num_over) in enumerate(ends)}
        except (OSError, ValueError, KeyError, TypeError):
            return {}  # as good as none: the rows are read from the first on

    def _write_marks(self) -> None:
        known = {**self._read_marks(), **self._ends}
        ends = [known[index] for index in range(self._next) if index in known]
        if self._marks is None or len(ends) < self._next:
            return
        new = self._marks.with_name(f".{self._marks.name}.{os.getpid()}.new")
        try:
            self._marks.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps({"of": self._made_of(), "ends": ends}))
            os.replace(new, self._marks)
        except OSError:
            return  # a full disk is told by the next checkpoint; without marks a run only resumes more slowly

    def _made_of(self) -> str:
        """Of everything that where a window ends depends on."""
        if self._made_of_hash is None:
            tokens = cache.key_of([], self._template(), self._rules)
            said = repr((self.window_rows, self.identity, tokens))
            self._made_of_hash = hashlib.sha256(said.encode()).hexdigest()
        return self._made_of_hash

    def _template(self) -> ChatTemplate:
        if self._made_template is None:
            self._made_template = self._make_template()
        return self._made_template

    def _tokenized(self, example: Example) -> Outcome:
        return tokenize_row(example, self._template(), self._rules, self._reader)

    def _examples(self) -> Iterator[Example | DataError]:
        return islice(stream_examples(self._recipe), self._first, None)

    def _submit(self) -> Future[_Read]:
        """Begin to read a window. A daemon: a run that ends does not wait for rows that it will not train on."""
        future: Future[_Read] = Future()

        def work() -> None:
            try:
                future.set_result(self._read())
            except Exception as error:  # whatever it is, it is raised where the window is asked for
                future.set_exception(error)

        Thread(target=work, name="read-ahead", daemon=True).start()
        return future

    # On the reading thread

    def _read(self) -> _Read:
        read = _Read(rows=self._over)
        is_first = not self._windows and self._next == 0
        barren = 0
        while len(read.rows) < self.window_rows:
            found = next(self._source)
            self._num_read += 1
            if isinstance(found, DataError) and is_first and self._raises:
                raise found
            kept = [] if isinstance(found, DataError) else self._rows_of(found, read, is_first)
            if isinstance(found, DataError):
                self._drop(NOT_USABLE, str(found).splitlines()[0])
            read.rows += kept
            barren = 0 if kept else barren + 1
            if barren >= self._max_barren_rows:
                raise DataError(
                    f"the last {barren:,} rows of the stream gave nothing to train on: {self._reasons()}"
                )
        self._over = read.rows[self.window_rows :]
        del read.rows[self.window_rows :]
        read.end = (self._num_read, len(self._over))
        return read

    def _rows_of(self, example: Example, read: _Read, is_first: bool) -> Sequence[TokenizedExample]:
        if self._held_out and content_key(example) in self._held_out:
            self._drop(HELD_OUT, example.place)
            return ()
        outcome = self._tokenized(example)
        if outcome.problems and is_first and self._raises:
            raise DataError("\n".join(outcome.problems))
        read.examples.append(example)
        read.outcomes.append(replace(outcome, problems=()))
        for reason in (*outcome.dropped, *outcome.problems):
            self._drop(reason, example.place)
        return outcome.rows

    def _drop(self, reason: str, place: str) -> None:
        self._dropped.setdefault(reason, []).append(place)

    def _reasons(self) -> str:
        return ", ".join(f"{reason}: {len(places):,}" for reason, places in list(self._dropped.items()))


class StreamPlan:
    """Which rows of a stream make batch k; like `BatchPlan`, but a window takes the place of an epoch."""

    def __init__(self, rows: StreamedRows, batch_size: int, seed: int, pad_to: int = 8) -> None:
        assert rows.window_rows == batch_size * WINDOW_BATCHES
        self.batch_size = batch_size
        self.seed = seed
        self.pad_to = pad_to
        self._rows = rows
        self._planned: tuple[int, BatchPlan] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Batches of a window; a stream has no epochs."""
        return WINDOW_BATCHES

    def num_batches(self, epochs: float) -> int:
        """The recipe refuses epochs of a stream."""
        raise DataError("a stream has no known end, so no epochs; write iters")

    def epoch(self, index: int) -> int:
        """The window batch `index` stands in, from 0."""
        return index // WINDOW_BATCHES

    def rows(self, index: int) -> tuple[int, ...]:
        """Row ids of batch `index`: numbers in the stream of kept sequences."""
        window = self.epoch(index)
        first = window * self._rows.window_rows
        return tuple(first + row for row in self._plan(window).rows(index))

    def batch(self, rows: Sequence[TokenizedExample], index: int) -> Batch:
        """Batch `index` as arrays; `rows` are those this plan was made for."""
        return collate(rows, self.rows(index), self.pad_to)

    @property
    def padding_share(self) -> float:
        """Padded positions over all positions of the first window."""
        return self._plan(0).padding_share

    def _plan(self, window: int) -> BatchPlan:
        rows = self._rows.window(window)
        if self._planned is None or self._planned[0] != window:
            lengths = [row.length for row in rows]
            self._planned = (window, BatchPlan(lengths, self.batch_size, self.seed, self.pad_to))
        return self._planned[1]


def is_streamed(recipe: Recipe) -> bool:
    """Whether a recipe's training rows are a stream."""
    return any(entry.streaming for entry in recipe.sources())


def first_rows(recipe: Recipe, count: int) -> Iterator[Example]:
    """The first training examples of a stream. DataError for one that cannot be used."""
    for found in islice(stream_examples(recipe), count):
        if isinstance(found, DataError):
            raise found
        yield found
