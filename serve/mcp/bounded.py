"""What carries messages to and from an MCP server, and takes none of more bytes than it may have: over a program's
standard streams, or HTTP. What is more ends the connection, or the response, before it is held. Whoever asked is told
what the mcp package would call a closed connection: an address that refuses, a status, a program's end."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import anyio
import httpx2
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from mcp.client.stdio import get_default_environment
from mcp.client.streamable_http import streamable_http_client
from mcp.os.posix.utilities import terminate_posix_process_tree
from mcp.shared._httpx_utils import MCP_DEFAULT_SSE_READ_TIMEOUT, MCP_DEFAULT_TIMEOUT
from mcp.shared.message import SessionMessage
from mcp_types import CONNECTION_CLOSED, INTERNAL_ERROR, jsonrpc_message_adapter

from serve.mcp.config import McpServerConfig

SESSION = "mcp-session-id"
FORGOTTEN = f"the session is forgotten ({uuid4().hex}): "
"""How the error of a question begins that a server has refused because it does not know the session; the question's
method follows. No server can say it."""
NO_SESSION = re.compile(
    rb"(no valid|invalid|unknown|expired|missing) session|session (id )?(not found|unknown|invalid|expired)",
    re.I,
)
"""What many servers say of it beside 400, where the protocol has 404."""
EXIT_S = 1.0
"""For a program to end by itself once nobody speaks to it any more, and once it was told to end."""


@asynccontextmanager
async def over_streams(
    config: McpServerConfig, max_bytes: int, tell: Callable[[str], None], lose: Callable[[], None]
) -> AsyncIterator[tuple[Any, Any]]:
    """A program that is started, and ended with all that it has started.

    tell  why nothing comes any more, where that is known
    lose  called once nothing comes any more
    """
    assert config.command is not None
    process = await anyio.open_process(
        [config.command, *config.args],
        env={**get_default_environment(), **config.env},
        cwd=config.cwd,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    to_client, from_server = anyio.create_memory_object_stream[SessionMessage | Exception](0)
    to_server, from_client = anyio.create_memory_object_stream[SessionMessage](0)

    async def read() -> None:
        assert process.stdout is not None
        lines = BufferedByteReceiveStream(process.stdout)
        async with to_client:
            while True:
                try:
                    line = await lines.receive_until(b"\n", max_bytes)
                except anyio.DelimiterNotFound:
                    tell(f"it sent a message of more than {max_bytes:,} bytes")
                    return
                except (anyio.IncompleteRead, anyio.BrokenResourceError):
                    with anyio.move_on_after(EXIT_S):
                        tell(f"its program ended, with status {await process.wait()}")
                    return
                except anyio.ClosedResourceError:
                    return
                try:
                    await to_client.send(_parsed(line))
                except (anyio.ClosedResourceError, anyio.BrokenResourceError):
                    return

    async def write() -> None:
        assert process.stdin is not None
        async with from_client:
            with suppress(anyio.ClosedResourceError, anyio.BrokenResourceError, OSError):
                async for message in from_client:
                    text = message.message.model_dump_json(by_alias=True, exclude_unset=True)
                    await process.stdin.send(text.encode() + b"\n")
        await to_client.aclose()  # of what hears nothing any more nothing is to be expected either

    async def read_to_the_end() -> None:
        try:
            await read()
        finally:
            lose()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read_to_the_end)
        tasks.start_soon(write)
        try:
            yield from_server, to_server
        finally:
            with anyio.CancelScope(shield=True):
                for stream in (from_server, to_server):
                    stream.close()
                await _end(process)
            tasks.cancel_scope.cancel()


def _parsed(line: bytes) -> SessionMessage | Exception:
    try:
        return SessionMessage(jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError as error:
        return error


async def _end(process: Process) -> None:
    """Nobody speaks to it any more, then it is told to end, then it is ended."""
    try:
        await _ended(process)
    finally:
        # asyncio's own side of it, which would else be closed by the collector, when the loop may be gone.
        transport = getattr(getattr(process, "_process", None), "_transport", None)
        if transport is not None:
            transport.close()
    await anyio.sleep(0)  # its pipes hear of it


async def _ended(process: Process) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
        await process.stdin.aclose()
    with anyio.move_on_after(EXIT_S):
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError):
            while True:  # one that is stuck writing would not see that
                await process.stdout.receive()
        while process.returncode is None:
            await anyio.sleep(0.01)
    await terminate_posix_process_tree(process, EXIT_S)
    with anyio.move_on_after(EXIT_S):
        await process.aclose()


def over_http(
    config: McpServerConfig, http: httpx2.AsyncClient, max_bytes: int
) -> AbstractAsyncContextManager[Any]:
    """An address, asked by what `http_client` gave."""
    assert config.url is not None
    return streamable_http_client(config.url, http_client=http, max_sse_event_size=max_bytes)


def http_client(config: McpServerConfig, max_bytes: int, lose: Callable[[], None]) -> httpx2.AsyncClient:
    """A client of one address. Responses that are no streams of events are as long as a message at most.

    lose  called when the server knows the session no more, or does not answer
    """
    return httpx2.AsyncClient(
        headers={**config.headers, "Accept-Encoding": "identity"},
        timeout=httpx2.Timeout(MCP_DEFAULT_TIMEOUT, read=MCP_DEFAULT_SSE_READ_TIMEOUT),
        transport=_Bounded(httpx2.AsyncHTTPTransport(), max_bytes, lose),
    )


class _Bounded(httpx2.AsyncBaseTransport):
    """Another transport, whose responses are counted as they come."""

    def __init__(self, inner: httpx2.AsyncBaseTransport, max_bytes: int, lose: Callable[[], None]) -> None:
        self._inner, self._max_bytes, self._lose = inner, max_bytes, lose

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.method != "POST":  # it asks nothing
            return await self._counted(request)
        try:
            return await self._told(request, await self._counted(request))
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            if isinstance(error, httpx2.TransportError):
                self._lose()
            reason = f"{_address(request)}: {type(error).__name__}: {error}"
            return _refusal(request, 502, INTERNAL_ERROR, reason)

    async def _counted(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise httpx2.DecodingError("the response is compressed, which was not asked for")
        if not _has_events(response):
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _Counted(response.stream, self._max_bytes)
        return response

    async def _told(self, request: httpx2.Request, response: httpx2.Response) -> httpx2.Response:
        """A message's response: read, unless it is a stream; one that says no, in the protocol's words."""
        has_session = SESSION in request.headers
        if has_session and response.status_code == 404:  # as the protocol has it
            await response.aclose()
            return self._forgotten(request)
        if _has_events(response):
            return response
        body = await response.aread()
        if has_session and response.status_code == 400 and NO_SESSION.search(body):
            return self._forgotten(request)
        if response.status_code >= 400 and not _is_message(body):
            reason = f"{_address(request)} answered {response.status_code} {response.reason_phrase}".rstrip()
            return _refusal(request, response.status_code, INTERNAL_ERROR, reason)
        return response

    def _forgotten(self, request: httpx2.Request) -> httpx2.Response:
        self._lose()
        method = json.loads(request.content).get("method", "")
        return _refusal(request, 404, CONNECTION_CLOSED, f"{FORGOTTEN}{method}")

    async def aclose(self) -> None:
        await self._inner.aclose()


def _has_events(response: httpx2.Response) -> bool:
    is_one = response.headers.get("content-type", "").startswith("text/event-stream")
    return is_one and response.status_code < 400


def _is_message(body: bytes) -> bool:
    try:
        jsonrpc_message_adapter.validate_json(body, by_name=False)
    except ValueError:
        return False
    return True


def _address(request: httpx2.Request) -> str:
    """Without path and query, which may hold a key."""
    return f"{request.url.scheme}://{request.url.netloc.decode()}"


def _refusal(request: httpx2.Request, status: int, code: int, message: str) -> httpx2.Response:
    """The protocol's error: the mcp package hands it to who asked, and to nobody else."""
    error = {"code": code, "message": message}
    return httpx2.Response(status, json={"jsonrpc": "2.0", "id": None, "error": error}, request=request)


class _Counted(httpx2.AsyncByteStream):
    def __init__(self, inner: httpx2.AsyncByteStream, max_bytes: int) -> None:
        self._inner, self._max_bytes = inner, max_bytes

    async def __aiter__(self) -> AsyncIterator[bytes]:
        num_bytes = 0
        async for some in self._inner:
            num_bytes += len(some)
            if num_bytes > self._max_bytes:
                raise httpx2.StreamError(f"a message of more than {self._max_bytes:,} bytes")
            yield some

    async def aclose(self) -> None:
        await self._inner.aclose()
