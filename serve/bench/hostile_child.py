"""Clients that do a server no good, in a process of their own at the lowest priority, until standard input ends.

    python -m serve.bench.hostile_child KIND URL KEY REQUEST

KIND is one of KINDS; REQUEST the body of a long stream. It writes a line, {}, once the first has done its worst, and
at the end how many there were.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable
from itertools import cycle

import httpx

from serve.bench import wire

NUM_HELD = 64
"""Connections that are held; the oldest gives way."""
NUM_STREAMS = 8
"""Of those that take nothing of their answers, or all of it."""
BODY_BYTES = 100 * 2**20
PIECE = b"10000\r\n" + b"x" * 65536 + b"\r\n"
SMALL_BUFFER = 4096
LEAST_PRIORITY = 19
WAIT_S = 5.0


class Hostile:
    """One kind's clients."""

    def __init__(self, url: str, key: str, body: str) -> None:
        self._url, self._key = url, key
        address = httpx.URL(url)
        self._address = (address.host, address.port or 80)
        self._stream = wire.chat(url, json.loads(body), key)
        head, _, rest = self._stream.partition(b"\r\n\r\n")
        self._head, self._body = head, rest
        self._held: deque[socket.socket] = deque()
        self._beginnings = cycle((b"", head[:13], head + b"\r\n", self._stream[:-5]))
        self._number = 0

    def vanish(self) -> None:
        """Ask, and be gone."""
        self._number += 1
        connection = self._connected()
        connection.sendall(self._stream)
        if self._number % 2:
            connection.close()
        else:
            self._hold(connection, 0)

    def half(self) -> None:
        """Say the beginning of a request, and no more."""
        connection = self._connected()
        connection.sendall(next(self._beginnings))
        self._hold(connection, NUM_HELD)

    def bodies(self) -> None:
        """Send a body without end, in chunks, until the server has had enough."""
        with self._connected() as connection:
            lines = [each for each in self._head.split(b"\r\n") if not each.startswith(b"Content-Length")]
            try:
                connection.sendall(b"\r\n".join([*lines, b"Transfer-Encoding: chunked", b"", b""]))
                for _ in range(BODY_BYTES // len(PIECE)):
                    connection.sendall(PIECE)
            except OSError:
                return

    def keys(self) -> None:
        """Try a key that nobody has."""
        self._number += 1
        with self._connected() as connection:
            connection.sendall(self._stream.replace(self._key.encode(), b"sk-%d" % self._number))
            connection.recv(wire.READ_BYTES)

    def deaf(self) -> None:
        """Ask for a stream and take nothing of it."""
        if len(self._held) < NUM_STREAMS:
            connection = self._connected(SMALL_BUFFER)
            connection.sendall(self._stream)
            self._hold(connection, NUM_STREAMS)

    def readers(self) -> None:
        """The same with good manners: what others' streams are compared with beside those that are deaf."""
        if len(self._held) < NUM_STREAMS:
            connection = self._connected()
            connection.sendall(self._stream)
            self._hold(connection, NUM_STREAMS)
            threading.Thread(target=_take_all, args=(connection,), daemon=True).start()

    def _connected(self, receive_bytes: int | None = None) -> socket.socket:
        connection = socket.socket()
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(WAIT_S)
        connection.connect(self._address)
        return connection

    def _hold(self, connection: socket.socket, most: int) -> None:
        """Of those that are too many the oldest is reset: its server finds out when it writes."""
        self._held.append(connection)
        while len(self._held) > most:
            oldest = self._held.popleft()
            oldest.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            oldest.close()


KINDS: dict[str, tuple[Callable[[Hostile], None], float]] = {
    "vanish": (Hostile.vanish, 16.0),
    "half": (Hostile.half, 32.0),
    "bodies": (Hostile.bodies, 1.0),
    "keys": (Hostile.keys, 32.0),
    "deaf": (Hostile.deaf, 32.0),
    "readers": (Hostile.readers, 32.0),
}
"""What one does, and how often a second."""


def _take_all(connection: socket.socket) -> None:
    connection.settimeout(None)
    try:
        while connection.recv(wire.READ_BYTES):
            pass
    except OSError:
        return


def _wait(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def main(kind: str, url: str, key: str, body: str) -> None:
    """Be a nuisance."""
    os.nice(LEAST_PRIORITY)
    act, per_second = KINDS[kind]
    hostile, count = Hostile(url, key, body), 0
    ended = threading.Event()
    threading.Thread(target=_wait, args=(ended,), daemon=True).start()
    while not ended.wait(1 / per_second):
        try:
            act(hostile)
        except OSError:
            continue
        count += 1
        if count == 1:
            print(json.dumps({}), flush=True)
    print(json.dumps({"count": count}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
