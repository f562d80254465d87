"""MCP servers that send more than anybody can hold: what is read of them is bounded, however it comes."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from serve.errors import ToolServerError
from serve.mcp.config import McpServerConfig
from serve.mcp.servers import MAX_MESSAGE_BYTES, McpServers

PROGRAM = Path(__file__).parents[1] / "support" / "mcp_server.py"
MIB = 1 << 20
MAX_GROWTH_BYTES = 3 * MAX_MESSAGE_BYTES


def growth_of(work) -> int:
    """Bytes of memory that this process takes more, at most, while it works."""
    process, most, over = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def look() -> None:
        while not over.wait(0.005):
            most[0] = max(most[0], process.memory_info().rss - before)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        work()
    finally:
        over.set()
        looking.join()
    return most[0]


FLOODING = "import os, sys; sys.stdin.readline()\nfor _ in range(4000): os.write(1, b'x' * 2**20)"


def test_a_program_that_sends_a_message_without_end_is_left():
    config = {
        "flood": McpServerConfig(command=sys.executable, args=("-c", FLOODING)),
        "tests": McpServerConfig(command=sys.executable, args=(str(PROGRAM),)),
    }
    servers = McpServers(config, timeout_s=20)

    async def talk() -> None:
        for _ in range(2):
            begun = time.monotonic()
            with pytest.raises(
                ToolServerError, match="'flood': it sent a message of more than 8,388,608 bytes"
            ):
                await servers.tools("flood")
            assert time.monotonic() - begun < 15, "nobody waits until it has sent everything"
        assert len(await servers.call("tests", "much", {"count": 3 * MIB})) < 70_000

    try:
        asyncio.run(servers.call("tests", "much", {"count": 3 * MIB}))
        assert growth_of(lambda: asyncio.run(talk())) < MAX_GROWTH_BYTES
    finally:
        servers.close()
    left = []
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it has ended, and may not be gone yet
            left.append(each.cmdline())
    assert not any(FLOODING in command for command in left)


KINDS = {
    "JSON": (b"Content-Type: application/json", b"[" + b"1," * (MIB // 2)),
    "events": (b"Content-Type: text/event-stream", b"x" * MIB),
    "an error": (b"Content-Type: application/json", b"x" * MIB),
    "compressed": (
        b"Content-Type: application/json\r\nContent-Encoding: deflate",
        zlib.compress(b"1" * 64 * MIB),
    ),
}


@contextmanager
def flooding(kind: str) -> Iterator[tuple[str, list[int]]]:
    """A server of HTTP whose every answer has no end; how many bytes of each were taken."""
    headers, block = KINDS[kind]
    status = b"500 No" if kind == "an error" else b"200 OK"
    listening = socket.create_server(("127.0.0.1", 0))
    sent: list[int] = []

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            number = len(sent)
            sent.append(0)
            try:
                connection.sendall(b"HTTP/1.1 " + status + b"\r\n" + headers + b"\r\n\r\n")
                if kind == "events":
                    connection.sendall(b"data: ")
                for _ in range(4000):
                    connection.sendall(block)
                    sent[number] += len(block)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/mcp", sent
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_without_end_is_not_read_to_it(kind):
    with flooding(kind) as (url, sent):
        servers = McpServers({"w": McpServerConfig(url=url)}, timeout_s=20)
        begun = time.monotonic()

        def ask() -> None:
            with pytest.raises(ToolServerError, match="MCP server 'w'"):
                asyncio.run(servers.tools("w"))

        try:
            assert growth_of(ask) < MAX_GROWTH_BYTES + 2 * MIB
            assert time.monotonic() - begun < 15
        finally:
            servers.close()
        assert sent
        assert max(sent) < 100 * MIB
