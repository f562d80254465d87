"""Thoughts of one row: which of its tokens think, and how many there are.

Knows tokens and their bytes; which text marks a thought is `serve/model/thoughts.py`'s.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from serve.engine.text import Stops, TextDecoder
from serve.errors import RequestError
from serve.model.thoughts import Piece, State, Teller, ThoughtReader, Thoughts, Told
from serve.model.token_bytes import TokenBytes


@dataclass(frozen=True)
class Thinking:
    """How a request's thoughts are told from its answer. RequestError for a budget below 0."""

    thoughts: Thoughts
    cue: tuple[int, ...] = ()
    """The prompt's last tokens, which may have begun a thought."""
    budget: int | None = None
    """Tokens of thoughts at most, marks not counted; then their end is forced."""
    tells_calls: bool = False
    """Headers that call a tool are told, as text (gpt-oss)."""
    in_grammar: bool = False
    """The answer's grammar, if it has one, says where thoughts stand, too."""

    def __post_init__(self) -> None:
        if self.budget is not None and self.budget < 0:
            raise RequestError(f"thinking_budget is {self.budget}; expected 0 or more", "thinking_budget")


Stage = Literal["beginning", "thought", "answer"]
"""Of an answer that has its thoughts before it: it may be either yet; marks and headers are thoughts here."""


class ThoughtTokens:
    """Follows an answer's tokens. `follows` as TextDecoder takes it.

    before  thoughts stand before the answer, not in it: once its text has begun, all that follows is its text, and
            tokens of marks are what they are spelled like
    """

    def __init__(
        self,
        thinking: Thinking,
        tokens: TokenBytes,
        follows: Sequence[int] | None = None,
        *,
        before: bool = False,
    ) -> None:
        self._controls = thinking.thoughts.controls
        cue = _Written(TextDecoder(tokens), self._controls)
        text = "".join(before + own for before, own in map(cue.push, thinking.cue)) + cue.finish()
        self._reader = ThoughtReader(thinking.thoughts, text)
        self._written = _Written(TextDecoder(tokens, follows), self._controls)
        self.num_thought = 0
        """Tokens that hold a part of a thought. Those of marks do not count."""
        self._open: list[_Open] = []  # tokens of which a part is held
        self._is_before = before
        self._first = TextDecoder(tokens, follows)  # is not told anything
        self._begun: tuple[int, ...] | None = None  # tokens that are nothing for certain
        self._answer: TextDecoder | None = None
        if before and self.state == "content":
            if self._reader.last is None and not self._reader.held:
                self._begun = ()
            elif self._reader.last is None or self._reader.is_answer:
                self._answer = self._first.fork()

    @property
    def state(self) -> State:
        """Where the next token stands, as far as is known."""
        return self._reader.state

    @property
    def stage(self) -> Stage:
        """Of what stands before the answer, or of that."""
        assert self._is_before, "an answer may have thoughts anywhere"
        if self._answer is not None:
            return "answer"
        return "thought" if self._begun is None else "beginning"

    @property
    def begun(self) -> tuple[int, ...]:
        """Tokens of the beginning, which the mark of a thought may begin with."""
        return self._begun or ()

    @property
    def begins_text(self) -> bool:
        """The answer's next token is the first of its text."""
        return (self._answer or self._first).is_start

    @property
    def pending(self) -> tuple[str, bytes]:
        """What may become a mark."""
        return self._reader.held, self._written.pending

    @property
    def num_held(self) -> int:
        """Tokens inside a thought that may come to be of the mark that ends it, or of the thought."""
        return 0 if self.state != "reasoning" else sum(not each.is_counted for each in self._open)

    def push(self, token_id: int) -> list[Piece]:
        """What is certain with this token."""
        if self._answer is not None:
            return _content(self._answer.push(token_id))
        pieces = self._pushed(token_id)
        return self._settled(token_id, pieces) if self._is_before else pieces

    def _pushed(self, token_id: int) -> list[Piece]:
        before, own = self._written.push(token_id)
        if own:
            self._open += [_Open(len(before), is_counted=True)] if before else []
            self._open.append(_Open(len(own)))
        elif self.state == "reasoning":
            self.num_thought += 1  # half a character, or a token without text
        return self._read(before + own)

    def finish(self) -> list[Piece]:
        """What was held, when nothing follows."""
        if self._answer is not None:
            return _content(self._answer.finish())
        if self._begun is not None:
            return [*self._answered(self._begun), *self.finish()]
        pieces = self._read(self._written.finish())
        last = self._reader.finish()
        self._count(last)
        return pieces + last

    def fork(self) -> ThoughtTokens:
        """One that goes on from here, and leaves this one as it is."""
        other = copy.copy(self)
        other._reader = copy.copy(self._reader)
        other._written = self._written.fork()
        other._open = [copy.copy(each) for each in self._open]
        other._answer = None if self._answer is None else self._answer.fork()
        return other

    def _settled(self, token_id: int, pieces: list[Piece]) -> list[Piece]:
        """Pieces of a token, now that the answer may have begun."""
        if self._reader.is_answer:
            self._answer, self._begun = self._written.decoder, None
            return pieces + self._reader.finish()
        if self._begun is None:
            return pieces
        if self._reader.last is not None:
            self._begun = None
            return pieces
        self._begun += (token_id,)
        return self._answered(self._begun) if pieces else pieces

    def _answered(self, begun: Sequence[int]) -> list[Piece]:
        """The answer began with these tokens."""
        self._answer, self._begun, self._open = self._first.fork(), None, []
        return _content("".join(map(self._answer.push, begun)))

    def _read(self, text: str) -> list[Piece]:
        pieces = self._reader.push(text)
        self._count(pieces)
        return pieces

    def _count(self, pieces: Sequence[Piece]) -> None:
        for _, text, is_thought in pieces:
            left = len(text)
            while left and self._open:
                first = self._open[0]
                if is_thought and not first.is_counted:
                    first.is_counted = True
                    self.num_thought += 1
                taken = min(left, first.num_chars)
                first.num_chars -= taken
                left -= taken
                if not first.num_chars:
                    del self._open[0]


