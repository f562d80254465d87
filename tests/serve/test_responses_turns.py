"""What clients send to /v1/responses, as a chat's turns."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve.api.responses.body import ResponsesBody
from serve.api.responses.messages import Placed, turns_of

USER = {"role": "user", "content": "Hi"}
HOOK = {"type": "message", "role": "developer", "content": "The hook passed."}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
WORDS = {"role": "assistant", "content": "So."}


def call(id: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": id, "name": "look", "arguments": "{}"}


def came(id: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": id, "output": f"of {id}"}


def turns(*items: dict[str, Any]) -> list[tuple[str, Any]]:
    """Roles, and what identifies each turn."""
    body = ResponsesBody.model_validate({"model": "m", "input": [USER, *items]})
    placed = [Placed(item, f"input.{number}") for number, item in enumerate(body.input)]
    told: list[tuple[str, Any]] = []
    for turn in turns_of(None, placed):
        calls = "".join(each["id"] for each in turn.calls)
        said = f"{turn.reasoning}{turn.content}" if turn.role == "assistant" else turn.content
        told.append((turn.role, f"{said}{calls}"))
    return told[1:]


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        ([call("a"), HOOK, came("a"), USER], [call("a"), came("a"), HOOK, USER]),
        (
            [call("a"), call("b"), HOOK, came("b"), USER, came("a")],
            [call("a"), call("b"), came("b"), came("a"), HOOK, USER],
        ),
        (
            [call("a"), came("a"), call("b"), HOOK, came("b")],
            [call("a"), came("a"), call("b"), came("b"), HOOK],
        ),
        ([call("a"), THOUGHT, came("a"), WORDS, USER], [call("a"), came("a"), THOUGHT, WORDS, USER]),
        (
            [call("a"), came("a"), HOOK, call("a"), HOOK, came("a")],
            [call("a"), came("a"), HOOK, call("a"), came("a"), HOOK],
        ),
        ([HOOK, came("z"), USER], [HOOK, came("z"), USER]),
    ],
    ids=["hook", "several", "later", "thought", "one id twice", "of no call"],
)
def test_results_stand_behind_their_calls_whatever_came_between(sent, meant):
    """Codex's hooks write a developer's message there, and DeepSeek's endpoint refused the talk for good."""
    assert turns(*sent) == turns(*meant)


def test_what_follows_at_once_keeps_its_order():
    told = turns(THOUGHT, call("a"), call("b"), came("b"), came("a"), HOOK, WORDS)
    tools = [("tool", "of b"), ("tool", "of a")]
    assert told == [("assistant", "Hm.ab"), *tools, ("developer", "The hook passed."), ("assistant", "So.")]


def test_words_behind_a_call_are_of_its_turn():
    """Two turns of an assistant's in a row are an error of many templates, and no model wrote them."""
    assert turns(call("a"), WORDS, came("a")) == [("assistant", "So.a"), ("tool", "of a")]
    assert turns(WORDS, call("a"), WORDS, came("a"))[0] == ("assistant", "So.a")


def test_what_openais_server_ran_is_told_where_its_result_is():
    """Only who asks by `include` has results; a call without one is passed over, as other servers' traces are."""
    ran = {
        "type": "code_interpreter_call",
        "id": "x",
        "code": "1+1",
        "container_id": "c",
        "status": "completed",
    }
    sought = {"type": "file_search_call", "id": "y", "queries": ["q"], "status": "completed"}
    logs = '[{"type": "logs", "logs": "2"}]'
    assert turns({**ran, "outputs": json.loads(logs)}, WORDS) == [
        ("assistant", "x"),
        ("tool", logs),
        ("assistant", "So."),
    ]
    found = {**sought, "results": [{"text": "T", "score": 0.5}]}
    assert turns(found)[1] == ("tool", '[{"text": "T", "score": 0.5}]')
    assert turns({**ran, "outputs": None}, sought, WORDS) == [("assistant", "So.")]
