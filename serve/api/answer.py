"""What comes of one row, before any API's words for it: Pieces, and the whole Answer that they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from serve.engine.request import Event, FinishReason, TokenLogprob
from serve.tools.call import Call, CallPiece, add_pieces

Finish = FinishReason | Literal["tool_calls"]
Kind = Literal["reasoning", "text", "call"]


@dataclass(frozen=True)
class RanCall:
    """A call of an MCP server's tool, and what it gave."""

    id: str
    server: str
    name: str
    """Of the tool, as the server calls it."""
    arguments: str
    output: str
    pictures: tuple[str, ...] = ()
    """What it showed, as data URIs."""


class Piece(NamedTuple):
    """What one event brought to one answer."""

    text: str = ""
    """Of the answer, less the calls in it."""
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    stop_reason: str | int | None = None
    num_reasoning_tokens: int = 0
    """All since the answer's beginning."""
    ran: tuple[RanCall, ...] = ()
    """Calls that were run here, before what follows."""

    @classmethod
    def of(cls, event: Event) -> Piece:
        """As the engine has it: whatever calls there are stand in the text."""
        return cls(
            event.text,
            event.reasoning,
            (),
            event.token_ids,
            event.logprobs,
            event.prompt_logprobs,
            event.finish,
            event.stop_reason,
            event.num_reasoning_tokens,
        )


@dataclass
class Span:
    """What an answer says in one way before it says something in another."""

    kind: Kind
    text: str = ""
    """Of a call: nothing."""
    call: int = -1
    """Its number among the answer's calls."""


@dataclass
class Answer:
    """One row's whole answer, as it grows."""

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    ran: list[RanCall] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    """Thoughts, text and calls in the order in which they came. What one piece brought stands in this order."""

    def add(self, piece: Piece) -> None:
        """Append what a piece brought."""
        self.text += piece.text
        self.reasoning += piece.reasoning
        add_pieces(self.calls, piece.calls)
        self.ran += piece.ran
        self._add_span("reasoning", piece.reasoning)
        self._add_span("text", piece.text)
        for call in piece.calls:
            if not self.spans or self.spans[-1].call != call.index:
                self.spans.append(Span("call", call=call.index))
        self.logprobs += piece.logprobs
        self.finish = piece.finish
        self.stop_reason = piece.stop_reason
        self.prompt_logprobs = self.prompt_logprobs or piece.prompt_logprobs

    def _add_span(self, kind: Kind, text: str) -> None:
        if not text:
            return
        if not self.spans or self.spans[-1].kind != kind:
            self.spans.append(Span(kind))
        self.spans[-1].text += text


def best_of(answers: Mapping[int, Answer], num_drawn: int, num_kept: int | None) -> list[int]:
    """Rows of the answers to send, by prompt, and of each the best first if some are left out: those of the highest
    log-probability a token."""
    if num_kept is None or num_kept == num_drawn:
        return sorted(answers)

    def score(row: int) -> float:
        values = [entry.logprob for entry in answers[row].logprobs]
        return sum(values) / len(values) if values else 0.0

    prompts = range(0, len(answers), num_drawn)
    ranked = [sorted(range(first, first + num_drawn), key=score, reverse=True) for first in prompts]
    return [row for rows in ranked for row in rows[:num_kept]]
