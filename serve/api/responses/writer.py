"""One response's words: the object, and the events of its stream in OpenAI's order, numbered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from serve.api.answer import Answer, Piece
from serve.api.errors import openai_form, problem_of
from serve.api.responses.body import ResponsesBody
from serve.api.responses.output import Event, Output
from serve.api.streaming import sse
from serve.api.targets import Target
from serve.api.turn import Turn
from serve.errors import ContextLengthError, LatheError, RequestError, TenantLimitError

ECHOED = (
    *("instructions", "max_output_tokens", "max_tool_calls", "previous_response_id", "prompt_cache_key"),
    *("safety_identifier", "user"),
)
"""Fields of a body that its response repeats as they are."""


class ResponseWriter:
    """Words one request's answer; a streaming.Writer. Whatever the Responder reads of the turn passes through `next`,
    so a whole response and a stream are made of the same items."""

    def __init__(
        self,
        turn: Turn,
        body: ResponsesBody,
        keep: Callable[[dict[str, Any]], bool],
        closed: Callable[[], None],
    ) -> None:
        """
        keep    keeps the response as it has ended; False if it is not to be kept
        closed  told when nothing more comes
        """
        self._turn = turn
        self._body = body
        self._keep = keep
        self._closed = closed
        self._output = Output(
            offered=body.toolbox.offered,
            tells_thoughts=turn.tells_thoughts,
            summarizes=body.summarizes,
            packs_thoughts=body.packs_thoughts,
            logprobs=None if turn.logprobs is None else lambda entries: self._write(entries),
        )
        self._events: list[Event] = []
        self._number = 0
        self._finish: str | None = None
        self.is_cancelled = False
        """Somebody has asked for its end."""
        self._response = self._begun()

    @property
    def response(self) -> dict[str, Any]:
        """The object as it is now."""
        return {**self._response, "output": self._output.items}

    @property
    def target(self) -> Target:
        """What answers."""
        return self._turn.target

    @property
    def is_done(self) -> bool:
        """True when the row has had its final piece."""
        return self._turn.is_done

    async def next(self) -> tuple[int, Piece]:
        """What came next."""
        row, piece = await self._turn.next()
        self._response["status"] = "in_progress"
        self._events += self._output.push(piece)
        self._finish = piece.finish or self._finish
        return row, piece

    def close(self) -> None:
        """Cancel what still runs."""
        self._turn.close()
        self._closed()

    def cancel(self) -> None:
        """End the answer here; its stream says so."""
        self.is_cancelled = True
        self._turn.close()

    def forget(self) -> None:
        """As `cancel`, and nothing is kept."""
        self._keep = lambda _: False
        self.cancel()

    def whole(self, answers: Mapping[int, Answer]) -> dict[str, Any]:
        self._end("incomplete" if self._finish == "length" else "completed")
        return self.response

    def begin(self) -> bytes:
        return b"".join(
            self._written({"type": f"response.{kind}", "response": {**self._response, "output": []}})
            for kind in ("created", "in_progress")
        )

    def piece(self, row: int, piece: Piece) -> bytes:
        events, self._events = self._events, []
        return b"".join(map(self._written, events))

    def end(self) -> bytes:
        return self._ending("incomplete" if self._finish == "length" else "completed")

    def error(self, error: LatheError) -> bytes:
        begun = self.begin() if self._number == 0 else b""
        if self.is_cancelled:
            return begun + self.piece(0, Piece()) + self._ending("cancelled")
        problem = problem_of(error)
        self._response["error"] = {"code": code_of(error), "message": problem.message}
        told = {"code": problem.code, "message": problem.message, "param": problem.param}
        failed = begun + self.piece(0, Piece()) + self._ending("failed")
        return failed + self._written({"type": "error", **told, **openai_form(problem)})

    def _ending(self, status: str) -> bytes:
        """Of a stream: what is open is closed, and the response told as it is. OpenAI has no event of a cancelled
        one; it is as incomplete as can be."""
        self._end(status)
        events, self._events = self._events, []
        event = {"cancelled": "incomplete"}.get(status, status)
        events.append({"type": f"response.{event}", "response": self.response})
        return b"".join(map(self._written, events))

    def _end(self, status: str) -> None:
        self._events += self._output.finish("completed" if status == "completed" else "incomplete")
        self._response["status"] = status
        if status == "completed":
            self._response["completed_at"] = int(time.time())
        if status == "incomplete":
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._response["usage"] = self._usage()
        self._response["store"] = self._keep(self.response)

    def _written(self, event: Event) -> bytes:
        numbered = {**event, "sequence_number": self._number}
        self._number += 1
        return sse(numbered, event["type"])

    def _write(self, entries: Any) -> list[dict[str, Any]]:
        writers = self._turn.logprobs  # another's in each round of a chat whose tools are run here
        assert writers is not None
        found: list[dict[str, Any]] = writers[0].chat(entries)["content"]
        return found

    def _usage(self) -> dict[str, Any]:
        generation = self._turn.generation
        num_input, num_output = self._turn.num_prompt_tokens, generation.num_answer_tokens
        return {
            "input_tokens": num_input,
            "input_tokens_details": {
                "cached_tokens": generation.num_cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": num_output,
            "output_tokens_details": {"reasoning_tokens": generation.num_reasoning_tokens},
            "total_tokens": num_input + num_output,
        }

    def _begun(self) -> dict[str, Any]:
        """The object before anything has come."""
        body, generation = self._body, self._turn.generation
        drawing = body.drawing(self.target.services.runtime.sampling_defaults)
        text, reasoning, choice = body.text, body.reasoning, body.tool_choice
        form = {"type": "text"} if text is None or text.format is None else dumped(text.format)
        return {
            "id": generation.id,
            "object": "response",
            "created_at": generation.created,
            "status": "queued" if body.background else "in_progress",
            "background": bool(body.background),
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            **{name: getattr(body, name) for name in ECHOED},
            "model": self.target.asked,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "reasoning": {
                "effort": reasoning.effort if reasoning is not None else None,
                "summary": (reasoning.summary or reasoning.generate_summary)
                if reasoning is not None
                else None,
            },
            "service_tier": "default",
            "store": body.is_kept,
            "temperature": drawing.temperature,
            "text": {"format": form, "verbosity": (text and text.verbosity) or "medium"},
            "tool_choice": choice
            if isinstance(choice, str)
            else "auto"
            if choice is None
            else dumped(choice),
            "tools": [_tool(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": drawing.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None,
            "metadata": body.metadata or {},
        }


def refused(body: bytes) -> bytes:
    """The only event of a stream that was refused before it began, made of an error's JSON."""
    error = json.loads(body)["error"]
    told = {name: error[name] for name in ("code", "message", "param")}
    return sse({"type": "error", **told, "error": error, "sequence_number": 0}, "error")


def _tool(tool: Any) -> dict[str, Any]:
    """As the body has it; OpenAI's type of a function has all of its fields."""
    return {"parameters": None, "strict": None, **dumped(tool)} if tool.type == "function" else dumped(tool)


def dumped(part: Any) -> dict[str, Any]:
    """A part of a body as it came, less what it left out."""
    found: dict[str, Any] = part.model_dump(by_alias=True, exclude_none=True)
    return found


def code_of(error: LatheError) -> str:
    """What a response's `error.code` says: OpenAI's word, where it has one that fits."""
    if isinstance(error, ContextLengthError):
        return error.code
    if isinstance(error, TenantLimitError):
        return "rate_limit_exceeded"
    return "invalid_prompt" if isinstance(error, RequestError) else "server_error"
