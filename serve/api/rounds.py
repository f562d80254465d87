"""A chat whose answers may call tools of MCP servers: they are run here, and the model goes on with what they gave.

The client gets the words of all rounds as one answer, what was run beside them, and calls of its own tools as ever;
an answer that calls one of these ends the turn, and what it called of a server's beside them is not run.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from serve.api.answer import Piece, RanCall
from serve.api.message_bodies import Message
from serve.api.permission import check_tools_of
from serve.api.schemas import ChatBody
from serve.api.tool_bodies import McpEntry, ToolBody
from serve.api.turn import Turn
from serve.errors import ContextLengthError, DeadlineError, RequestError, ToolServerError
from serve.mcp.servers import McpServers
from serve.sight import kinds_of
from serve.tools.call import Call, CallPiece, add_pieces
from serve.tools.tool import Tool

MAX_CALLS = 16
"""Of one answer that are run."""

Begin = Callable[[ChatBody], Awaitable[Turn]]


@dataclass(frozen=True)
class Offer:
    """A body that tells of servers' tools as of functions, and whose they are."""

    body: ChatBody
    owners: Mapping[str, tuple[str, str]]
    """Function → server, and the tool's name there."""


async def offered(servers: McpServers, body: ChatBody) -> Offer:
    """What a body's entries of servers come to. RequestError names one that cannot be served; ForbiddenError one that
    the request's key may not use; ToolServerError."""
    if (body.n or 1) > 1:
        raise RequestError(
            f"n: found {body.n} beside tools of MCP servers; each answer is a talk of its own", "n"
        )
    for entry in body.mcp:
        check_tools_of(entry.server_label)
    listed = await asyncio.gather(*(servers.tools(entry.server_label) for entry in body.mcp))
    entries: list[Any] = [entry for entry in body.tools or () if isinstance(entry, ToolBody)]
    taken = {entry.function.name for entry in entries}
    owners: dict[str, tuple[str, str]] = {}
    for entry, tools in zip(body.mcp, listed, strict=True):
        for tool in _allowed(entry, tools):
            name = _free_name(entry.server_label, tool.name, taken)
            taken.add(name)
            owners[name] = (entry.server_label, tool.name)
            entries.append(_entry(name, tool))
    told = body.model_copy(update={"tools": entries})
    told.check_choice()
    return Offer(told, owners)


def _free_name(server: str, tool: str, taken: Container[str]) -> str:
    """What a function is called: as the tool, if nothing else is."""
    name = tool if tool not in taken else f"{server}__{tool}"
    return next(
        each for number in count(1) if (each := name if number == 1 else f"{name}_{number}") not in taken
    )


def _allowed(entry: McpEntry, tools: Sequence[Tool]) -> list[Tool]:
    known = {tool.name for tool in tools}
    unknown = next((name for name in entry.allowed or () if name not in known), None)
    if unknown is not None:
        raise RequestError(
            f"tools: MCP server {entry.server_label!r} has no tool {unknown!r:.200}; it has "
            f"{', '.join(sorted(known))[:400]}",
            "tools",
        )
    return [tool for tool in tools if entry.allowed is None or tool.name in entry.allowed]


def _entry(name: str, tool: Tool) -> ToolBody:
    function = {"name": name, "description": tool.description, "parameters": dict(tool.parameters or {})}
    try:
        return ToolBody.model_validate({"type": "function", "function": function})
    except ValueError:
        raise ToolServerError(f"an MCP server offers a tool that no model can call: {name!r:.200}") from None


