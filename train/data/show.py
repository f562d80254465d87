"""Rows as they are trained, for a person: each turn with its tokens, and which of them loss counts. Prints only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from serve.errors import ConfigError, RequestError
from serve.model.loading import load_tokenizer
from serve.model.template import ChatTemplate
from serve.model.template_rules import make_template
from train.data.example import Example
from train.data.files import Split
from train.data.looking import look, num_shown
from train.data.media_reader import MediaReader
from train.data.rules import TokenRules
from train.data.sources import read
from train.data.stream import first_rows, is_streamed
from train.data.tokens import Outcome, TokenizedExample, tokenize_row, whole_rows
from train.recipe.recipe import Recipe

SUPERVISED, SPECIAL, CUT = "bold underline green", "cyan", "dim strike"
OPEN, CLOSE = "⟦", "⟧"
"""Around supervised tokens where there is no colour."""
SCISSORS = "✂"
MANY = 3
"""Of one special token in a row are shown by their number."""
INDENT = "    "
VISIBLE = {"\n": "⏎\n", "\t": "⇥\t", "\r": "␍"}


@dataclass(frozen=True)
class Piece:
    """A run of tokens that stand alike: one turn, one state, special or not."""

    text: str
    num_tokens: int
    is_target: bool
    is_special: bool
    is_cut: bool


@dataclass(frozen=True)
class Turn:
    """A turn of a sequence as it is trained; `role` is `text` where there are no turns."""

    role: str
    pieces: tuple[Piece, ...]

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces)

    @property
    def num_targets(self) -> int:
        return sum(piece.num_tokens for piece in self.pieces if piece.is_target)


def show(
    recipe: Recipe,
    console: Console,
    *,
    split: Split = "train",
    rows: int = 3,
    row: int | None = None,
    today: date | None = None,
) -> None:
    """Print the first `rows` rows of a split, or row `row` (from 1) alone; `today` is the day a template prints.

    DataError as `sources.read`, ConfigError for a row that is not there. Rows that are dropped are shown too.
    """
    tokenizer = load_tokenizer(recipe.prompting_model, trust_remote_code=recipe.trust_remote_code)
    rules = TokenRules.of_recipe(recipe, today or date.today())
    template = make_template(tokenizer, rules.template)
    reader = MediaReader.of(recipe)
    examples, total = _examples(recipe, split, rows if row is None else row)
    numbers = range(1, min(rows, len(examples)) + 1) if row is None else [row]
    if row is not None and row > len(examples):
        raise ConfigError(f"--row {row}: {split} has {len(examples):,} rows")
    marked = "underlined green" if _has_colour(console) else f"between {OPEN} and {CLOSE}"
    console.print(
        f"objective {recipe.objective}; tokens that loss counts are {marked}; ⏎ is a newline", style="dim"
    )
    for number in numbers:
        view = _RowView(examples[number - 1], template, rules, reader)
        console.print()
        title = f"{view.example.place}  {split} row {number:,}" + (
            f" of {total:,}" if total else " of a stream"
        )
        console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
        for line in view.lines(console):
            console.print(line, soft_wrap=True)


def _examples(recipe: Recipe, split: Split, count: int) -> tuple[Sequence[Example], int | None]:
    """(at least the rows asked for, how many there are; None: not known)."""
    if is_streamed(recipe) and split == "train":
        skipped = int(recipe.val_set_size)
        return list(first_rows(recipe, count + skipped))[skipped:], None
    if is_streamed(recipe) and split == "valid" and recipe.val_set_size:
        found = list(first_rows(recipe, int(recipe.val_set_size)))
        return found, len(found)
    found = read(recipe, split)
    if not found:
        raise ConfigError(
            f"--split {split}: the recipe has no such rows; add a valid split, or set val_set_size"
        )
    return found, len(found)


class _RowView:
    """One row: what it becomes, and what it would be without a limit."""

    def __init__(
        self, example: Example, template: ChatTemplate, rules: TokenRules, reader: MediaReader | None = None
    ) -> None:
        self.example = example
        self._template, self._rules, self._reader = template, rules, reader
        added = getattr(template.tokenizer, "added_tokens_decoder", {})
        self._special = {int(number) for number, token in added.items() if token.special}
        self.outcome: Outcome = tokenize_row(example, template, rules, reader)
        refused = bool(self.outcome.problems) and not self._is_too_long()
        self.whole = [] if refused else whole_rows(example, template, rules, reader)

    def _is_too_long(self) -> bool:
        """Whether `raise` is all that is wrong with it."""
        lenient = replace(self._rules, excess_length_strategy="truncate")
        return not tokenize_row(self.example, self._template, lenient, self._reader).problems

    def lines(self, console: Console) -> Iterator[Any]:
        """What to print, top to bottom."""
        for problem in self.outcome.problems:
            yield Text(problem, style="red")
        for reason in self.outcome.dropped:
            yield Text(f"not trained on: {reason}", style="yellow")
        for name in self.outcome.lost:
            yield Text(f"the chat template leaves out {name}", style="yellow")
        yield from (Text(note, style="yellow") for note in self.outcome.notes)
        if self.example.label is not None:
            yield Text(
                f"label: this answer is {'wanted' if self.example.label else 'not wanted'}", style="bold"
            )
        for row in self.whole:
            for name, sequence in zip(("chosen", "rejected"), row.sequences, strict=False):
                yield from self._sequence(name if row.rejected is not None else "", sequence, console)
        for name, value in (self.example.fields or {}).items():
            yield Text(f"  for the reward: {name} = {value!r}", style="dim")

    def _sequence(self, name: str, sequence: TokenizedExample, console: Console) -> Iterator[Any]:
        limit = self._limit(sequence)
        counts = (
            f"{min(len(sequence), limit):,} tokens, {int(sequence.is_target[:limit].sum()):,} of them count"
        )
        yield Text(f"{name + ': ' if name else ''}{counts}", style="bold" if name else "")
        if len(sequence) > limit:
            yield Text(self._cut_line(sequence, limit), style="yellow")
        for turn in self.turns(sequence, name):
            head = f"  {turn.role}  {turn.num_tokens:,} tokens"
            yield Text(head + (f", {turn.num_targets:,} count" if turn.num_targets else ""), style="dim")
            yield _drawn(turn, _has_colour(console))

    def _limit(self, sequence: TokenizedExample) -> int:
        """Tokens of it that are trained; all where pieces are made of it."""
        is_split = self._rules.excess_length_strategy == "split"
        return len(sequence) if is_split else min(self._rules.max_seq_length, len(sequence))

    def _cut_line(self, sequence: TokenizedExample, limit: int) -> str:
        rest = len(sequence) - limit
        return f"  {rest:,} of {len(sequence):,} tokens are beyond max_seq_length {limit:,}: what follows {SCISSORS}"

    def turns(self, sequence: TokenizedExample, name: str = "") -> list[Turn]:
        """The sequence in turns: each from where the one before ends to where its own rendering does."""
        ids, limit = sequence.token_ids.tolist(), self._limit(sequence)
        turns = []
        start = 0
        for role, stop in self._ends(ids, name):
            if stop > start:
                turns.append(Turn(role, tuple(self._pieces(ids, sequence.is_target, start, stop, limit))))
                start = stop
        return turns

    def _ends(self, ids: Sequence[int], name: str) -> Iterator[tuple[str, int]]:
        example = self.example
        answer = {"chosen": example.chosen, "rejected": example.rejected}.get(name) or ()
        messages = [*(example.as_messages() or ()), *answer]
        if not messages or (example.messages is None and not self._template.exists):
            yield "text", len(ids)
            return
        for index, message in enumerate(messages[:-1]):
            yield str(message.get("role")), self._common(messages[: index + 1], ids)
        yield str(messages[-1].get("role")), len(ids)

    def _common(self, messages: Sequence[Mapping[str, Any]], ids: Sequence[int]) -> int:
        """Tokens that these turns share with the sequence; 0 if the template refuses them alone."""
        try:
            shown = look(self.example, self._reader).expansions
            alone = self._template.render(
                messages,
                media=shown[: sum(map(num_shown, messages))],
                tools=self.example.tools,
                variables={**self.example.variables, **self.outcome.told},
                add_generation_prompt=False,
            )
        except RequestError:
            return 0
        differ = (i for i, (one, other) in enumerate(zip(alone, ids, strict=False)) if one != other)
        return next(differ, min(len(alone), len(ids)))

    def _pieces(
        self, ids: Sequence[int], is_target: np.ndarray, start: int, stop: int, limit: int
    ) -> Iterator[Piece]:
        def state(i: int) -> tuple[bool, bool, bool]:
            return bool(is_target[i]) and i < limit, ids[i] in self._special, i >= limit

        begin = start
        for i in range(start + 1, stop + 1):
            if i == stop or state(i) != state(begin):
                # Decoded as the end of what stands before it: some tokenizers drop a first token's space.
                text = self._decode(ids[:i])[len(self._decode(ids[:begin])) :]
                if state(begin)[1] and i - begin > MANY:
                    text = self._counted(ids[begin:i])
                yield Piece(text, i - begin, *state(begin))
                begin = i

    def _counted(self, ids: Sequence[int]) -> str:
        """Special tokens, of which a picture may be hundreds of one: those once, with their number."""
        runs = ((token, len(list(run))) for token, run in groupby(ids))
        return "".join(
            f"{self._decode([token])}*{count}" if count > MANY else self._decode([token] * count)
            for token, count in runs
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._template.tokenizer.decode(list(ids), skip_special_tokens=False)) if ids else ""


def _has_colour(console: Console) -> bool:
    return console.is_terminal and not console.no_color


def _drawn(turn: Turn, has_colour: bool) -> Text:
    """The turn's words, set in; each state in its own way, with colours or without."""
    drawn = Text(INDENT)
    inside = is_cut = False
    for piece in turn.pieces:
        if not has_colour and piece.is_target != inside:
            drawn.append(OPEN if piece.is_target else CLOSE)
            inside = piece.is_target
        if piece.is_cut and not is_cut:
            drawn.append(SCISSORS)
            is_cut = True
        style = (
            SUPERVISED if piece.is_target else CUT if piece.is_cut else SPECIAL if piece.is_special else ""
        )
        words = "".join(VISIBLE.get(character, character) for character in piece.text)
        drawn.append(words.replace("\n", "\n" + INDENT), style=style)
    if inside:
        drawn.append(CLOSE)
    drawn.rstrip()
    return drawn
