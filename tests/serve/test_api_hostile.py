"""Clients that vanish, stall, hold half a request, or send too much: others' answers are what they are without
them, and nothing of them stays. Rows, sockets and bytes are counted; nothing is timed."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from waiting import until

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

NUM_CLIENTS = 64
NUM_OTHERS = 3
CHAT: dict[str, Any] = {
    "model": "lively",
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "max_tokens": 96,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
}
MIB = 2**20


@pytest.fixture(scope="module")
def served(model_folder: Path) -> Iterator[tuple[Runtime, str]]:
    config = ServeConfig(
        model=str(model_folder),
        name="lively",
        max_rows=16,
        max_waiting=256,
        max_body_mib=1,
        body_timeout_s=1,
        prefix_cache_gib=0,
    )
    runtime = Runtime.start(config)
    try:
        with serving(runtime) as url:
            yield runtime, url
        assert runtime.worker.failure is None
    finally:
        runtime.close()


@contextmanager
def connected(url: str, *, receive_bytes: int | None = None) -> Iterator[socket.socket]:
    """A connection of a client that writes HTTP itself."""
    address = httpx.URL(url)
    with socket.socket() as connection:
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.connect((address.host, address.port))
        yield connection


def request(body: bytes, *, path: str = "/v1/chat/completions", length: int | None = None) -> bytes:
    """The bytes of a request, whose header may promise more than comes."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: lathe\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def reset(connection: socket.socket) -> None:
    """Leave without a word: the other side finds out when it writes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def story(url: str) -> str:
    """The text of a whole stream."""
    said = []
    with (
        httpx.Client(base_url=url, timeout=120) as http,
        http.stream("POST", "/v1/chat/completions", json=CHAT) as answer,
    ):
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                said.append(choice["delta"].get("content") or "")
    return "".join(said)


def is_idle(runtime: Runtime) -> bool:
    stats = runtime.worker.stats()
    return not (stats.num_decoding or stats.num_prefilling or stats.num_waiting)


def num_sockets(url: str) -> int:
    """The server's connections. It runs in this process; clients' ends of them are counted too."""
    port = httpx.URL(url).port
    found = psutil.Process().net_connections("tcp")
    return sum(each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED for each in found)


@contextmanager
def others_go_on(served: tuple[Runtime, str]) -> Iterator[None]:
    """Streams that run beside what is done inside say what they say alone; afterwards no row, socket, or byte of keys
    and values is left."""
    runtime, url = served
    alone = story(url)
    until(lambda: is_idle(runtime))
    rows_bytes, sockets = runtime.worker.stats().memory.kv_bytes, num_sockets(url)
    with ThreadPoolExecutor(NUM_OTHERS) as pool:
        running = [pool.submit(story, url) for _ in range(NUM_OTHERS)]
        until(lambda: runtime.worker.stats().num_decoding > 0 or all(each.done() for each in running))
        yield
        assert [each.result() for each in running] == [alone] * NUM_OTHERS
    assert story(url) == alone
    until(lambda: is_idle(runtime))
    until(lambda: num_sockets(url) <= sockets)
    assert runtime.worker.stats().memory.kv_bytes <= rows_bytes


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_clients_that_ask_and_vanish(
    leave: Callable[[socket.socket], None], served: tuple[Runtime, str]
) -> None:
    body = json.dumps({**CHAT, "max_tokens": 900}).encode()
    num_whole = served[0].worker.stats().num_finished.get("length", 0)
    with others_go_on(served):
        for number in range(NUM_CLIENTS):
            with connected(served[1]) as connection:
                connection.sendall(request(body))
                if number % 2:
                    connection.recv(1)
                leave(connection)
    # The streams of the others and no more: whoever has left is not answered to the end.
    assert served[0].worker.stats().num_finished["length"] - num_whole == NUM_OTHERS + 2


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"POST /v1/chat",
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n",
        request(b'{"model":', length=500),
    ],
    ids=["nothing", "half a line", "half a head", "half a body"],
)
def test_clients_that_stop_in_the_middle_of_asking(begun: bytes, served: tuple[Runtime, str]) -> None:
    with others_go_on(served), ExitStack() as stack:
        held = [stack.enter_context(connected(served[1])) for _ in range(NUM_CLIENTS)]
        for connection in held:
            connection.sendall(begun)
        if begun.endswith(b'{"model":'):
            for connection in held:
                assert b" 408 " in connection.recv(200).partition(b"\r\n")[0]
        assert story(served[1])


def test_clients_that_do_not_read_their_streams(served: tuple[Runtime, str]) -> None:
    url = served[1]
    body = json.dumps({**CHAT, "max_tokens": 900, "logprobs": True, "top_logprobs": 20}).encode()
    with others_go_on(served), ExitStack() as stack:
        held = [stack.enter_context(connected(url, receive_bytes=2048)) for _ in range(8)]
        for connection in held:
            connection.sendall(request(body))
        assert story(url)


def test_a_body_that_promises_too_much_is_refused_before_it_comes(served: tuple[Runtime, str]) -> None:
    with others_go_on(served):
        for _ in range(8):
            with connected(served[1]) as connection:
                connection.sendall(request(b"{", length=100 * MIB))
                assert b" 413 " in connection.recv(200).partition(b"\r\n")[0]


def test_of_a_body_without_end_no_more_is_read_than_allowed(served: tuple[Runtime, str]) -> None:
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    with others_go_on(served):
        for _ in range(4):
            with connected(served[1]) as connection:
                connection.sendall(head)
                sent = _sent_until_closed(connection, piece, 100 * MIB)
                assert sent < 16 * MIB, "what the sockets hold on the way, and the allowed one"


def test_what_is_no_http_is_closed(served: tuple[Runtime, str]) -> None:
    with others_go_on(served):
        for begun in (
            b"\x16\x03\x01\x02\x00",
            b"GET / HTTP/9.9\r\n\r\n",
            b"\x00" * 4096,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        ):
            with connected(served[1]) as connection:
                connection.sendall(begun)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass


def test_a_head_without_end_is_closed(served: tuple[Runtime, str]) -> None:
    with others_go_on(served), connected(served[1]) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        assert _sent_until_closed(connection, b"X-A: " + b"a" * 4000 + b"\r\n", 100 * MIB) < 16 * MIB


def _sent_until_closed(connection: socket.socket, piece: bytes, most: int) -> int:
    """Bytes that were taken before the other side had enough."""
    sent = 0
    connection.settimeout(10)
    try:
        while sent < most:
            sent += connection.send(piece)
    except OSError:
        pass
    return sent
