"""Requests in, whole answers out, on the calling thread: for evaluation, export checks and tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serve.engine.engine import Engine
from serve.engine.request import Event, FinishReason, Request, TokenLogprob


@dataclass(frozen=True)
class Completion:
    """One whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    stop_reason: str | int | None = None
    """The stop string or token that ended it, if one did."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


def generate(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    """Run all requests to their end, in one batch as far as rows allow; answers in the order asked.

    Raises what `Engine.check` does, before any of them runs, and GenerationError if one cannot go on.
    """
    events: dict[str, list[Event]] = {request.id: [] for request in requests}
    pending = [engine.check(request) for request in reversed(requests)]
    while pending or engine.has_work:
        while pending and len(engine.scheduler.waiting) < engine.limits.max_rows:
            engine.add(pending.pop())
        for event in engine.step():
            events[event.request_id].append(event)
    return [_join(events[request.id]) for request in requests]


def _join(events: list[Event]) -> Completion:
    finish, error = events[-1].finish, events[-1].error
    assert finish is not None, "a request ended without a final event"
    if error is not None:
        raise error
    return Completion(
        text="".join(event.text for event in events),
        token_ids=tuple(token for event in events for token in event.token_ids),
        finish=finish,
        logprobs=tuple(entry for event in events for entry in event.logprobs),
        stop_reason=events[-1].stop_reason,
        prompt_logprobs=tuple(entry for event in events for entry in event.prompt_logprobs),
    )
