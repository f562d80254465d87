"""Streams from a server by a client that costs next to nothing: bytes in, times and counts out.

On a machine of few cores a client's work is time that the server has not. This one writes requests that are made
beforehand, reads what comes, and looks for three words in it: no HTTP library, no JSON but a stream's last chunk.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from serve.errors import StoppedError

FIRST_TEXT = re.compile(rb'"content":"[^"]')
DONE = b"data: [DONE]\n\n\r\n0\r\n\r\n"
USAGE = re.compile(rb'"completion_tokens":(\d+)')
READ_BYTES = 2**16
TIMEOUT_S = 300.0


@dataclass
class Streamed:
    """What a closed loop of streams has brought."""

    wall_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    num_tokens: int = 0


def chat(url: str, body: Mapping[str, Any], api_key: str | None = None) -> bytes:
    """The bytes of a request for a chat's stream whose last chunk has its usage."""
    asked = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {httpx.URL(url).netloc.decode()}\r\n{key}"
        f"Content-Type: application/json\r\nContent-Length: {len(asked)}\r\n\r\n"
    )
    return head.encode() + asked


def stream(url: str, requests: Sequence[bytes], concurrency: int) -> Streamed:
    """Send `requests`, `concurrency` at a time, each on a connection that stays open. StoppedError for an answer that
    is no whole stream."""
    streamed, waiting = Streamed(), deque(requests)
    with selectors.DefaultSelector() as selector:
        clients = [_Client(url) for _ in range(min(concurrency, len(waiting)))]
        try:
            start_s = time.perf_counter()
            for client in clients:
                selector.register(client.connection, selectors.EVENT_READ, client)
                client.send(waiting.popleft())
            while selector.get_map():
                _read(selector, streamed, waiting)
            streamed.wall_s = time.perf_counter() - start_s
        finally:
            for client in clients:
                client.connection.close()
    return streamed


def _read(selector: selectors.BaseSelector, streamed: Streamed, waiting: deque[bytes]) -> None:
    found = selector.select(TIMEOUT_S)
    if not found:
        raise StoppedError(f"no stream has brought anything for {TIMEOUT_S:g} s")
    for key, _ in found:
        client: _Client = key.data
        if not client.read():
            continue
        streamed.ttft_s.append(client.ttft_s)
        streamed.num_tokens += client.num_tokens
        if waiting:
            client.send(waiting.popleft())
        else:
            selector.unregister(client.connection)


class _Client:
    """One connection, and the stream on it."""

    def __init__(self, url: str) -> None:
        address = httpx.URL(url)
        self.connection = socket.create_connection((address.host, address.port or 80))
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, request: bytes) -> None:
        self._tail = b""
        self._is_ok = False
        self._first_s: float | None = None
        self._sent_s = time.perf_counter()
        self.connection.sendall(request)

    def read(self) -> bool:
        """What has come; True once the stream is whole."""
        some = self.connection.recv(READ_BYTES)
        now_s = time.perf_counter()
        self._tail += some
        is_ok = self._is_ok or self._tail.startswith(b"HTTP/1.1 200 "[: len(self._tail)])
        if not some or not is_ok:
            raise StoppedError(f"a stream has broken off or was refused: {self._tail[-500:]!r}")
        self._is_ok |= len(self._tail) > 13
        if self._first_s is None and FIRST_TEXT.search(self._tail):
            self._first_s = now_s
        if self._tail.endswith(DONE):
            return True
        # The usage stands in the last chunk, and none is longer.
        self._tail = self._tail[-1024:] if self._first_s is not None else self._tail
        return False

    @property
    def ttft_s(self) -> float:
        """Of a whole stream."""
        assert self._first_s is not None, "a stream of no text"
        return self._first_s - self._sent_s

    @property
    def num_tokens(self) -> int:
        """Of a whole stream, as its usage says."""
        return int(USAGE.findall(self._tail)[-1])
