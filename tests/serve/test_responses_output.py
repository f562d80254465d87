"""Pieces become items and events: however an answer is cut, what deltas bring joins to what the items hold."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable

import pytest
from response_events import check_items, nameless

from serve.api.answer import Piece
from serve.api.responses.body import ResponsesBody
from serve.api.responses.items import thought_in
from serve.api.responses.output import Output
from serve.api.responses.tools import toolbox
from serve.tools.call import CallPiece

TOOLS = [
    {"type": "function", "name": "look"},
    {"type": "custom", "name": "patch"},
    {"type": "namespace", "name": "mcp__disk__", "tools": [{"type": "function", "name": "read"}]},
]
WORDS = ["a", "bc", "\n\n", "ä€", "🙂", " ", '"}', "def"]


def output(**changes) -> Output:
    body = ResponsesBody.model_validate({"model": "m", "input": "x", "tools": TOOLS})
    settings = {"tells_thoughts": True, "summarizes": False, "packs_thoughts": False, "logprobs": None}
    return Output(offered=toolbox(body.tools or (), None).offered, **{**settings, **changes})


def random_answer(rng: random.Random) -> list[Piece]:
    """Runs of thoughts and of words, then calls, each in pieces."""
    pieces: list[Piece] = []
    for _ in range(rng.randrange(4)):
        kind = rng.choice(["reasoning", "text"])
        pieces += [Piece(**{kind: rng.choice(WORDS)}) for _ in range(rng.randrange(1, 5))]
    for index in range(rng.randrange(4)):
        name = rng.choice(["look", "patch", "mcp__disk__read", "unknown"])
        said = rng.choice(WORDS) * rng.randrange(4)
        text = json.dumps({"input": said} if name == "patch" else {"at": said}, ensure_ascii=False)
        cuts = sorted(rng.sample(range(len(text) + 1), min(rng.randrange(4), len(text))))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        pieces.append(Piece(calls=(CallPiece(index, f"call_{index}", name),)))
        pieces += [Piece(calls=(CallPiece(index, arguments=part),)) for part in parts]
    return pieces


def merged(pieces: Iterable[Piece], rng: random.Random) -> list[Piece]:
    """The same answer, where some neighbours come as one piece: thoughts before words before calls."""
    out: list[Piece] = []
    for piece in pieces:
        last = out[-1] if out else None
        fits = last is not None and not last.calls and not (last.text and piece.reasoning)
        if last is not None and piece.calls and not piece.text and not piece.reasoning:
            fits = True
        if last is not None and fits and rng.random() < 0.5:
            both = last.reasoning + piece.reasoning, last.text + piece.text, last.calls + piece.calls
            out[-1] = Piece(reasoning=both[0], text=both[1], calls=both[2])
        else:
            out.append(piece)
    return out


def told(pieces: Iterable[Piece], **settings) -> tuple[list[dict], Output]:
    made = output(**settings)
    events = [event for piece in pieces for event in made.push(piece)]
    return [*events, *made.finish("completed")], made


@pytest.mark.parametrize("summarizes", [False, True])
def test_events_tell_of_the_items_however_an_answer_is_cut(summarizes):
    rng = random.Random(1)
    kinds = set()
    for _ in range(600):
        pieces = random_answer(rng)
        events, made = told(pieces, summarizes=summarizes)
        assert check_items(events) == made.items
        again, other = told(merged(pieces, rng), summarizes=summarizes)
        assert check_items(again) == other.items
        assert nameless({"all": other.items}) == nameless({"all": made.items})
        kinds |= {item["type"] for item in made.items}
        said = "".join(i["content"][0]["text"] for i in made.items if i["type"] == "message")
        thought = "".join(i["content"][0]["text"] for i in made.items if i["type"] == "reasoning")
        assert said == "".join(piece.text for piece in pieces)
        assert thought == "".join(piece.reasoning for piece in pieces)
    assert kinds == {"reasoning", "message", "function_call", "custom_tool_call"}


def test_a_call_is_told_by_the_name_and_the_namespace_that_its_client_knows():
    calls = [
        CallPiece(0, "c0", "mcp__disk__read", '{"at": 1}'),
        CallPiece(1, "c1", "patch", '{"input": "*** Begin"}'),
        CallPiece(2, "c2", "look", "{}"),
    ]
    _, made = told([Piece(calls=(call,)) for call in calls])
    read, patch, look = made.items
    assert (read["type"], read["name"], read["namespace"]) == ("function_call", "read", "mcp__disk__")
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "patch", "*** Begin")
    assert (look["name"], look["arguments"], look["call_id"]) == ("look", "{}", "c2")
    assert "namespace" not in look


def test_input_of_any_text_that_is_no_object_is_told_as_it_was_written():
    _, made = told([Piece(calls=(CallPiece(0, "c", "patch", "*** Begin"),))])
    assert made.items[0]["input"] == "*** Begin"


def test_thoughts_are_packed_where_they_are_to_come_back_and_kept_back_where_nobody_wants_them():
    pieces = [Piece(reasoning="what "), Piece(reasoning="else"), Piece(text="so")]
    _, made = told(pieces, packs_thoughts=True)
    assert thought_in(made.items[0]["encrypted_content"]) == "what else"
    _, made = told(pieces)
    assert made.items[0]["encrypted_content"] is None
    _, made = told(pieces, tells_thoughts=False)
    assert [item["type"] for item in made.items] == ["message"]


def test_an_answer_of_nothing_is_a_message_of_nothing_and_a_thought_that_was_cut_off_none():
    events, made = told([])
    assert check_items(events) == made.items
    assert made.items[0]["content"][0]["text"] == ""
    made = output()
    events = [*made.push(Piece(reasoning="hm")), *made.finish("incomplete")]
    assert [item["status"] for item in check_items(events)] == ["incomplete"]
    assert [item["type"] for item in made.items] == ["reasoning"]