@dataclass
class _Open:
    """Text of one token that is not told to its end."""

    num_chars: int
    is_counted: bool = False


def _content(text: str) -> list[Piece]:
    return [Piece("content", text, is_thought=False)] if text else []


class _Written:
    """Tokens as text, with control tokens as halves of surrogate pairs."""

    def __init__(self, decoder: TextDecoder, controls: Mapping[int, str]) -> None:
        self.decoder = decoder
        self._controls = controls

    def push(self, token_id: int) -> tuple[str, str]:
        """What is left of the tokens before it, and what this one adds."""
        control = self._controls.get(token_id)
        if control is not None:
            return self.decoder.cut(), control
        before = self.decoder.cut() if self.decoder.breaks(token_id) else ""
        return before, self.decoder.push(token_id)

    @property
    def pending(self) -> bytes:
        return self.decoder.pending

    def finish(self) -> str:
        return self.decoder.finish()

    def fork(self) -> _Written:
        return _Written(self.decoder.fork(), self._controls)


class ThoughtStream:
    """As TextStream, of an answer whose thoughts are told apart. Stop strings count outside of them.

    before  as ThoughtTokens takes it; the answer's newlines are its own then
    """

    def __init__(
        self,
        thinking: Thinking,
        tokens: TokenBytes,
        stop: Sequence[str] = (),
        follows: Sequence[int] | None = None,
        *,
        before: bool = False,
    ) -> None:
        self._read = ThoughtTokens(thinking, tokens, follows, before=before)
        self._teller = Teller(
            thinking.thoughts, self._read.state, is_exact=before, tells_calls=thinking.tells_calls
        )
        self._stops = Stops(stop)
        self._reasoning = ""

    @property
    def matched(self) -> str | None:
        """The stop string that has appeared; nothing follows it."""
        return self._stops.matched

    @property
    def num_thought(self) -> int:
        """Tokens of thoughts so far."""
        return self._read.num_thought

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """As TextStream.push, of the answer's text."""
        told = self._heard(self._teller.push(self._read.push(token_id)))
        return self._stops.push(told) if may_stop else told

    def finish(self) -> str:
        """As TextStream.finish."""
        if self.matched is not None:
            return ""
        told = self._heard(self._teller.push(self._read.finish())) + self._teller.finish().content
        piece = self._stops.push(told)
        return piece if self.matched is not None else piece + self._stops.finish()

    def take_reasoning(self) -> str:
        """What has become final of the thoughts since it was last taken."""
        reasoning, self._reasoning = self._reasoning, ""
        return reasoning

    def _heard(self, told: Told) -> str:
        self._reasoning += told.reasoning
        return told.content
