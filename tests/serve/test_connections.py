"""Connections that do nothing, or ask and do not listen: they end, and others do not notice. Hosts, TLS."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
import trustme
from left_running import left_running
from waiting import until

from serve.api.server import bind, serving
from serve.config import ServeConfig
from serve.errors import ConfigError
from serve.runtime import Runtime

LONG = {"model": "lively", "prompt": "hello there", "max_tokens": 900, "ignore_eos": True, "stream": True}
HEAD = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture
def start(model_folder) -> Iterator:
    """start(**config) → runtime and URL, ended at the end."""
    with ExitStack() as opened:

        def begin(**fields):
            config = ServeConfig(model=str(model_folder), name="lively", **fields)
            runtime = opened.enter_context(closing(Runtime.start(config)))
            return runtime, opened.enter_context(serving(runtime))

        yield begin


def connect(url: str, **options) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60, **options)


def test_a_streams_next_piece_does_not_wait_until_the_client_has_acknowledged_the_one_before():
    async def has_no_delay() -> int:
        accepted = asyncio.get_running_loop().create_future()
        with bind("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(
                lambda _, writer: accepted.set_result(writer), sock=listener
            ):
                _, client = await asyncio.open_connection(*listener.getsockname())
                server = await accepted
                found = server.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                for each in (client, server):
                    each.close()
                return found

    assert asyncio.run(has_no_delay())


def test_a_head_that_does_not_arrive_ends_its_connection_whatever_came_of_it(start):
    _, url = start(header_timeout_s=0.3)
    for begun in (b"", b"G", HEAD, HEAD + b"x: " + b"a" * 3000):
        with closing(connect(url)) as silent:
            silent.sendall(begun)
            assert silent.recv(1) == b"", begun
    with closing(connect(url)) as second:  # the head behind a whole request has the same time
        second.sendall(HEAD + b"\r\n" + HEAD)
        read = b""
        while some := second.recv(65536):
            read += some
        assert read.count(b"HTTP/1.1 200") == 1


def test_a_slow_head_that_arrives_in_time_and_an_idle_connection_are_left_alone(start):
    _, url = start(header_timeout_s=1)
    with httpx.Client(base_url=url) as http:
        assert http.get("/health").status_code == 200
        with closing(connect(url)) as slow:
            for byte in HEAD + b"\r\n":
                slow.sendall(bytes([byte]))
            assert slow.recv(100).startswith(b"HTTP/1.1 200")
        time_out = time.monotonic() + 1.5  # longer than a head may take
        while time.monotonic() < time_out:
            httpx.get(f"{url}/health")
        assert http.get("/health").status_code == 200
        assert len(http._transport._pool.connections) == 1


def test_one_connection_more_than_allowed_is_closed_and_those_that_are_there_go_on(start):
    _, url = start(max_connections=3)
    there = [httpx.Client(base_url=url) for _ in range(3)]
    assert [each.get("/health").status_code for each in there] == [200] * 3
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")
    assert [each.get("/health").status_code for each in there] == [200] * 3
    for each in there:
        each.close()
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_client_that_takes_nothing_of_its_answer_is_cut_off_and_frees_its_rows(start):
    runtime, url = start(write_timeout_s=0.5)
    body = json.dumps({**LONG, "n": 16, "logprobs": 20, "max_tokens": 800}).encode()
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = url.removeprefix("http://").split(":")
    deaf.connect((host, int(port)))
    with closing(deaf):
        head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        deaf.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        end = time.monotonic() + 120
        while runtime.worker.stats().num_finished.get("cancelled") != 16 and time.monotonic() < end:
            assert httpx.get(f"{url}/health").status_code == 200
        assert runtime.worker.stats().num_finished == {"cancelled": 16}


POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (HEAD + b"host: localhost\r\n\r\n", 400),
        (HEAD + b"x: " + b"a" * 70_000, 400),
        (HEAD + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n", 400),
        (HEAD + b"connection: upgrade\r\nupgrade: h2c\r\n\r\n", 200),
        (POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx-api-key: sk-a\r\n\r\n", 401),
    ],
    ids=[
        "no host",
        "two hosts",
        "a long head",
        "two framings",
        "two lengths",
        "an offer",
        "a key behind a body",
    ],
)
def test_what_may_be_read_in_two_ways_is_read_in_none(said, status, keyed):
    with closing(connect(keyed)) as plain:
        plain.sendall(said)
        plain.settimeout(60)
        read = plain.recv(65536)
        assert int(read.split(b" ", 2)[1]) == status
        while status != 401 and plain.recv(65536):  # and that is the end of the connection
            pass


@pytest.fixture(scope="module")
def keyed(model_folder) -> Iterator[str]:
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively", api_key="sk-a"))
    try:
        with serving(runtime) as url:
            yield url
    finally:
        runtime.close()


def test_who_asks_for_more_behind_a_stream_and_leaves_frees_its_rows(start):
    runtime, url = start()
    body = json.dumps(LONG).encode()
    with closing(connect(url)) as plain:
        plain.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body + HEAD + b"\r\n")
        assert plain.recv(1)
    until(lambda: runtime.worker.stats().num_finished)
    assert runtime.worker.stats().num_finished == {"cancelled": 1}


def test_streams_are_framed_so_that_every_kind_of_client_reads_them(start):
    """HTTP/1.1 in chunks, HTTP/1.0 up to the end of the connection."""
    _, url = start()
    body = json.dumps({**LONG, "max_tokens": 20, "temperature": 0}).encode()
    for version in (b"1.1", b"1.0"):
        with closing(connect(url)) as plain:
            head = b"POST /v1/completions HTTP/%b\r\nhost: localhost\r\nconnection: close\r\n" % version
            plain.sendall(
                head + b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
            read = b""
            while some := plain.recv(65536):
                read += some
        start_of, _, rest = read.partition(b"\r\n\r\n")
        assert (b"transfer-encoding: chunked" in start_of.lower()) is (version == b"1.1")
        text = _dechunked(rest) if version == b"1.1" else rest
        assert text.endswith(b"data: [DONE]\n\n")
        assert text.count(b"data: {") > 10
        assert b'"finish_reason":"length"' in text
    with httpx.Client(base_url=url, timeout=60) as http:  # and the connection goes on being used
        for _ in range(3):
            assert http.post(
                "/v1/completions", content=body, headers={"content-type": "application/json"}
            ).is_success
        assert len(http._transport._pool.connections) == 1


def _dechunked(raw: bytes) -> bytes:
    text = b""
    while True:
        size, _, raw = raw.partition(b"\r\n")
        if not int(size, 16):
            assert raw == b"\r\n"
            return text
        text += raw[: int(size, 16)]
        assert raw[int(size, 16) :].startswith(b"\r\n")
        raw = raw[int(size, 16) + 2 :]


@pytest.mark.parametrize("is_stream", [True, False], ids=["a stream", "a whole answer"])
def test_a_head_goes_out_with_what_follows_it_and_the_first_piece_before_the_second(start, is_stream):
    """One write is one wait for the interpreter's lock less."""
    _, url = start()
    body = json.dumps({**LONG, "max_tokens": 200, "stream": is_stream}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with closing(connect(url)) as plain:
        plain.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        first = plain.recv(65536)
        assert first.startswith(b"HTTP/1.1 200")
        assert first.partition(b"\r\n\r\n")[2]
        assert first.count(b"data: {") < 100


def test_a_page_whose_name_was_pointed_at_this_machine_is_not_taken_for_its_user(start):
    _, url = start()
    port = url.rsplit(":", 1)[1]
    ours = ("localhost", "127.0.0.1", "[::1]", "host.docker.internal", "my-mac.local", "mac", "a.localhost")
    for host in ours:
        assert httpx.get(f"{url}/v1/models", headers={"Host": f"{host}:{port}"}).status_code == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example."):
        answer = httpx.get(f"{url}/v1/models", headers={"Host": f"{host}:{port}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden"), host
    _, named = start(allowed_hosts=("chat.example",))
    asked = [
        httpx.get(f"{named}/v1/models", headers={"Host": host}) for host in ("CHAT.example", "localhost")
    ]
    assert [answer.status_code for answer in asked] == [200, 403]
    _, keyed = start(api_key="sk-a")
    headers = {"Host": "any.example", "x-api-key": "sk-a"}
    assert httpx.get(f"{keyed}/v1/models", headers=headers).status_code == 200, "a proxy's name, and a key"


def test_no_request_takes_longer_than_the_server_allows_whatever_it_asks_for(start):
    _, url = start(max_request_s=0.2)
    for timeout in ({}, {"timeout": 60}):
        answer = httpx.post(f"{url}/v1/completions", json={**LONG, "stream": False, **timeout}, timeout=60)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """A folder with ca.pem, server.pem (certificate and key), cert.pem, key.pem and client.pem."""
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    server, client = (
        authority.issue_cert("127.0.0.1", "localhost"),
        authority.issue_cert("client@example.org"),
    )
    server.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    server.private_key_pem.write_to_path(folder / "key.pem")
    server.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    client.private_key_and_cert_chain_pem.write_to_path(folder / "client.pem")
    return folder


def test_with_a_certificate_the_server_speaks_https_alone(certificates, tmp_path, model_folder):
    words = ["--ssl-certfile", certificates / "cert.pem", "--ssl-keyfile", certificates / "key.pem"]
    trusted = ssl.create_default_context(cafile=certificates / "ca.pem")
    with left_running(tmp_path, model_folder, *map(str, words)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        with (
            httpx.Client(verify=trusted, base_url=server.url, timeout=60) as http,
            http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 20}) as answer,
        ):
            assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{server.url}/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.url}/health".replace("https", "http"))


def test_clients_without_a_certificate_of_the_authority_are_turned_away(certificates, start):
    _, url = start(ssl_certfile=certificates / "server.pem", ssl_ca_certs=certificates / "ca.pem")
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url}/health", verify=context)
    context.load_cert_chain(certificates / "client.pem")
    assert httpx.get(f"{url}/health", verify=context).status_code == 200


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ssl_certfile": "nothing.pem"}, "No such file"),
        ({"ssl_certfile": "cert.pem"}, "cannot be used"),
        ({"ssl_certfile": "ca.pem", "ssl_keyfile": "key.pem"}, "cannot be used"),
        ({"ssl_certfile": "server.pem", "ssl_ca_certs": "key.pem"}, "cannot be used"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_told_before_anything_is_loaded(changes, expected, certificates):
    from serve.api.server import run

    paths = {name: certificates / file for name, file in changes.items()}
    with pytest.raises(ConfigError, match=expected):
        run(ServeConfig(model=str(certificates / "no model here"), port=0, **paths))