class RoundsTurn(Turn):
    """As a Turn, of one row."""

    def __init__(self, turn: Turn, begin: Begin, offer: Offer, servers: McpServers, max_rounds: int) -> None:
        """turn: the first round's; begin: another's, whose body is this one's with more said."""
        super().__init__(
            turn.generation,
            turn.num_prompt_tokens,
            logprobs=turn.logprobs,
            tells_thoughts=turn.tells_thoughts,
            tools=turn.tools,
        )
        self._begin, self._servers, self._owners = begin, servers, offer.owners
        self._body, self._num_left = offer.body, max_rounds
        self._num_own = 0  # calls of the client's tools, in all
        self._open()

    def _open(self) -> None:
        """A round begins."""
        self._text, self._reasoning = "", ""
        self._calls: list[Call] = []
        self._numbers: dict[int, int] = {}  # of an answer's calls that are the client's

    async def next(self) -> tuple[int, Piece]:
        row, piece = await super().next()
        self._text += piece.text
        self._reasoning += piece.reasoning
        add_pieces(self._calls, piece.calls)
        piece = piece._replace(calls=tuple(self._own(piece.calls)))
        if piece.finish is None:
            return row, piece
        if piece.finish != "tool_calls" or self._numbers or not self._calls:
            return row, piece
        ran = await self._run(self._calls)
        try:
            await self._go_on(ran)
        except ContextLengthError:  # what has been run is told, not lost
            return row, piece._replace(finish="length", stop_reason=None, ran=ran)
        return row, piece._replace(finish=None, stop_reason=None, ran=ran)

    def _own(self, pieces: Sequence[CallPiece]) -> list[CallPiece]:
        """Those of the client's tools, counted without the others."""
        own = []
        for piece in pieces:
            if piece.name is not None and piece.name not in self._owners:
                self._numbers[piece.index] = self._num_own
                self._num_own += 1
            if piece.index in self._numbers:
                own.append(replace(piece, index=self._numbers[piece.index]))
        return own

    async def _run(self, calls: Sequence[Call]) -> tuple[RanCall, ...]:
        """What calls give; what goes wrong is told to the model."""
        left_s = None if self._body.deadline_s is None else self._body.deadline_s - time.monotonic()
        running = asyncio.gather(*(self._result(number, call) for number, call in enumerate(calls)))
        try:
            return tuple(await asyncio.wait_for(running, left_s))
        except TimeoutError:
            raise DeadlineError(
                "the answer took longer than the request's timeout: a tool was running"
            ) from None

    async def _result(self, number: int, call: Call) -> RanCall:
        server, tool = self._owners[call.name]
        ran = RanCall(call.id, server, tool, call.arguments, "")
        if number >= MAX_CALLS:
            return replace(ran, output=f"Error: at most {MAX_CALLS} calls of one answer are run")
        try:
            arguments = json.loads(call.arguments or "{}", strict=False)
        except (ValueError, RecursionError) as error:
            return replace(ran, output=f"Error: the arguments are no JSON: {error}"[:400])
        if not isinstance(arguments, dict):
            return replace(ran, output="Error: the arguments are no JSON object")
        try:
            given = await self._servers.call(server, tool, arguments)
            return replace(ran, output=str(given), pictures=given.pictures)
        except ToolServerError as error:
            return replace(ran, output=f"Error: {error}")

    async def _go_on(self, ran: Sequence[RanCall]) -> None:
        """The next round begins, with what was called and what came of it."""
        self._num_left -= 1
        said: dict[str, Any] = {
            "role": "assistant",
            "content": self._text or None,
            "tool_calls": [
                {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
                for call in self._calls
            ],
        }
        if self._reasoning:
            said["reasoning_content"] = self._reasoning
        results = [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": done.output}
            for call, done in zip(self._calls, ran, strict=True)
        ]
        shown = [*self._shown(ran)]
        try:
            turn = await self._begun([said, *results, *shown])
        except RequestError:
            if not shown:
                raise
            turn = await self._begun([said, *results])  # what cannot be shown is told of, and no more
        turn.generation.go_on_from(self.generation)
        self.generation.close()
        self.num_prompt_tokens += turn.num_prompt_tokens
        self.generation, self.logprobs, self.tools = turn.generation, turn.logprobs, turn.tools
        self._readers.clear()
        self._open()

    def _shown(self, ran: Sequence[RanCall]) -> Iterator[dict[str, Any]]:
        """A turn with the pictures that tools gave, as in Messages; none for a model that sees none."""
        if "image" not in kinds_of(self.target.services.runtime.sight):
            return
        parts: list[dict[str, Any]] = []
        for done in ran:
            if done.pictures:
                parts.append({"type": "text", "text": f"What {done.name} shows:"})
                parts += ({"type": "image_url", "image_url": {"url": url}} for url in done.pictures)
        if parts:
            yield {"role": "user", "content": parts}

    async def _begun(self, more: Sequence[dict[str, Any]]) -> Turn:
        """The next round under way, with more said; it is what the one after it goes on from."""
        body = self._body.model_copy(
            update={
                "messages": [*self._body.messages, *map(Message.model_validate, more)],
                "tool_choice": "auto" if self._num_left > 0 else "none",
                "continue_final_message": None,
            }
        )
        turn = await self._begin(body)
        self._body = body
        return turn
