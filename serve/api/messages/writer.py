"""Answers in Anthropic's words: a message of content blocks, whole or as events. Both are made of the same events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from serve.api.answer import Answer, Finish, Piece, Span
from serve.api.errors import problem_of
from serve.api.messages.errors import error_object
from serve.api.messages.events import BlockEvents, Event, joined
from serve.api.streaming import sse
from serve.api.turn import Turn
from serve.errors import LatheError
from serve.tools.call import CallPiece

PING = sse({"type": "ping"}, "ping")
"""What breaks a silence; their clients skip it, wherever it comes."""
_REASONS: Mapping[Finish | None, str] = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessagesWriter:
    """Words one request's answer; a streaming.Writer."""

    def __init__(self, turn: Turn, *, is_silent: bool = False) -> None:
        """is_silent: the prompt alone was wanted, and nothing of the answer is told."""
        self._turn = turn
        self._is_silent = is_silent
        self._blocks = BlockEvents()
        self._last = Piece()

    def whole(self, answers: Mapping[int, Answer]) -> dict[str, Any]:
        answer = answers[0]
        events: list[Event] = []
        for span in answer.spans:
            events += self._events(_piece(span, answer))
        events += self._blocks.finish()
        ending = self._ending(answer.finish, answer.stop_reason)
        return {**self._message(), "content": joined(events), **ending, "usage": self._usage()}

    def begin(self) -> bytes:
        return _written([{"type": "message_start", "message": {**self._message(), "usage": self._usage()}}])

    def piece(self, row: int, piece: Piece) -> bytes:
        self._last = piece
        return _written(self._events(piece))

    def end(self) -> bytes:
        ending = self._ending(self._last.finish, self._last.stop_reason)
        delta = {"type": "message_delta", "delta": ending, "usage": self._usage()}
        return _written([*self._blocks.finish(), delta, {"type": "message_stop"}])

    def error(self, error: LatheError) -> bytes:
        return _written([error_object(problem_of(error))])

    def _events(self, piece: Piece) -> list[Event]:
        if self._is_silent:
            return []
        events = self._blocks.add("thinking", piece.reasoning) if self._turn.tells_thoughts else []
        events += self._blocks.add("text", piece.text)
        for call in piece.calls:
            events += self._blocks.add_call(call)
        return events

    def _message(self) -> dict[str, Any]:
        generation = self._turn.generation
        return {
            "id": generation.id,
            "type": "message",
            "role": "assistant",
            "model": generation.target.asked,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _ending(self, finish: Finish | None, stop: str | int | None) -> dict[str, Any]:
        if self._is_silent:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if finish == "stop" and isinstance(stop, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        if finish == "stop" and self._blocks.has_calls:
            return {"stop_reason": "tool_use", "stop_sequence": None}
        return {"stop_reason": _REASONS.get(finish, "end_turn"), "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """So far. Tokens of the prompt that were found in the cache are told apart, and count once."""
        generation = self._turn.generation
        cached = generation.num_cached_tokens
        usage: dict[str, Any] = {
            "input_tokens": self._turn.num_prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": 0 if self._is_silent else generation.num_answer_tokens,
        }
        if generation.has_thoughts and not self._is_silent:
            usage["output_tokens_details"] = {"thinking_tokens": generation.num_reasoning_tokens}
        return usage


def _piece(span: Span, answer: Answer) -> Piece:
    """All of a span at once."""
    if span.kind == "reasoning":
        return Piece(reasoning=span.text)
    if span.kind == "text":
        return Piece(text=span.text)
    call = answer.calls[span.call]
    return Piece(calls=(CallPiece(span.call, call.id, call.name, call.arguments),))


def _written(events: Iterable[Event]) -> bytes:
    return b"".join(sse(event, event["type"]) for event in events)
