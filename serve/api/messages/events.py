"""What an answer brings, piece by piece → the events of its content blocks; events → the blocks.

A block is opened by what is to stand in it, so that none is empty or blank, which their server refuses in a history,
and none holds what is another's. How the answer is cut makes no difference to the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic_core import from_json

from serve.tools.call import CallPiece

Event = dict[str, Any]
Kind = Literal["thinking", "text", "tool_use"]
SIGNATURE = ""
"""Of thoughts: nobody checks that they are ours when they are sent back."""


class BlockEvents:
    """Of one answer."""

    def __init__(self) -> None:
        self.has_calls = False
        self._index = -1
        self._open: Kind | None = None
        self._call = -1
        self._blank = ""  # of the text or the thoughts that came last, and may come to nothing
        self._blank_of: Kind | None = None

    def add(self, kind: Literal["thinking", "text"], text: str) -> list[Event]:
        """Thoughts or text, as they come."""
        if not text:
            return []
        if self._open == kind:
            return [self._words(kind, text)]
        if self._blank_of == kind:
            text = self._blank + text
        closing = self._close()
        if not text.strip():
            self._blank, self._blank_of = text, kind
            return closing
        fields = {"text": ""} if kind == "text" else {"thinking": "", "signature": ""}
        return [*closing, self._start(kind, fields), self._words(kind, text)]

    def add_call(self, call: CallPiece) -> list[Event]:
        """What came of a call."""
        events = []
        if self._open != "tool_use" or self._call != call.index:
            events = self._close()
            self._call, self.has_calls = call.index, True
            events.append(self._start("tool_use", {"id": call.id, "name": call.name, "input": {}}))
        if call.arguments:
            events.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        return events

    def finish(self) -> list[Event]:
        """Nothing follows."""
        return self._close()

    def _words(self, kind: Kind, text: str) -> Event:
        return self._delta({"type": "text_delta" if kind == "text" else "thinking_delta", kind: text})

    def _start(self, kind: Kind, fields: dict[str, Any]) -> Event:
        self._index += 1
        self._open = kind
        block = {"type": kind, **fields}
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> list[Event]:
        self._blank, self._blank_of = "", None
        kind, self._open = self._open, None
        if kind is None:
            return []
        signed = (
            [self._delta({"type": "signature_delta", "signature": SIGNATURE})] if kind == "thinking" else []
        )
        return [*signed, {"type": "content_block_stop", "index": self._index}]


def joined(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The blocks, as a client joins them."""
    blocks: list[dict[str, Any]] = []
    arguments = ""
    for event in events:
        match event["type"]:
            case "content_block_start":
                blocks.append(dict(event["content_block"]))
                arguments = ""
            case "content_block_delta":
                delta = event["delta"]
                if delta["type"] == "input_json_delta":
                    arguments += delta["partial_json"]
                elif delta["type"] != "signature_delta":
                    kind = blocks[-1]["type"]
                    blocks[-1][kind] += delta[kind]
            case "content_block_stop" if blocks[-1]["type"] == "tool_use":
                blocks[-1]["input"] = input_of(arguments)
    return blocks


def input_of(arguments: str) -> dict[str, Any]:
    """The object that a call's JSON text says; of a text that was cut, or is broken further on, what is certain."""
    try:
        found = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
