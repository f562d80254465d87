"""Fetching: only from public addresses, checked where the connection goes, within bytes and seconds."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from serve.errors import RequestError
from serve.media.fetch import fetch, is_public
from serve.media.settings import MIB, MediaLimits

NAME = "messages.0.content.1.image_url"
OPEN = MediaLimits(allow_private_hosts=True, fetch_s=20)
Handler = Callable[[socket.socket, str], None]


@contextmanager
def server(handle: Handler) -> Iterator[str]:
    """An HTTP server's address; `handle` gets each connection, and the request's head."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(4096)
            handle(connection, head.decode())

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        ended.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # else the thread that waits for a connection gets one more
        listener.close()


def body(data: bytes, head: str = "") -> Handler:
    return lambda to, _: to.sendall(
        f"HTTP/1.1 200 OK\r\ncontent-length: {len(data)}\r\n{head}\r\n".encode() + data
    )


def redirect(location: str, status: int = 302) -> Handler:
    return lambda to, _: to.sendall(
        f"HTTP/1.1 {status} Found\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n".encode()
    )


def refusal(url: str, limits: MediaLimits = OPEN, max_bytes: int = MIB, **options) -> str:
    with pytest.raises(RequestError) as caught:
        fetch(url, NAME, max_bytes, limits, **options)
    assert caught.value.param == NAME
    assert str(caught.value).startswith(f"{NAME}: ")
    return str(caught.value)


def test_a_hosts_answer_is_fetched():
    with server(body(b"a picture")) as url:
        assert fetch(f"{url}/a.png", NAME, MIB, OPEN) == b"a picture"


@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0.0.0.0",
            "localhost",
            "LOCALHOST",
        ),
        *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
        *("10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "[fe80::1]", "[fd00::1]", "100.64.0.1"),
        *("224.0.0.1", "[ff02::1]", "255.255.255.255", "192.0.0.1", "198.18.0.1"),
    ],
)
def test_addresses_that_are_not_public_are_refused_however_they_are_spelled(host):
    assert "public addresses alone" in refusal(f"http://{host}:9/a.png", MediaLimits())


def test_public_addresses_are_public():
    for text in ("93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(ipaddress.ip_address(text)), text


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["fd00::1"], []])
def test_a_name_is_refused_for_any_address_that_is_not_public(addresses):
    told = refusal("http://pictures.example/a.png", MediaLimits(), resolve=lambda host, port: addresses)
    assert "public addresses alone" in told or "no address" in told


def test_the_connection_goes_to_the_address_that_was_checked():
    """A name that answers otherwise the second time is never asked a second time."""
    asked = []
    seen = []

    def once(host: str, port: int) -> list[str]:
        asked.append((host, port))
        assert len(asked) == 1
        return ["127.0.0.1"]

    def handle(to: socket.socket, head: str) -> None:
        seen.append(head)
        body(b"here")(to, head)

    limits = MediaLimits(allow_private_hosts=("pictures.example",))
    with server(handle) as url:
        port = int(url.rpartition(":")[2])
        assert fetch(f"http://pictures.example:{port}/a.png", NAME, MIB, limits, once) == b"here"
    assert asked == [("pictures.example", port)]
    assert f"\r\nhost: pictures.example:{port}\r\n" in seen[0].lower()


def test_a_redirect_is_checked_like_the_address_itself():
    limits = MediaLimits(allow_private_hosts=("front.example",))
    with server(body(b"secret")) as inside:
        for target in (inside, inside.replace("127.0.0.1", "localhost"), "//127.0.0.1:1/x"):
            with server(redirect(f"{target}/a.png")) as url:
                port = url.rpartition(":")[2]

                def resolve(host: str, number: int) -> list[str]:
                    return ["127.0.0.1"]

                told = refusal(f"http://front.example:{port}/", limits, resolve=resolve)
                assert "public addresses alone" in told


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "data:,x"]
)
def test_a_redirect_to_another_scheme_is_refused(location):
    with server(redirect(location)) as url:
        told = refusal(f"{url}/a.png")
        assert "http or https" in told or "cannot be fetched" in told


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(status):
    with server(body(b"there")) as there, server(redirect(f"{there}/b.png", status)) as url:
        assert fetch(f"{url}/a.png", NAME, MIB, OPEN) == b"there"


