"""A Grammar in one answer: what may follow its tokens so far, and when it is whole; masks of many rows at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from llguidance import LLExecutor

from serve.constraints.grammar import Grammar
from serve.engine.edits import LogitsChange
from serve.errors import GenerationError


class GrammarEdit:
    """Follows one answer. Its tokens are the grammar's until one of the model's ends comes, which it lets through
    where the grammar is satisfied, or until nothing may follow. What is told after that is nobody's text."""

    def __init__(self, grammar: Grammar, ends: Collection[int], *, begins_text: bool = False) -> None:
        """ends: tokens that end the answer, whatever the grammar says of them.

        begins_text  the answer is a text of its own, which may leave the space out that its first token has
        """
        self._grammar = grammar
        self._matcher = grammar.matcher()
        self._vocabulary = grammar.vocabulary
        self._firsts = grammar.vocabulary.firsts if begins_text else None
        self._ends = frozenset(ends)
        self._num_beyond = 0
        self._tokens: list[int] = []
        self._mask: np.ndarray | None = None

    @property
    def length(self) -> int | None:
        """So many tokens are the whole answer, and what follows them is none; None where more may come."""
        return len(self._tokens) if self._matcher.is_stopped() and not self._matcher.is_error() else None

    @property
    def num_told(self) -> int:
        """Tokens that it has been told of and not told to forget."""
        return len(self._tokens) + self._num_beyond

    @property
    def current(self) -> GrammarEdit:
        """Whose mask is to be filled."""
        return self

    def accepts(self, token_id: int) -> bool:
        """Whether the answer may go on by this token, or have gone on by it."""
        is_over = self._num_beyond or self.length is not None
        return bool(is_over or token_id in self._ends or self._matcher.validate_tokens([token_id]))

    def advance(self, token_ids: Sequence[int]) -> None:
        """GenerationError where the grammar cannot go on: it is too complex, or was not kept to."""
        self._mask = None
        for number, token_id in enumerate(token_ids):
            if self._num_beyond or token_id in self._ends or self.length is not None:
                self._num_beyond += 1
                continue
            self._matcher.consume_token(token_id)
            self._tokens.append(token_id)
            try:
                self._check()
            except GenerationError:
                self.retract(number + 1)
                raise

    def retract(self, count: int) -> None:
        """The same as if they had not come, also where they led to an error."""
        self._mask = None
        of_beyond = min(count, self._num_beyond)
        self._num_beyond -= of_beyond
        if count > of_beyond:
            del self._tokens[len(self._tokens) - (count - of_beyond) :]
            self._matcher.rollback(count - of_beyond)
        if self._matcher.is_error():  # it stays in it
            self._matcher = self._grammar.matcher()
            self._matcher.consume_tokens(self._tokens)
            self._check()

    def change(self) -> LogitsChange | None:
        """Nothing where the answer has ended: what is drawn then is dropped."""
        if self._mask is None:
            fill_masks([self], None)
        self._check()
        if self._num_beyond or self.length is not None:
            return None
        return LogitsChange(allowed=self._mask)

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().replace("<non-verbose/>", "").strip()
            raise GenerationError(
                f"the answer's grammar cannot go on after {len(self._tokens)} tokens: {reason}"
            )

    def _take(self, mask: np.ndarray) -> None:
        """`mask` [ceil(V / 32)] uint32 as llguidance fills it: the end is one token there, and may be others here."""
        end_id = self._vocabulary.end_id
        if self._firsts is not None and not self._tokens:
            mask &= self._firsts
        if end_id < self._vocabulary.size:
            mask[end_id // 32] &= ~np.uint32(1 << end_id % 32)
        if self._matcher.is_accepting():
            for token_id in self._ends:
                mask[token_id // 32] |= np.uint32(1 << token_id % 32)
        self._mask = mask


class Masks:
    """What fills the masks of a step's rows."""

    def __init__(self) -> None:
        self._executor: LLExecutor | None = None

    def fill(self, edits: Sequence[GrammarEdit]) -> None:
        """Before they are asked for their changes: all at once, on as many threads as help."""
        if len(edits) > 1 and self._executor is None:
            self._executor = LLExecutor()
        fill_masks(edits, self._executor)


def fill_masks(edits: Sequence[GrammarEdit], executor: LLExecutor | None) -> None:
    """Masks of edits that have none, of one vocabulary; what goes wrong with one is told when that is asked."""
    wanting = [edit for edit in edits if edit._mask is None and not edit._matcher.is_error()]
    if not wanting:
        return
    num_words = wanting[0]._vocabulary.num_words
    width = -(-wanting[0]._vocabulary.tokenizer.vocab_size // 32)
    masks = np.zeros((len(wanting), width), dtype="<u4")
    if executor is not None and len(wanting) > 1:
        pairs = [(edit._matcher, row) for row, edit in enumerate(wanting)]
        executor.unsafe_compute_mask_ptr(pairs, masks.ctypes.data, 4 * width, len(wanting))
    else:
        for row, edit in enumerate(wanting):
            edit._matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, 4 * width)
    for row, edit in enumerate(wanting):
        edit._take(masks[row, :num_words])
