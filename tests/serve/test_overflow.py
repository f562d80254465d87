"""Chats longer than the context: what may go, what stays, and what stands in its place."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.api.message_bodies import Message
from serve.api.overflow import NUM_KEPT, SUMMARY, SYSTEM, droppable, summed_up, transcript, truncated
from serve.api.schemas import ChatBody
from serve.api.server import serving
from serve.api.summaries import Summaries
from serve.config import ServeConfig
from serve.runtime import Runtime


def conversation(draw: random.Random) -> list[dict[str, Any]]:
    """System, turns of any shape, tools among them; the last is a user's message, or results that came after it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "be brief"}] * draw.randint(0, 2)
    for turn in range(draw.randint(1, 6)):
        messages.append({"role": "user", "content": f"question {turn}"})
        for step in range(draw.randint(0, 4)):
            names = [f"c{turn}-{step}-{i}" for i in range(draw.randint(1, 3))]
            call = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
            calls = [{"id": name, **call} for name in names]
            messages.append({"role": "assistant", "content": "let me see", "tool_calls": calls})
            messages += [{"role": "tool", "tool_call_id": name, "content": f"found {name}"} for name in names]
        if draw.random() < 0.8:
            messages.append({"role": "assistant", "content": f"answer {turn}"})
        if draw.random() < 0.1:
            messages.append({"role": "developer", "content": "mind the time"})
    if draw.random() < 0.7:
        messages.append({"role": "user", "content": "and now?"})
    return messages


def body_of(messages: list[dict[str, Any]]) -> ChatBody:
    return ChatBody.model_validate({"model": "m", "messages": messages})


def check_whole(before: Sequence[Message], after: Sequence[Message]) -> None:
    """The system's words are all there, and every call beside its results."""
    assert [m for m in after if m.role in SYSTEM] == [m for m in before if m.role in SYSTEM]
    called = [call.id for message in after for call in message.calls]
    answered = [message.tool_call_id for message in after if message.role == "tool"]
    assert called == answered, "no call without its results, no result without its call"


@pytest.mark.parametrize("seed", range(60))
def test_truncated_drops_the_oldest_turns_no_more_than_it_takes_and_breaks_no_call_from_its_results(seed):
    body = body_of(conversation(random.Random(seed)))
    steps = list(droppable(body.messages))
    for most in range(len(body.messages) + 1):

        async def fits(chat: ChatBody, most: int = most) -> bool:
            return len(chat.messages) <= most

        found = asyncio.run(truncated(body, fits))
        after = found.body.messages
        check_whole(body.messages, after)
        assert found.num_dropped == len(body.messages) - len(after)
        assert after[-1] == body.messages[-1] or body.messages[-1].role in SYSTEM
        users = [message for message in after if message.role == "user"]
        assert users[-1] == [message for message in body.messages if message.role == "user"][-1]
        first = next(message for message in after if message.role not in SYSTEM)
        assert first.role == "user", "an answer to what is not there any more goes with it"
        rest = [message for message in body.messages if message in after]
        assert after == rest, "nothing is made up, and the order stays"
        # One step less, and it would not have fitted.
        left = list(accumulate((-len(step) for step in steps), initial=len(body.messages)))
        assert len(after) == next((size for size in left if size <= most), left[-1])


@pytest.mark.parametrize("seed", range(60))
def test_a_summary_stands_in_a_users_message_for_all_but_the_last_and_the_systems(seed):
    body = body_of(conversation(random.Random(seed)))
    told: list[Message] = []

    async def sum_up(messages: Sequence[Message]) -> str:
        told.extend(messages)
        return "they talked"

    found = asyncio.run(summed_up(body, sum_up))
    after = found.body.messages
    check_whole(body.messages, after)
    if not found.is_summed_up:
        assert after == body.messages
        assert not told
        return
    others = [message for message in after if message.role not in SYSTEM]
    assert others[0].role == "user"
    assert others[0].content.startswith(f"{SUMMARY}\nthey talked")
    assert sum(SUMMARY in str(message.content) for message in after) == 1
    assert told == [m for m in body.messages if m.role not in SYSTEM][: len(told)]
    assert len(told) == found.num_dropped
    assert len([m for m in body.messages if m.role not in SYSTEM]) - len(told) >= NUM_KEPT


def test_a_conversation_that_goes_on_is_summed_up_from_where_its_last_summary_ended_and_no_other_owners():
    asked: list[str] = []

    async def ask(text: str) -> str:
        asked.append(text)
        return f"summary {len(asked)}"

    async def cut(text: str) -> list[str]:
        return [text[i : i + 200] for i in range(0, len(text), 200)]

    messages = [Message(role="user", content=f"word {i} " * 4) for i in range(12)]
    summaries = Summaries()

    def of(count: int, owner: str = "a") -> str:
        return asyncio.run(summaries.of(messages[:count], owner, transcript, cut, ask))

    first = of(8)
    num_first = len(asked)
    assert num_first > 1, "it was read in parts"
    assert all(f"word {i} " in "".join(asked) for i in range(8))
    assert of(8) == first
    assert len(asked) == num_first, "nothing is read twice"
    asked_before = len(asked)
    of(10)
    new = asked[asked_before:]
    assert first in new[0]
    assert "word 8 " in new[0]
    assert "word 7 " not in "".join(new)
    of(8, "b")
    assert "word 0 " in asked[len(asked) - num_first]


@pytest.fixture(scope="module")
def url(model_folder: Path) -> Iterator[str]:
    """The lively model with a small context."""
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", max_context=1000))
    try:
        with serving(runtime) as found:
            yield found
    finally:
        runtime.close()


def long_chat() -> list[dict[str, str]]:
    turns = [
        message
        for i in range(24)
        for message in (
            {"role": "user", "content": f"Question {i}: what is the colour of stone {i}?"},
            {"role": "assistant", "content": f"It is {['red', 'green', 'blue'][i % 3]}."},
        )
    ]
    return [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "And the last?"}]


def test_a_server_refuses_truncates_or_sums_up_what_is_too_long_as_the_request_says(http):
    def ask(policy: str | None, messages: list[dict[str, str]]) -> httpx.Response:
        body = {"model": "lively", "messages": messages, "max_tokens": 16, "ignore_eos": True}
        return http.post("/v1/chat/completions", json=body | ({"context_overflow": policy} if policy else {}))

    refused = ask(None, long_chat())
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    cut = ask("truncate", long_chat())
    assert cut.status_code == 200, cut.text
    assert cut.headers["x-lathe-context-overflow"].startswith("truncated; messages=")
    assert 800 < cut.json()["usage"]["prompt_tokens"] <= 1000 - 16, "no more is dropped than it takes"
    summed = ask("summarize", long_chat())
    assert summed.status_code == 200, summed.text
    assert summed.headers["x-lathe-context-overflow"] == "summarized; messages=43"
    counted = http.get("/metrics").text
    assert 'endpoint="summary"' in counted, "the model has summed it up itself"
    short = ask("truncate", long_chat()[-1:])
    assert "x-lathe-context-overflow" not in short.headers
    hopeless = ask("truncate", [{"role": "user", "content": "word " * 300}])
    assert (hopeless.status_code, hopeless.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert ask("maybe", long_chat()).status_code == 400
