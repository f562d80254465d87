"""Pieces in, the items of a response out, and the events by which a stream tells of them.

An item is open from its first piece to the next item's, and one at a time: thoughts, words and calls, in the order
in which the model writes them. Events stand without their numbers; what deltas bring joins to what the item holds.
"""

from __future__ import annotations

import codecs
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from serve.api.answer import Piece, RanCall
from serve.api.responses.items import packed_thought
from serve.api.responses.tools import Offered
from serve.engine.request import TokenLogprob
from serve.tools.call import CallPiece

Event = dict[str, Any]
Status = Literal["in_progress", "completed", "incomplete"]
Entries = list[dict[str, Any]]
"""Log-probabilities of tokens, as OpenAI writes them."""


class Output:
    """The items of one response, as they grow."""

    def __init__(
        self,
        *,
        offered: Mapping[str, Offered],
        tells_thoughts: bool,
        summarizes: bool,
        packs_thoughts: bool,
        logprobs: Callable[[Sequence[TokenLogprob]], Entries] | None,
    ) -> None:
        """
        offered         tools, by the names that calls have
        tells_thoughts  the response is to have them
        summarizes      thoughts are their summary too
        packs_thoughts  and stand in encrypted_content
        logprobs        writes entries, where they are wanted
        """
        self.items: list[dict[str, Any]] = []
        self._offered = offered
        self._tells_thoughts = tells_thoughts
        self._summarizes = summarizes
        self._packs_thoughts = packs_thoughts
        self._write_logprobs = logprobs
        self._pending: Entries = []
        """Of tokens whose text has not come."""
        self._is_behind = False
        """They may begin with what is no text: the end of a thought, or of a call."""
        self._call_index = -1
        """Of the call that is open, among the answer's calls."""
        self._typed = ""
        """What came of a call whose input is any text: still JSON."""

    def push(self, piece: Piece) -> list[Event]:
        """What a piece brought."""
        events: list[Event] = []
        if self._write_logprobs is not None:
            self._pending += self._write_logprobs(piece.logprobs)
        if piece.reasoning:
            if self._tells_thoughts:
                events += self._think(piece.reasoning)
            self._pending, self._is_behind = [], True
        if piece.text:
            events += self._say(piece.text)
        for call in piece.calls:
            events += self._call(call)
            self._is_behind = True
        for ran in piece.ran:
            events += self._ran(ran)
            self._is_behind = True
        return events

    def finish(self, status: Status) -> list[Event]:
        """Close what is open, as `status` has it. A whole response says something, be it nothing."""
        events: list[Event] = []
        if status == "completed" and not any(item["type"] != "reasoning" for item in self.items):
            events += self._open_message()
        return events + self._close(status)

    def _think(self, text: str) -> list[Event]:
        events = [] if self._is_open("reasoning") else self._open_thought()
        item = self.items[-1]
        item["content"][0]["text"] += text
        events.append(self._event("reasoning_text.delta", content_index=0, delta=text))
        if self._summarizes:
            item["summary"][0]["text"] += text
            events.append(self._event("reasoning_summary_text.delta", summary_index=0, delta=text))
        return events

    def _open_thought(self) -> list[Event]:
        item: dict[str, Any] = {"id": item_id("rs"), "type": "reasoning", "summary": [], "content": []}
        item |= {"encrypted_content": None, "status": "in_progress"}
        events = self._open(item)
        item["content"].append({"type": "reasoning_text", "text": ""})
        events.append(self._event("content_part.added", content_index=0, part=dict(item["content"][0])))
        if self._summarizes:
            item["summary"].append({"type": "summary_text", "text": ""})
            events.append(
                self._event("reasoning_summary_part.added", summary_index=0, part=dict(item["summary"][0]))
            )
        return events

    def _say(self, text: str) -> list[Event]:
        events = [] if self._is_open("message") else self._open_message()
        part = self.items[-1]["content"][0]
        entries, self._pending = [entry for entry in self._pending if entry["bytes"]], []
        if self._is_behind:
            entries, self._is_behind = _of_text(entries, text), False
        part["text"] += text
        if self._write_logprobs is not None:
            part["logprobs"] += entries
        events.append(self._event("output_text.delta", content_index=0, delta=text, logprobs=entries))
        return events

    def _open_message(self) -> list[Event]:
        item: dict[str, Any] = {"id": item_id("msg"), "type": "message", "role": "assistant", "content": []}
        item["status"] = "in_progress"
        events = self._open(item)
        part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        events.append(self._event("content_part.added", content_index=0, part={**part, "logprobs": []}))
        return events

    def _call(self, piece: CallPiece) -> list[Event]:
        events: list[Event] = []
        if piece.index != self._call_index or not self._is_open("function_call", "custom_tool_call"):
            events += self._open_call(piece)
        if not piece.arguments:
            return events
        item = self.items[-1]
        if item["type"] == "custom_tool_call":
            self._typed += piece.arguments
        else:
            item["arguments"] += piece.arguments
            events.append(self._event("function_call_arguments.delta", delta=piece.arguments))
        return events

    def _open_call(self, piece: CallPiece) -> list[Event]:
        offered = self._offered.get(piece.name or "")
        takes_any_text = offered is not None and offered.takes_any_text
        item: dict[str, Any] = {
            "id": item_id("ctc" if takes_any_text else "fc"),
            "type": "custom_tool_call" if takes_any_text else "function_call",
            "call_id": piece.id or item_id("call"),
            "name": offered.tool.name if offered is not None else piece.name or "",
            "input" if takes_any_text else "arguments": "",
            "status": "in_progress",
        }
        if offered is not None and offered.namespace is not None:
            item["namespace"] = offered.namespace
        events = self._open(item)
        self._call_index, self._typed = piece.index, ""
        return events

    def _ran(self, ran: RanCall) -> list[Event]:
        """A call of an MCP server's tool, which was run here: it is told as it has ended."""
        item: dict[str, Any] = {
            "id": ran.id,
            "type": "mcp_call",
            "server_label": ran.server,
            "name": ran.name,
        }
        item |= {"arguments": "", "output": None, "error": None, "status": "in_progress"}
        events = [*self._open(item), self._event("mcp_call.in_progress")]
        self.items[-1] |= {"arguments": ran.arguments, "output": ran.output}
        events += [
            self._event("mcp_call_arguments.delta", delta=ran.arguments),
            self._event("mcp_call_arguments.done", arguments=ran.arguments),
            self._event("mcp_call.completed"),
        ]
        return events + self._close("completed")

    def _open(self, item: dict[str, Any]) -> list[Event]:
        events = self._close("completed")
        self.items.append(item)
        return [*events, self._event("output_item.added", item=_copy(item), item_id=None)]

    def _close(self, status: Status) -> list[Event]:
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item = self.items[-1]
        ends = {"reasoning": self._end_thought, "message": self._end_message, "mcp_call": list}
        events: list[Event] = ends.get(item["type"], self._end_call)()
        item["status"] = status
        return [*events, self._event("output_item.done", item=_copy(item), item_id=None)]

    def _end_thought(self) -> list[Event]:
        item = self.items[-1]
        part = item["content"][0]
        events = [
            self._event("reasoning_text.done", content_index=0, text=part["text"]),
            self._event("content_part.done", content_index=0, part=dict(part)),
        ]
        if self._summarizes:
            told = item["summary"][0]
            events += [
                self._event("reasoning_summary_text.done", summary_index=0, text=told["text"]),
                self._event("reasoning_summary_part.done", summary_index=0, part=dict(told)),
            ]
        if self._packs_thoughts:
            item["encrypted_content"] = packed_thought(part["text"])
        return events

    def _end_message(self) -> list[Event]:
        part = self.items[-1]["content"][0]
        return [
            self._event("output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]),
            self._event("content_part.done", content_index=0, part=_copy(part)),
        ]

    def _end_call(self) -> list[Event]:
        item = self.items[-1]
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            return [self._event("function_call_arguments.done", **done)]
        item["input"] = _typed(self._typed)
        events = [self._event("custom_tool_call_input.delta", delta=item["input"])] if item["input"] else []
        return [*events, self._event("custom_tool_call_input.done", input=item["input"])]

    def _is_open(self, *kinds: str) -> bool:
        return (
            bool(self.items) and self.items[-1]["type"] in kinds and self.items[-1]["status"] == "in_progress"
        )

    def _event(self, kind: str, **fields: Any) -> Event:
        """Of the last item."""
        event = {
            "type": f"response.{kind}",
            "item_id": self.items[-1]["id"],
            "output_index": len(self.items) - 1,
        }
        event |= fields
        return {name: value for name, value in event.items() if value is not None or name != "item_id"}


def item_id(prefix: str) -> str:
    """As OpenAI's look."""
    return f"{prefix}_{secrets.token_hex(16)}"


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it is now; what grows in it is no longer the same object."""
    return {
        name: [dict(part) for part in value] if isinstance(value, list) else value
        for name, value in item.items()
    }


def _typed(text: str) -> str:
    """The input that a model wrote as an object of one string; as it stands, if it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    inside = found.get("input") if isinstance(found, dict) else None
    return inside if isinstance(inside, str) else text


def _of_text(entries: Entries, text: str) -> Entries:
    """Those of the tokens that begin `text`: what came before it, a mark or a newline, is none of it."""
    for first in range(len(entries)):
        written = bytes(value for entry in entries[first:] for value in entry["bytes"])
        said = codecs.getincrementaldecoder("utf-8")("replace").decode(written)
        if text.startswith(said) or said.startswith(text):
            return entries[first:]
    return []
