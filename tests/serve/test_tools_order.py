"""Text and calls come in the order in which an answer says them, however it is cut into events."""

from __future__ import annotations

import json
import random

import pytest

from serve.api.answer import Answer
from serve.api.tools import RowReader
from serve.engine.request import Event
from serve.tools.formats import FORMATS
from serve.tools.reader import ToolReader
from serve.tools.tool import Tool

LOOK = Tool("look", "Looks.", {"type": "object", "properties": {"at": {"type": "string"}}})


def written(spans: list[str | dict]) -> str:
    return "".join(
        span
        if isinstance(span, str)
        else f'<tool_call>\n{{"name": "look", "arguments": {json.dumps(span)}}}\n</tool_call>'
        for span in spans
    )


def read(text: str, points: list[int]) -> Answer:
    """The answer that comes of the text, cut there into events."""
    reader, answer = RowReader(ToolReader(FORMATS["hermes"], (LOOK,))), Answer()
    ends = [*points, len(text)]
    for number, (begin, end) in enumerate(zip([0, *points], ends, strict=True)):
        is_last = number == len(points)
        event = Event("r", text[begin:end], (number,), finish="stop" if is_last else None)
        pieces = reader.read(event)
        assert [piece.finish is not None for piece in pieces] == [False] * (len(pieces) - 1) + [is_last]
        assert [piece.token_ids for piece in pieces] == [(number,), *[()] * (len(pieces) - 1)]
        for piece in pieces:
            answer.add(piece)
    return answer


def told(answer: Answer) -> list[str | dict]:
    return [
        json.loads(answer.calls[span.call].arguments) if span.kind == "call" else span.text.strip()
        for span in answer.spans
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_text_and_calls_does_not_depend_on_the_cut(seed):
    rng = random.Random(seed)
    for _ in range(20):
        spans: list[str | dict] = []
        for _ in range(rng.randrange(1, 6)):
            is_words = rng.random() < 0.5 and not (spans and isinstance(spans[-1], str))
            spans.append(
                rng.choice(["So.", "And: then", "é…"]) if is_words else {"at": rng.choice(["/", "b", "x y"])}
            )
        text = written(spans)
        for count in (0, 1, 5, len(text) - 1):
            points = sorted(rng.sample(range(1, len(text)), min(count, len(text) - 1)))
            answer = read(text, points)
            assert told(answer) == spans
            has_calls = any(isinstance(span, dict) for span in spans)
            assert answer.finish == ("tool_calls" if has_calls else "stop")
