"""What a stream of /v1/responses must be: OpenAI's types, its order, and deltas that join to what the end says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from openai.types import responses
from openai.types.responses.response_stream_event import ResponseStreamEvent

Event = Mapping[str, Any]


def _types() -> dict[str, Any]:
    union = get_args(ResponseStreamEvent)[0]
    return {get_args(each.model_fields["type"].annotation)[0]: each for each in get_args(union)}


TYPES = _types()
"""By name, the official client's type of an event."""
ENDS = ("response.completed", "response.incomplete", "response.failed")
PARTS = {
    "output_text": ("content", "text", "response.output_text.done"),
    "reasoning_text": ("content", "text", "response.reasoning_text.done"),
    "reasoning_summary_text": ("summary", "text", "response.reasoning_summary_text.done"),
}
"""Kinds of deltas that are of a part of an item."""
FIELDS = {
    "function_call_arguments": "arguments",
    "mcp_call_arguments": "arguments",
    "custom_tool_call_input": "input",
}
"""And those that are of a field of it."""


def check(events: Sequence[Event]) -> dict[str, Any]:
    """The response that they end with. AssertionError where they are not what OpenAI's are."""
    for event in events:
        TYPES[event["type"]].model_validate(dict(event))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    if events[-1]["type"] == "error":
        events = events[:-1]
    begun, last = events[0]["response"], events[-1]
    assert last["type"] in ENDS
    assert not {event["type"] for event in events[:-1]} & set(ENDS)
    assert (begun["status"], begun["output"], begun["usage"]) == ("in_progress", [], None)
    response = last["response"]
    told = check_items(events[2:-1])
    assert told == response["output"]
    changing = {"status", "output", "usage", "completed_at", "incomplete_details", "error", "store"}
    assert {k: v for k, v in begun.items() if k not in changing} == {
        k: v for k, v in response.items() if k not in changing
    }
    responses.Response.model_validate(response)
    return dict(response)


def check_items(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The items that events between a stream's beginning and its end tell of."""
    items: list[dict[str, Any]] = []
    open_item: dict[str, Any] | None = None
    joined: dict[tuple[str, str], str] = {}
    logprobs: list[Any] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert open_item is None, "an item begins while another is open"
            open_item, joined, logprobs = dict(event["item"]), {}, []
            assert event["output_index"] == len(items)
            assert open_item["status"] == "in_progress"
            assert not open_item.get("content")
            assert not open_item.get("arguments")
            continue
        assert open_item is not None, f"{kind} without an item"
        assert event["output_index"] == len(items)
        if kind == "output_item.done":
            item = event["item"]
            assert item["id"] == open_item["id"]
            for (name, part), text in joined.items():
                _assert_joined(item, name, part, text)
            if item["type"] == "message":
                assert item["content"][0]["logprobs"] == logprobs
                assert item["content"][0]["text"] == joined["output_text", "done"]
            items.append(item)
            open_item = None
            continue
        assert event["item_id"] == open_item["id"]
        assert event.get("content_index", 0) == event.get("summary_index", 0) == 0
        name, _, what = kind.rpartition(".")
        if what == "delta":
            assert (name, "done") not in joined
            joined[name, "delta"] = joined.get((name, "delta"), "") + event["delta"]
            logprobs += event.get("logprobs", [])
        elif what == "done" and not name.endswith("part"):
            joined[name, "done"] = event[FIELDS.get(name, "text")]
        elif what == "added":
            assert not joined, "a part begins after what it holds"
    assert open_item is None, "an item stays open"
    return items


def _assert_joined(item: dict[str, Any], name: str, part: str, text: str) -> None:
    if name in FIELDS:
        assert item[FIELDS[name]] == text, (name, part)
        return
    where, field, _ = PARTS[name]
    assert item[where][0][field] == text, (name, part)


def nameless(response: Mapping[str, Any]) -> dict[str, Any]:
    """A response without what is another's each time: ids and times, and how much of it the cache knew."""

    def without(value: Any) -> Any:
        if isinstance(value, Mapping):
            gone = {"id", "created_at", "completed_at", "cached_tokens", "call_id", "created"}
            return {name: without(each) for name, each in value.items() if name not in gone}
        return [without(each) for each in value] if isinstance(value, list) else value

    return without(response)
