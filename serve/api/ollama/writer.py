"""Answers in Ollama's words: one object, or one a line, of which the last says what the request took."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from pydantic_core import from_json

from serve.api.answer import Answer, Finish, Piece
from serve.api.errors import problem_of
from serve.api.ollama.errors import error_object
from serve.api.turn import Turn
from serve.engine.request import TokenLogprob
from serve.errors import LatheError
from serve.tools.call import Call, add_pieces

MEDIA_TYPE = "application/x-ndjson"


class Format(Protocol):
    """How one endpoint says what an answer brought."""

    def __call__(self, text: str, thinking: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Fields of an object."""


def as_message(text: str, thinking: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of /api/chat."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    return {"message": {**message, "tool_calls": list(calls)} if calls else message}


def as_response(text: str, thinking: str, calls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of /api/generate."""
    return {"response": text, "thinking": thinking} if thinking else {"response": text}


class OllamaWriter:
    """Words one request's answer; a streaming.Writer. Calls are told when they are whole."""

    def __init__(self, turn: Turn, model: str, format: Format, asked_s: float) -> None:
        """model: as the client named it; asked_s: when it asked, by time.perf_counter."""
        self._turn = turn
        self._model = model
        self._format = format
        self._asked_s = asked_s
        self._begun_s = time.perf_counter()
        self._calls: list[Call] = []
        self._num_told = 0
        self._finish: Finish | None = None

    @property
    def keep_alive(self) -> bytes:
        """What breaks a silence: an object that brings nothing."""
        return line({**self._head(), **self._format("", "", ()), "done": False})

    def whole(self, answers: Mapping[int, Answer]) -> dict[str, Any]:
        answer = answers[0]
        calls = [_call(number, call) for number, call in enumerate(answer.calls)]
        said = self._format(answer.text, self._thoughts(answer.reasoning), calls)
        return {**self._head(), **said, **self._logprobs(answer.logprobs), **self._ending(answer.finish)}

    def begin(self) -> bytes:
        return b""

    def piece(self, row: int, piece: Piece) -> bytes:
        add_pieces(self._calls, piece.calls)
        self._finish = piece.finish
        # All but the last are whole; that one once something else comes.
        num_whole = (
            len(self._calls) if piece.finish or (piece.text and not piece.calls) else len(self._calls) - 1
        )
        calls = [_call(number, self._calls[number]) for number in range(self._num_told, max(num_whole, 0))]
        self._num_told += len(calls)
        thinking = self._thoughts(piece.reasoning)
        logprobs = self._logprobs(piece.logprobs)
        if not (piece.text or thinking or calls or logprobs):
            return b""
        said = self._format(piece.text, thinking, calls)
        return line({**self._head(), **said, **logprobs, "done": False})

    def end(self) -> bytes:
        return line({**self._head(), **self._format("", "", ()), **self._ending(self._finish)})

    def error(self, error: LatheError) -> bytes:
        return line(error_object(problem_of(error)))

    def _thoughts(self, reasoning: str) -> str:
        return reasoning if self._turn.tells_thoughts else ""

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        writers = self._turn.logprobs
        return {"logprobs": writers[0].chat(entries)["content"]} if writers is not None and entries else {}

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": now()}

    def _ending(self, finish: Finish | None) -> dict[str, Any]:
        """Durations are nanoseconds."""
        ended_s, generation = time.perf_counter(), self._turn.generation
        first_s = ended_s if generation.first_token_s is None else generation.first_token_s
        return {
            "done": True,
            "done_reason": "length" if finish == "length" else "stop",
            "total_duration": ns(ended_s - self._asked_s),
            "load_duration": ns(self._begun_s - self._asked_s),
            "prompt_eval_count": self._turn.num_prompt_tokens,
            "prompt_eval_duration": ns(first_s - self._begun_s),
            "eval_count": generation.num_answer_tokens,
            "eval_duration": ns(ended_s - first_s),
        }


def now() -> str:
    """This moment, as their objects say it."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _call(number: int, call: Call) -> dict[str, Any]:
    """Arguments that are no object, or were cut, are what is certain of them."""
    try:
        arguments = from_json(call.arguments or "{}", allow_partial=True)
    except ValueError:
        arguments = {}
    function = {
        "index": number,
        "name": call.name,
        "arguments": arguments if isinstance(arguments, dict) else {},
    }
    return {"id": call.id, "function": function}


def ns(seconds: float) -> int:
    """A duration, as their objects say it."""
    return int(max(seconds, 0) * 1e9)


def line(data: dict[str, Any]) -> bytes:
    """One object of a stream."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
