"""MCP servers under their names: connected when they are first asked for, on a thread of their own, and asked within
bounds. One that fails ends the requests that ask for it, and is tried again by the next; nobody else hears of it."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from serve.errors import RequestError, ToolServerError
from serve.mcp.config import McpServerConfig
from serve.tools.tool import Tool

T = TypeVar("T")
MAX_TOOLS = 512
MAX_PAGES = 32
PICTURE = re.compile(r"image/[a-z0-9.+-]+", re.I)
MAX_PENDING = 64
"""Calls of one server at a time."""
MAX_MESSAGE_BYTES = 8 << 20
"""Of one message of a server's; a longer one is not read to its end."""
CLOSE_S = 5.0
CONNECTION_CLOSED = -32000
"""As the mcp package tells of it."""


class _ForgottenError(Exception):
    """The server knows the session no more, and has refused this question of it."""


class Given(str):
    """What a call gave, in words."""

    pictures: tuple[str, ...]
    """What it shows, as data URIs."""

    def __new__(cls, text: str, pictures: Iterable[str] = ()) -> Given:
        made = super().__new__(cls, text)
        made.pictures = tuple(pictures)
        return made


class McpServers:
    """All that a configuration names. Its thread starts with the first question."""

    def __init__(
        self, servers: Mapping[str, McpServerConfig], timeout_s: float = 30.0, max_result_chars: int = 65_536
    ) -> None:
        """
        timeout_s         what connecting, listing tools or one call may take
        max_result_chars  of a call's result; what is more is cut off, and said to be
        """
        self._servers = {name: _Server(name, server, timeout_s) for name, server in servers.items()}
        self._timeout_s = timeout_s
        self._max_result_chars = max_result_chars
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Of the servers."""
        return [*self._servers]

    async def tools(self, name: str) -> list[Tool]:
        """What a server offers. RequestError for a name that the configuration has not; ToolServerError."""
        server = self._server(name)
        return await self._on_thread(server.tools())

    async def call(self, name: str, tool: str, arguments: Mapping[str, Any]) -> Given:
        """What a call gives. ToolServerError where the server gives nothing."""
        server = self._server(name)
        given = await self._on_thread(server.call(tool, arguments))
        if len(given) > self._max_result_chars:
            text = f"{given[: self._max_result_chars]}\n[cut off: {len(given):,} characters]"
            return Given(text, given.pictures)
        return given

    def close(self) -> None:
        """End what runs. For good."""
        if self._loop is None or self._thread is None:
            return
        ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        try:
            ending.result(CLOSE_S + 1)
        except TimeoutError:
            ending.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_S)

    def _server(self, name: str) -> _Server:
        server = self._servers.get(name)
        if server is None:
            there = ", ".join(self._servers) or "none is configured (mcp_servers)"
            raise RequestError(f"tools: found no MCP server {name!r:.200}; there are {there}", "tools")
        return server

    async def _on_thread(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._started())
        return await asyncio.wrap_future(future)

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="lathe-mcp", daemon=True)
                self._thread.start()
            return self._loop

    async def _end(self) -> None:
        await asyncio.gather(*(server.close() for server in self._servers.values()), return_exceptions=True)


@dataclass
class _Line:
    """A connection from its beginning, and what is said of it."""

    client: asyncio.Future[Any]
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Nobody asks it any more."""
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    """It has ended by itself: nothing more is to be asked of it."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """It has other tools than were listed."""
    reason: str = ""
    """Why it has ended, where that is known."""
    num_pending: int = 0
    """Questions that it has not answered."""
    task: asyncio.Task[None] | None = None


class _Server:
    """One server; all of it on the thread's loop."""

    def __init__(self, name: str, config: McpServerConfig, timeout_s: float) -> None:
        self._name, self._config, self._timeout_s = name, config, timeout_s
        self._line: _Line | None = None
        self._tools: list[Tool] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        """Connections that are about to end, and what was started for them."""
        self._num_pending = 0
        """Calls."""

    async def tools(self) -> list[Tool]:
        line = await self._connected()
        if self._tools is None or line.changed.is_set():
            line.changed.clear()
            self._tools = await self._asked("tools/list", _listed, "listing its tools")
        return self._tools

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> Given:
        if self._num_pending >= MAX_PENDING:
            raise ToolServerError(f"MCP server {self._name!r} has {MAX_PENDING} calls to answer already")
        self._num_pending += 1
        try:
            result = await self._asked(
                "tools/call", lambda client: client.call_tool(tool, dict(arguments)), f"calling {tool!r:.200}"
            )
        finally:
            self._num_pending -= 1
        return Given(_text_of(result), _pictures_of(result))

    async def close(self) -> None:
        if self._line is not None:
            self._drop(self._line)
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=CLOSE_S)

    async def _asked(
        self, method: str, ask: Callable[[Any], Awaitable[Any]], doing: str, *, is_again: bool = False
    ) -> Any:
        """A question's answer; asked once more, in a new session, where the server had forgotten the last one."""
        line = await self._connected()
        try:
            return await self._within(line, ask(line.client.result()), doing)
        except _ForgottenError as error:
            # What the mcp package asks behind a call, when it has been done, is no reason to do it again.
            if not is_again and str(error) == method:
                return await self._asked(method, ask, doing, is_again=True)
        raise ToolServerError(f"MCP server {self._name!r}: {doing} failed: it has forgotten its session")

    async def _connected(self) -> _Line:
        line = self._line
        if line is not None and line.lost.is_set():
            self._line = None
            if not line.num_pending:  # else with its last answer
                self._drop(line)
        line = self._line
        if line is None or line.task is None or line.task.done():
            line = _Line(asyncio.get_running_loop().create_future())
            line.task = asyncio.ensure_future(self._live(line))
            self._tools, self._line = None, line
        await self._within(line, asyncio.shield(line.client), "connecting")
        return line

    async def _live(self, line: _Line) -> None:
        """The whole life of a connection, in one task, as its scopes demand."""
        try:
            async with _client(self._config, line) as client:
                if not line.client.done():
                    line.client.set_result(client)
                await line.closing.wait()
        except BaseException as error:
            if not line.client.done():
                reason = line.reason or _reason(error)
                line.client.set_exception(ToolServerError(f"MCP server {self._name!r}: {reason}"))
                line.client.exception()  # whoever waited may have left
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
                raise

    async def _within(self, line: _Line, work: Any, doing: str) -> Any:
        """ToolServerError where it takes too long or fails; then the next question connects anew."""
        line.num_pending += 1
        try:
            return await asyncio.wait_for(work, self._timeout_s)
        except ToolServerError:
            raise
        except TimeoutError:
            if line.num_pending <= 1:  # others wait for answers of it
                self._drop(line)
            raise ToolServerError(
                f"MCP server {self._name!r}: {doing} takes more than {self._timeout_s:g} s"
            ) from None
        except Exception as error:  # foreign code, over a wire
            if (method := _forgotten(error)) is not None:
                raise _ForgottenError(method) from None
            if _is_end(error):
                self._drop(line)
            reason = line.reason or _reason(error)
            raise ToolServerError(f"MCP server {self._name!r}: {doing} failed: {reason}") from None
        finally:
            line.num_pending -= 1
            if line is not self._line and not line.num_pending:
                self._drop(line)

    def _drop(self, line: _Line) -> None:
        """Leave a connection of which nothing more is to be expected; any number of times."""
        if self._line is line:
            self._line = None
        if line.closing.is_set() or line.task is None:
            return
        line.closing.set()
        self._leaving.add(line.task)
        line.task.add_done_callback(self._leaving.discard)
        if line.client.done():
            asyncio.get_running_loop().call_later(CLOSE_S, line.task.cancel)
        else:
            line.reason = "it was given up while it connected"
            line.task.cancel()  # nothing else is heard by then


