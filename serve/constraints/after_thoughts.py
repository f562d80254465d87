"""A Grammar in an answer that has thoughts before it: these are free, and the grammar's first token is the answer's.

An answer that has not begun may still think first: what its grammar allows may come then, or a thought's mark. Inside
a thought everything may come but what would end it all, and but a token that ends the thought and says more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from serve.constraints.edit import GrammarEdit
from serve.constraints.grammar import Grammar
from serve.engine.edits import LogitsChange
from serve.engine.request import Request
from serve.engine.thinking import Thinking, ThoughtTokens
from serve.engine.thinking_budget import MAX_RETRACTED
from serve.errors import GenerationError
from serve.model.token_bytes import TokenBytes


def grammar_edit(
    request: Request, ends: Collection[int], tokens: TokenBytes
) -> GrammarEdit | GrammarAfterThoughts:
    """A request's grammar, in its answer. `ends` as GrammarEdit takes it."""
    assert request.grammar is not None, "the answer is free"
    if not request.thinks_before:
        return GrammarEdit(request.grammar, ends, begins_text=not request.continues_prompt)
    assert request.thinking is not None
    follows = request.prompt.token_ids if request.continues_prompt else None
    read = ThoughtTokens(request.thinking, tokens, follows, before=True)
    return GrammarAfterThoughts(request.grammar, ends, request.thinking, read)


class GrammarAfterThoughts:
    """Follows one answer. As GrammarEdit, from the answer's text on."""

    def __init__(
        self, grammar: Grammar, ends: Collection[int], thinking: Thinking, read: ThoughtTokens
    ) -> None:
        """read: at the answer's beginning."""
        self._grammar, self._ends = grammar, ends
        self._vocabulary = grammar.vocabulary
        self._openings = [
            opening
            for opening in thinking.thoughts.openings
            if opening and read.stage != "answer" and _leaves_text(read, opening)
        ]
        self._holding, self._ending = self._sayers(thinking)
        self._free: dict[tuple[object, ...], np.ndarray | None] = {}
        """Masks inside a thought, by where it is and what its mark may have begun with."""
        edit = None if read.stage == "thought" else self._begun(read)
        self._now = _Moment(read, edit)
        self._past: deque[_Moment] = deque(maxlen=MAX_RETRACTED)

    @property
    def length(self) -> int | None:
        """As GrammarEdit's, thoughts included."""
        edit = self._now.edit
        length = None if edit is None else edit.length
        return None if length is None else self._now.num_before + length

    @property
    def current(self) -> GrammarEdit | None:
        """Whose mask is to be filled."""
        return self._now.edit

    def advance(self, token_ids: Sequence[int]) -> None:
        """GenerationError where the grammar cannot go on, or was not kept to."""
        for number, token_id in enumerate(token_ids):
            try:
                moment = self._after(token_id)
            except GenerationError:
                self.retract(number)
                raise
            self._past.append(self._now)
            self._now = moment

    def retract(self, count: int) -> None:
        """The same as if they had not come."""
        assert count <= len(self._past), "more than can be taken back"
        for _ in range(count):
            self._now = self._past.pop()
        now = self._now
        if now.edit is not None:
            now.edit.retract(now.edit.num_told - now.num_told)

    def change(self) -> LogitsChange | None:
        """Nothing where the answer has ended."""
        now = self._now
        stage = now.read.stage
        if stage == "answer":
            assert now.edit is not None
            return now.edit.change()
        if stage == "thought":
            mask = self._opening(()) if now.read.state == "content" else self._of_thoughts(now.read)
            return None if mask is None else LogitsChange(allowed=mask)
        opening = self._opening(now.read.begun)
        if now.edit is None:
            return LogitsChange(allowed=opening)
        change = now.edit.change()
        return change and LogitsChange(allowed=change.allowed | opening)

    def _begun(self, read: ThoughtTokens) -> GrammarEdit:
        return GrammarEdit(self._grammar, self._ends, begins_text=read.begins_text)

    def _after(self, token_id: int) -> _Moment:
        now = self._now
        if now.read.stage == "answer":
            return now.told(now.read, token_id)
        read = now.read.fork()
        pieces = read.push(token_id)
        if now.read.stage == "thought":
            if read.stage != "answer":
                return _Moment(read, None, num_before=now.num_before + 1)
            if any(kind == "content" and text for kind, text, _ in pieces):
                raise GenerationError(
                    "a token ends the answer's thought and goes on, before its grammar begins"
                )
            return _Moment(read, self._begun(read), num_before=now.num_before + 1)
        if read.stage == "thought":
            return _Moment(read, None, num_before=now.num_tokens + 1)
        if now.edit is not None and (read.stage == "answer" or now.edit.accepts(token_id)):
            return now.told(read, token_id)
        if read.stage == "answer":
            raise GenerationError(
                "the answer began as a thought, which its grammar does not allow, and did not go on"
            )
        return _Moment(read, None, num_before=now.num_tokens + 1)

    def _sayers(self, thinking: Thinking) -> tuple[set[int], set[int]]:
        """Tokens that may end a thought and say more: wherever they stand, and behind the beginning of a mark."""
        controls = thinking.thoughts.controls.values()
        holding: set[int] = set()
        ending: set[int] = set()
        for state in ("reasoning", "header"):
            for mark in thinking.thoughts.marks[state]:
                at = max((mark.text.rfind(control) + 1 for control in controls), default=0)
                tail = mark.text[at:].encode()
                ending |= self._vocabulary.ending(tail)
                if tail and not at:
                    holding |= self._vocabulary.holding(tail)
        return holding, ending | holding

    def _opening(self, begun: tuple[int, ...]) -> np.ndarray:
        """[ceil(V / 32)] uint32: what goes on with a mark that leaves the text."""
        mask = np.zeros(self._vocabulary.num_words, dtype="<u4")
        count = len(begun)
        for opening in self._openings:
            if opening[:count] == begun and count < len(opening):
                mask[opening[count] // 32] |= np.uint32(1 << opening[count] % 32)
        return mask

    def _of_thoughts(self, read: ThoughtTokens) -> np.ndarray | None:
        """[ceil(V / 32)] uint32; None: everything may come."""
        key = (read.state, *read.pending)
        if key not in self._free:
            sayers = self._ending if any(read.pending) else self._holding
            barred = {token_id for token_id in sayers if _says_more(read, token_id)}
            barred |= self._vocabulary.silent.intersection(self._ends)
            self._free[key] = self._vocabulary.all_but(barred) if barred else None
        return self._free[key]


@dataclass(frozen=True)
class _Moment:
    """An answer so far."""

    read: ThoughtTokens
    edit: GrammarEdit | None
    """Of its text, or of what may be; None: inside a thought, or on the way to one."""
    num_told: int = 0
    """Tokens that the edit has been told of."""
    num_before: int = 0
    """Those before them."""

    @property
    def num_tokens(self) -> int:
        return self.num_before + self.num_told

    def told(self, read: ThoughtTokens, token_id: int) -> _Moment:
        """One more of the text."""
        assert self.edit is not None
        self.edit.advance([token_id])
        return _Moment(read, self.edit, self.num_told + 1, self.num_before)


def _leaves_text(read: ThoughtTokens, opening: Sequence[int]) -> bool:
    """Whether these tokens are read as a mark."""
    read = read.fork()
    for token_id in opening:
        read.push(token_id)
    return read.stage == "thought" and read.state != "content"


def _says_more(read: ThoughtTokens, token_id: int) -> bool:
    pieces = (read := read.fork()).push(token_id)
    return read.stage == "answer" and any(kind == "content" and text for kind, text, _ in pieces)
