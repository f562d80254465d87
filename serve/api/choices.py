"""OpenAI's chat and completions: answers as `choices` of one object, or in chunks of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from serve.api.answer import Answer, Piece, best_of
from serve.api.errors import openai_form, problem_of
from serve.api.streaming import as_json, sse
from serve.api.turn import Turn
from serve.api.usage import usage, usage_of
from serve.errors import LatheError

DONE = b"data: [DONE]\n\n"


class Format(Protocol):
    """How one endpoint writes its choices. Made for one response; it may count what it has written."""

    kind: str
    chunk_kind: str

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """An entry of `choices` in a whole response."""

    def extra(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """What a whole response says beside its choices."""

    def deltas(self, index: int, piece: Piece) -> Sequence[dict[str, Any]]:
        """Entries of `choices` that a piece becomes in a stream, each in a chunk of its own."""


class ChoicesWriter:
    """Words one request's answers; a streaming.Writer."""

    def __init__(
        self,
        turn: Turn,
        format: Format,
        *,
        num_kept: int | None = None,
        has_answer: bool = True,
        wants_usage: bool = False,
        is_continuous: bool = False,
    ) -> None:
        """
        num_kept       of the answers to one prompt, the best so many are sent; None: all
        has_answer     False: the prompt is given back alone, and no token counts as an answer
        wants_usage    a stream's last chunk says what the whole request used
        is_continuous  every chunk says what its choice has used so far
        """
        self._turn = turn
        self._format = format
        self._num_kept = num_kept
        self._has_answer = has_answer
        self._wants_usage = wants_usage
        self._is_continuous = is_continuous
        self._chunk = self._envelope(format.chunk_kind)
        if wants_usage:
            self._chunk["usage"] = None
        self._opening = self._opened()
        """What all chunks begin with, of which a stream has one a token."""
        self._num_tokens: dict[int, int] = {}
        self._num_thought: dict[int, int] = {}

    def whole(self, answers: Mapping[int, Answer]) -> dict[str, Any]:
        kept = best_of(answers, self._turn.generation.num_choices, self._num_kept)
        choices = [
            {**self._format.choice(row, answers[row]), "index": index} for index, row in enumerate(kept)
        ]
        return {
            **self._envelope(self._format.kind),
            "choices": choices,
            "usage": usage_of(self._turn, has_answer=self._has_answer),
            **self._format.extra([answers[row] for row in kept]),
        }

    def begin(self) -> bytes:
        return b""

    def piece(self, row: int, piece: Piece) -> bytes:
        before, thought_before = self._num_tokens.get(row, 0), self._num_thought.get(row, 0)
        self._num_tokens[row] = before + len(piece.token_ids)
        self._num_thought[row] = piece.num_reasoning_tokens
        written = []
        for delta in self._format.deltas(row, piece):
            if self._is_continuous:
                # The chunk that opens a chat's choice brings no token yet.
                is_opening = "role" in delta.get("delta", ())
                tokens = before if is_opening else self._num_tokens[row]
                thought = thought_before if is_opening else self._num_thought[row]
                self._chunk["usage"] = usage(
                    self._turn, tokens * self._has_answer, num_reasoning_tokens=thought
                )
                self._opening = self._opened()
            written.append(f"{self._opening}{as_json(delta)}]}}\n\n")
        return "".join(written).encode()

    def end(self) -> bytes:
        if not self._wants_usage:
            return DONE
        whole = usage_of(self._turn, has_answer=self._has_answer)
        return sse({**self._chunk, "choices": [], "usage": whole}) + DONE

    def error(self, error: LatheError) -> bytes:
        return sse(openai_form(problem_of(error)))

    def _opened(self) -> str:
        return f'data: {as_json(self._chunk)[:-1]},"choices":['

    def _envelope(self, kind: str) -> dict[str, Any]:
        generation = self._turn.generation
        return {
            "id": generation.id,
            "object": kind,
            "created": generation.created,
            "model": generation.target.asked,
        }
