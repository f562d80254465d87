"""Content blocks: however an answer is cut, the events make the same blocks, and the official client reads them."""

from __future__ import annotations

import json
import random

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import (
    Message,
    RawContentBlockDeltaEvent,
    RawContentBlockStartEvent,
    RawContentBlockStopEvent,
    RawMessageStartEvent,
)

from serve.api.answer import Answer, Piece
from serve.api.messages.events import BlockEvents, input_of, joined
from serve.tools.call import CallPiece

START = Message(
    id="msg_1", content=[], model="m", role="assistant", type="message", usage={"input_tokens": 1, "output_tokens": 0}
)  # fmt: skip
TYPES = {
    "content_block_start": RawContentBlockStartEvent,
    "content_block_delta": RawContentBlockDeltaEvent,
    "content_block_stop": RawContentBlockStopEvent,
}
WORDS = ["a", "", " ", "\n\n", "so it is", "\n", "é€", "  x", "y  "]


def random_spans(rng: random.Random) -> list[tuple[str, str]]:
    """Kinds and what they bring; of a call its JSON text."""
    spans = []
    for _ in range(rng.randrange(7)):
        kind = rng.choice(["reasoning", "text", "text", "call"])
        text = "".join(rng.choice(WORDS) for _ in range(rng.randrange(4)))
        if kind == "call":
            text = json.dumps({text: [1, {"deep": text}]} if rng.random() < 0.8 else {})
        spans.append((kind, text))
    return spans


def cut(text: str, rng: random.Random) -> list[str]:
    points = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(4)))
    return [text[a:b] for a, b in zip([0, *points], [*points, len(text)], strict=True)]


def pieces_of(spans: list[tuple[str, str]], rng: random.Random | None) -> list[Piece]:
    """Without rng each span is one piece."""
    pieces, num_calls = [], 0
    for kind, text in spans:
        parts = [text] if rng is None else cut(text, rng)
        if kind == "call":
            first = CallPiece(num_calls, f"call_{num_calls}", "look", parts[0])
            rest = [CallPiece(num_calls, None, None, part) for part in parts[1:]]
            if rng is None or rng.random() < 0.5:
                pieces.append(Piece(calls=(first, *rest)))
            else:
                pieces += [Piece(calls=(call,)) for call in (first, *rest)]
            num_calls += 1
        else:
            pieces += [Piece(**{kind: part}) for part in parts]
    return pieces


def events_of(pieces: list[Piece]) -> list[dict]:
    blocks, events = BlockEvents(), []
    for piece in pieces:
        events += blocks.add("thinking", piece.reasoning) + blocks.add("text", piece.text)
        for call in piece.calls:
            events += blocks.add_call(call)
    return events + blocks.finish()


def read_by_the_client(events: list[dict]) -> list[dict]:
    buffers: dict[int, bytes] = {}
    snapshot = accumulate_event(
        event=RawMessageStartEvent(message=START.model_copy(deep=True), type="message_start"),
        current_snapshot=None,
        json_bufs=buffers,
    )
    for event in events:
        made = TYPES[event["type"]].model_validate(event)
        snapshot = accumulate_event(event=made, current_snapshot=snapshot, json_bufs=buffers)
    return [block.to_dict() for block in snapshot.content]


def check_order(events: list[dict]) -> None:
    """One block at a time, numbered from 0; each delta is of its block's kind."""
    open_block, count = None, 0
    delta_of = {
        "text": {"text_delta"},
        "thinking": {"thinking_delta", "signature_delta"},
        "tool_use": {"input_json_delta"},
    }
    for event in events:
        if event["type"] == "content_block_start":
            assert open_block is None
            assert event["index"] == count
            open_block, count = event["content_block"]["type"], count + 1
            continue
        assert event["index"] == count - 1
        if event["type"] == "content_block_stop":
            open_block = None
        else:
            assert event["delta"]["type"] in delta_of[open_block]
    assert open_block is None


@pytest.mark.parametrize("seed", range(40))
def test_blocks_do_not_depend_on_how_an_answer_is_cut(seed):
    rng = random.Random(seed)
    for _ in range(25):
        spans = random_spans(rng)
        whole = joined(events_of(pieces_of(spans, None)))
        pieces = pieces_of(spans, rng)
        events = events_of(pieces)
        check_order(events)
        assert joined(events) == whole == read_by_the_client(events)
        answer = Answer()
        for piece in pieces:
            answer.add(piece)
        assert [answer.calls[span.call].arguments for span in answer.spans if span.kind == "call"] == [
            text for kind, text in spans if kind == "call"
        ]
        for kind, field in (("text", "text"), ("reasoning", "reasoning")):
            said = "".join(text for each, text in spans if each == kind)
            assert getattr(answer, field) == said
            assert "".join(span.text for span in answer.spans if span.kind == kind) == said
        told = [
            {"reasoning": "thinking", "text": "text", "call": "tool_use"}[kind]
            for kind, text in spans
            if kind == "call" or text.strip()
        ]
        kinds = [block["type"] for block in whole]
        assert [kind for kind in kinds if kind == "tool_use"] == [kind for kind in told if kind == "tool_use"]
        assert set(kinds) == set(told)
        for block in whole:
            if block["type"] != "tool_use":
                assert block[block["type"]].strip(), "a blank block, which no history may have"


def test_white_space_between_two_calls_is_no_block_and_opens_none():
    calls = [Piece(calls=(CallPiece(i, f"c{i}", "look", "{}"),)) for i in range(2)]
    events = events_of([Piece(text="Yes."), calls[0], Piece(text="\n"), calls[1], Piece(text="\n\n")])
    assert [block["type"] for block in joined(events)] == ["text", "tool_use", "tool_use"]
    assert [event["index"] for event in events if event["type"] == "content_block_start"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("{}", {}),
        ('{"a": 1, "b": [1, 2', {"a": 1, "b": [1, 2]}),
        ('{"path": "/tm', {}),
        ("[1]", {}),
        ('{"a": nonsense', {}),
    ],
)
def test_the_input_of_a_call_that_was_cut_is_what_is_certain(text, expected):
    assert input_of(text) == expected
