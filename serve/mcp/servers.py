"""MCP servers under their names: connected when they are first asked for, on a thread of their own, and asked within
bounds. One that fails ends the requests that ask for it, and is tried again by the next; nobody else hears of it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from serve.errors import RequestError, ToolServerError
from serve.mcp.config import McpServerConfig
from serve.tools.tool import Tool

T = TypeVar("T")
MAX_TOOLS = 512
MAX_PAGES = 32
MAX_PENDING = 64
"""Calls of one server at a time."""
MAX_MESSAGE_BYTES = 8 << 20
"""Of one message of a server's; a longer one is not read to its end."""
CLOSE_S = 5.0
CONNECTION_CLOSED = -32000
"""As the mcp package tells of it."""


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

    async def call(self, name: str, tool: str, arguments: Mapping[str, Any]) -> str:
        """What a call gives, as text. ToolServerError where the server gives nothing."""
        server = self._server(name)
        text = await self._on_thread(server.call(tool, arguments))
        if len(text) > self._max_result_chars:
            text = f"{text[: self._max_result_chars]}\n[cut off: {len(text):,} characters]"
        return text

    def close(self) -> None:
        """End what runs. For good."""
        if self._loop is None or self._thread is None:
            return
        ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        try:
            ending.result(CLOSE_S + 1)
        except Exception:  # what a server's end raises is nobody's
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


class _Server:
    """One server; all of it on the thread's loop."""

    def __init__(self, name: str, config: McpServerConfig, timeout_s: float) -> None:
        self._name, self._config, self._timeout_s = name, config, timeout_s
        self._connection: asyncio.Task[None] | None = None
        self._client: asyncio.Future[Any] | None = None
        self._closing: asyncio.Event | None = None
        self._tools: list[Tool] | None = None
        self._leaving: set[asyncio.Task[None]] = set()
        """Connections that are about to end, and what was started for them."""
        self._num_pending = 0
        self._reason = ""
        """Why the connection has ended, where that is known."""

    async def tools(self) -> list[Tool]:
        client = await self._connected()
        if self._tools is None:
            self._tools = await self._within(_listed(client), "listing its tools")
        return self._tools

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> str:
        if self._num_pending >= MAX_PENDING:
            raise ToolServerError(f"MCP server {self._name!r} has {MAX_PENDING} calls to answer already")
        self._num_pending += 1
        try:
            client = await self._connected()
            result = await self._within(client.call_tool(tool, dict(arguments)), f"calling {tool!r:.200}")
        finally:
            self._num_pending -= 1
        return _text_of(result)

    async def close(self) -> None:
        self._drop()
        if self._leaving:
            await asyncio.wait(self._leaving, timeout=CLOSE_S)

    async def _connected(self) -> Any:
        if self._connection is None or self._connection.done():
            self._tools, self._closing = None, asyncio.Event()
            self._client = asyncio.get_running_loop().create_future()
            self._connection = asyncio.ensure_future(self._live(self._client, self._closing))
        assert self._client is not None
        return await self._within(asyncio.shield(self._client), "connecting")

    async def _live(self, connected: asyncio.Future[Any], closing: asyncio.Event) -> None:
        """The whole life of a connection, in one task, as its scopes demand."""
        try:
            async with _client(self._config, self._hear) as client:
                if not connected.done():
                    connected.set_result(client)
                await closing.wait()
        except BaseException as error:
            if not connected.done():
                reason = self._told(error)
                connected.set_exception(ToolServerError(f"MCP server {self._name!r}: {reason}"))
                connected.exception()  # whoever waited may have left
            if isinstance(error, (asyncio.CancelledError, KeyboardInterrupt)):
                raise

    def _hear(self, reason: str) -> None:
        self._reason = reason

    def _told(self, error: BaseException) -> str:
        """Why, as far as is known."""
        reason, self._reason = self._reason or _reason(error), ""
        return reason

    async def _within(self, work: Any, doing: str) -> Any:
        """ToolServerError where it takes too long or fails; then the next question connects anew."""
        try:
            return await asyncio.wait_for(work, self._timeout_s)
        except ToolServerError:
            raise
        except TimeoutError:
            if self._num_pending <= 1:  # others wait for answers of it
                self._drop()
            raise ToolServerError(
                f"MCP server {self._name!r}: {doing} takes more than {self._timeout_s:g} s"
            ) from None
        except Exception as error:  # foreign code, over a wire
            if _is_end(error):
                self._drop()
            reason = self._told(error)
            raise ToolServerError(f"MCP server {self._name!r}: {doing} failed: {reason}") from None

    def _drop(self) -> None:
        """Leave a connection of which nothing more is to be expected."""
        if self._closing is not None:
            self._closing.set()
        connection, self._connection = self._connection, None
        if connection is not None:
            self._leaving.add(connection)
            connection.add_done_callback(self._leaving.discard)
            if self._client is not None and not self._client.done():
                self._hear("it was given up while it connected")
                connection.cancel()  # nothing else is heard by then
            else:
                asyncio.get_running_loop().call_later(CLOSE_S, connection.cancel)


@asynccontextmanager
async def _client(config: McpServerConfig, tell: Callable[[str], None]) -> AsyncIterator[Any]:
    """The mcp package's client; imported here, for it takes a second. tell: why a connection has ended."""
    from mcp import Client

    from serve.mcp.bounded import http_client, over_http, over_streams

    if config.url is not None:
        async with (
            http_client(config, MAX_MESSAGE_BYTES) as http,
            Client(over_http(config, http, MAX_MESSAGE_BYTES)) as client,
        ):
            yield client
        return
    async with Client(over_streams(config, MAX_MESSAGE_BYTES, tell)) as client:
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
    """What a model reads of a result."""
    parts = []
    for block in result.content:
        text = getattr(block, "text", None)
        if text is None and block.type == "resource":
            text = getattr(block.resource, "text", None)
        parts.append(text if isinstance(text, str) else f"[{block.type}]")
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    text = "\n".join(parts)
    return f"Error: {text}" if result.is_error else text


def _is_end(error: Exception) -> bool:
    """Whether the connection is of no more use; else the server itself said no, and goes on."""
    from mcp import MCPError

    return not isinstance(error, MCPError) or error.error.code == CONNECTION_CLOSED


def _reason(error: BaseException) -> str:
    """The innermost of what went wrong."""
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"[:400]