def test_redirects_end():
    with server(lambda to, head: redirect("/again")(to, head)) as url:
        assert "redirects more than 4 times" in refusal(f"{url}/a.png")


def test_a_body_of_a_gigabyte_is_refused_by_its_length_or_after_what_is_read():
    sent = [0]

    def pour(to: socket.socket, _: str) -> None:
        to.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(1024):
            to.sendall(b"x" * MIB)
            sent[0] += MIB

    with server(lambda to, _: to.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1073741824\r\n\r\n")) as url:
        assert "holds 1,073,741,824 bytes; at most 1,048,576" in refusal(f"{url}/a.png")
    with server(pour) as url:
        assert "holds more than the 1,048,576 bytes" in refusal(f"{url}/a.png")
    assert sent[0] < 64 * MIB


def test_a_compressed_body_is_not_unpacked():
    with server(body(b"\x1f\x8b", "content-encoding: gzip\r\n")) as url:
        assert "compressed" in refusal(f"{url}/a.png")


SLOW: dict[str, Handler] = {
    "says nothing": lambda to, _: to.recv(1) and None,
    "a head that never ends": lambda to, _: drip(to, b"HTTP/1.1 200 OK\r\nx: ", b"y"),
    "a body that never ends": lambda to, _: drip(
        to, b"HTTP/1.1 200 OK\r\ncontent-length: 999999\r\n\r\n", b"y"
    ),
    "redirects without end, each after a while": lambda to, _: drip(
        to, b"HTTP/1.1 302 Found\r\nlocation: /", b"x"
    ),
}


def drip(to: socket.socket, begin: bytes, then: bytes) -> None:
    """A byte now and then, so that no single wait is long."""
    to.sendall(begin)
    to.settimeout(0.05)
    while True:
        to.sendall(then)
        with suppress(TimeoutError):
            if not to.recv(1):
                return


@pytest.mark.parametrize("way", SLOW)
def test_a_slow_server_is_left_when_the_time_for_all_of_it_is_over(way):
    begin = time.monotonic()
    with server(SLOW[way]) as url:
        told = refusal(f"{url}/a.png", MediaLimits(allow_private_hosts=True, fetch_s=0.5))
    assert "within 0.5 s" in told
    assert time.monotonic() - begin < 20


def test_a_resolver_that_hangs_holds_nobody():
    release = threading.Event()
    begin = time.monotonic()
    told = refusal(
        "http://hangs.example/a.png",
        MediaLimits(fetch_s=0.3),
        resolve=lambda host, port: [str(release.wait())],
    )
    release.set()
    assert "within 0.3 s" in told
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://", "expected an http or https address"),
        ("http://user:secret@127.0.0.1/a.png", "user name"),
        ("http://127.0.0.1:99999/a.png", "found port 99999"),
        ("http://[::1/a.png", "cannot be fetched"),
        ("http://0177.0.0.1/a.png", "Invalid IPv4 address"),
        ("http://no-such-host.invalid/a.png", "cannot be looked up"),
        ("http://" + "a" * 70 + ".example/", "cannot be"),
    ],
)
def test_an_address_that_is_none_is_refused(url, said):
    told = refusal(url)
    assert said in told
    assert "secret" not in told.replace(url, "")


def test_a_status_and_a_refused_connection_are_told():
    with server(lambda to, _: to.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")) as url:
        assert "status 404" in refusal(f"{url}/a.png?key=secret")
        assert "secret" not in refusal(f"{url}/a.png?key=secret")
        gone = url
    assert "cannot be fetched" in refusal(f"{gone}/a.png")
    with server(lambda to, _: to.sendall(b"what?\r\n\r\n")) as url:
        assert "cannot be fetched" in refusal(f"{url}/a.png")
