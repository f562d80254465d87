"""Rows' edits on a drafter's own logits, guess after guess: penalties, biases, grammars and thoughts' budgets, as the
target's logits are changed. What was guessed is taken back when all is guessed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from serve.constraints.after_thoughts import GrammarAfterThoughts
from serve.constraints.edit import GrammarEdit, Masks
from serve.engine.edited import edited
from serve.engine.edits import LogitsChange, LogitsEdit, parts_of
from serve.engine.penalties import TokenChanges
from serve.engine.plan import SequenceState

logger = logging.getLogger(__name__)


class GuessEdits:
    """Of the rows that guess together. A row whose edit cannot go on behind a guess goes on without it: what is
    guessed from there on will not be drawn."""

    def __init__(self, sequences: Sequence[SequenceState], masks: Masks, vocab_size: int) -> None:
        """vocab_size: of the drafter's logits, which may be less than the target's."""
        self._masks = masks
        self._vocab_size = vocab_size
        self._edits: dict[int, LogitsEdit] = {
            row: sequence.edit
            for row, sequence in enumerate(sequences)
            if sequence.edit is not None and sequence.num_told == len(sequence.generated)
        }
        self._all = dict(self._edits)
        self._num_told = dict.fromkeys(self._edits, 0)

    @property
    def are_over(self) -> bool:
        """Nobody's logits are edited any more, so nobody need be told."""
        return not self._edits

    def edited(self, logits: mx.array) -> mx.array:
        """Logits [B, V] of the next guess."""
        self._masks.fill(
            [
                part.current
                for edit in self._edits.values()
                for part in parts_of(edit)
                if isinstance(part, (GrammarEdit, GrammarAfterThoughts)) and part.current is not None
            ]
        )
        changes: dict[int, LogitsChange] = {}
        for row, edit in tuple(self._edits.items()):
            with self._last_of(row):
                change = edit.change()
                if change is not None:
                    changes[row] = self._within(change)
        return edited(logits, changes)

    def tell(self, guesses: Sequence[int]) -> None:
        """What each row's guess was."""
        for row, edit in tuple(self._edits.items()):
            with self._last_of(row):
                edit.advance([guesses[row]])
                self._num_told[row] += 1

    def take_back(self) -> None:
        """As if nothing had been guessed."""
        for row, count in self._num_told.items():
            with self._last_of(row):
                self._all[row].retract(count)
        self._num_told.clear()
        self._edits.clear()

    @contextmanager
    def _last_of(self, row: int) -> Iterator[None]:
        """Whatever is raised, ends that row's part here; if it is a trouble, it is met again where tokens are
        drawn."""
        try:
            yield
        except Exception as error:
            logger.debug("a guess is not edited any more: %r", error)
            self._edits.pop(row, None)

    def _within(self, change: LogitsChange) -> LogitsChange:
        tokens = change.tokens
        if tokens is None or not (is_out := tokens.token_ids >= self._vocab_size).any():
            return change
        return change._replace(tokens=TokenChanges(*(part[~is_out] for part in tokens)))