@asynccontextmanager
async def _client(config: McpServerConfig, line: _Line) -> AsyncIterator[Any]:
    """The mcp package's client; imported here, for it takes a second."""
    from mcp import Client
    from mcp_types import ToolListChangedNotification

    from serve.mcp.bounded import http_client, over_http, over_streams

    async def hear(message: object) -> None:
        if isinstance(message, ToolListChangedNotification):
            line.changed.set()

    def tell(reason: str) -> None:
        line.reason = reason

    if config.url is not None:
        async with (
            http_client(config, MAX_MESSAGE_BYTES, line.lost.set) as http,
            Client(over_http(config, http, MAX_MESSAGE_BYTES), message_handler=hear) as client,
        ):
            yield client
        return
    streams = over_streams(config, MAX_MESSAGE_BYTES, tell, line.lost.set)
    async with Client(streams, message_handler=hear) as client:
        yield client


async def _listed(client: Any) -> list[Tool]:
    tools: list[Tool] = []
    cursor = None
    for _ in range(MAX_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += [Tool(each.name, each.description or each.title, each.input_schema) for each in page.tools]
        cursor = page.next_cursor
        if not cursor or len(tools) >= MAX_TOOLS:
            break
    return tools[:MAX_TOOLS]


def _text_of(result: Any) -> str:
    """What a model reads of a result: its texts; where there are none, or it failed, what it says as data too."""
    told = [_told(block) for block in result.content]
    parts = [
        f"[{block.type}]" if text is None else text for block, text in zip(result.content, told, strict=True)
    ]
    data = result.structured_content
    if (
        data is not None
        and (result.is_error or not any(told))
        and not any(_is_json_of(text, data) for text in told)
    ):
        parts = [part for part in parts if part] + [json.dumps(data, ensure_ascii=False)]
    text = "\n".join(parts)
    return f"Error: {text}" if result.is_error else text


def _pictures_of(result: Any) -> Iterator[str]:
    for block in result.content:
        holder = block.resource if block.type == "resource" else block
        data = getattr(holder, "blob" if block.type == "resource" else "data", None)
        kind = getattr(holder, "mime_type", None)
        if data and kind and PICTURE.fullmatch(kind):
            yield f"data:{kind};base64,{data}"


def _told(block: Any) -> str | None:
    """The words of a part; of a link what is known of what it leads to. None: it has none."""
    if block.type == "resource_link":
        return "\n".join(
            each for each in (block.title or block.name, str(block.uri), block.description) if each
        )
    if block.type == "resource":
        text = getattr(block.resource, "text", None)
        return f"[resource {block.resource.uri}]" if text is None else text
    text = getattr(block, "text", None)
    return text if isinstance(text, str) else None


def _is_json_of(text: str | None, data: Any) -> bool:
    try:
        return bool(json.loads(text or "") == data)
    except (ValueError, RecursionError):
        return False


def _forgotten(error: Exception) -> str | None:
    """The method of a question that was refused with its session."""
    from mcp import MCPError

    from serve.mcp.bounded import FORGOTTEN

    is_so = isinstance(error, MCPError) and error.message.startswith(FORGOTTEN)
    return str(error).removeprefix(FORGOTTEN) if is_so else None


def _is_end(error: Exception) -> bool:
    """Whether the connection is of no more use; else the server itself said no, or its answer is none by the protocol
    or by the tool's own schema, and it goes on."""
    from mcp import MCPError

    if isinstance(error, MCPError):
        return error.error.code == CONNECTION_CLOSED
    return not isinstance(error, (ValueError, RuntimeError))


def _reason(error: BaseException) -> str:
    """The innermost of what went wrong."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    name = type(error).__name__
    return (str(error) if name == "MCPError" else f"{name}: {error}")[:400]
