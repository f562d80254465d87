"""Addresses as people type them, what is told where no such server answers, and the reading of event streams."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import lathe
from serve.api.errors import openai_error
from serve.api.server import serving
from serve.bench.client import Ask
from serve.bench.load import drive
from serve.bench.process import free_port
from serve.config import ServeConfig
from serve.conversation import Conversation, Speaker
from serve.errors import ConfigError, LatheError, NotFoundError, RequestError
from serve.remote import EventData, base_url, choose_model, failure, message_of, refusal, served_models
from serve.runtime import Runtime

ENDS = ("", "/", "/v1", "/v1/", "/v1//", "/v1/models", "/v1/completions", "/v1/chat/completions/")
HOSTS = ("127.0.0.1:8000", "localhost:8000", "[::1]:8000", "example.com", "example.com:8443/some/proxy")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("host", HOSTS)
def test_an_address_has_one_base_however_it_is_typed(host, end):
    for scheme in ("http://", "https://", ""):
        base = base_url(f" {scheme}{host}{end}\n")
        assert base == (scheme or "http://") + host
        assert base_url(base) == base


@pytest.mark.parametrize(
    "typed",
    [
        *(
            "",
            "http://",
            "http:/127.0.0.1:8000",
            ":8000",
            "/v1",
            "ftp://127.0.0.1",
            "http://h:port",
            "http://h:65536",
        ),
        *(
            "http://h:-1",
            "http://h\x00",
            "http://h/v1?key=1",
            "http://h/v1#here",
            "http://[::1",
            "http://a b",
        ),
    ],
)
def test_what_is_no_address_is_named_with_one_that_is(typed):
    with pytest.raises(ConfigError, match=r"expected one like http://127\.0\.0\.1:8000/v1") as refused:
        base_url(typed)
    assert repr(typed) in str(refused.value)


@pytest.fixture(scope="module")
def url(model_folder) -> Iterator[str]:
    runtime = Runtime.start(ServeConfig(model=str(model_folder), name="lively"))
    with closing(runtime), serving(runtime) as found:
        yield found


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_chat_and_bench_take_the_address_that_serve_prints_and_its_like(url, end, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert choose_model(url + end, None) == "lively"
    chat = Conversation(Speaker(url + end, "lively", sampling={"max_tokens": 4}))
    assert "".join(chat.say("hello")) == chat.messages[-1]["content"]
    assert drive(url + end, [Ask("lively", "hello", 4)], 1).answers[0].error is None


def test_bench_serve_runs_at_the_address_with_v1(url, capsys):
    words = f"bench serve --url {url}/v1/ --concurrency 1 --requests 2 --max-tokens 2 --prompt-tokens 30"
    with pytest.raises(SystemExit) as stop:
        lathe.main(words.split())
    assert stop.value.code == 0
    assert "tok/s" in capsys.readouterr().out


Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """A real HTTP server that gives one answer to everything."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answer
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {}, b"<html>Welcome to\n nginx"), ("no OpenAI-compatible server", "200", "Welcome to nginx")),
        (
            (404, {}, b'{"detail":"Not Found"}'),
            ("no OpenAI-compatible server", "/v1/models gave 404", "Not Found"),
        ),
        ((200, {}, b""), ("200, nothing",)),
        ((200, {}, b"\xff\xfe\x00"), ("no OpenAI-compatible server",)),
        ((200, {}, b"[1, 2]"), ("no OpenAI-compatible server",)),
        ((200, {}, b'{"data": [{"name": "x"}]}'), ("no OpenAI-compatible server",)),
        ((200, {}, b'{"data": 7}'), ("no OpenAI-compatible server",)),
        ((200, {"Content-Encoding": "gzip"}, b"not gzip"), ("no server answers",)),
        ((503, {}, b'{"error": {"message": "the engine has failed"}}'), ("503", "the engine has failed")),
        ((401, {}, b'{"error": "no key"}'), ("401", "no key", "--api-key", "LATHE_API_KEY")),
        ((307, {"Location": "https://elsewhere/v1/models"}, b""), ("https://elsewhere/v1/models",)),
    ],
)
def test_what_answers_there_is_told_where_it_is_no_such_server(answer, said):
    with answering(answer) as url:
        with pytest.raises(ConfigError) as refused:
            served_models(url)
        for words in (url, *said):
            assert words in str(refused.value)


def test_a_server_without_models_is_told(capsys):
    with answering((200, {}, b'{"data": []}')) as url, pytest.raises(NotFoundError, match="it has: none"):
        choose_model(url, None)


@contextmanager
def talking(greeting: bytes) -> Iterator[str]:
    """A server that speaks something else than HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            while True:
                try:
                    visitor, _ = listener.accept()
                except OSError:
                    return
                with visitor:
                    visitor.recv(65536)
                    visitor.sendall(greeting)

        thread = threading.Thread(target=greet)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"]
)
@pytest.mark.parametrize("words", ["chat --url {}", "chat --url {}/v1", "bench serve --url {}"])
def test_what_speaks_no_http_ends_a_command_with_one_message(greeting, words, capsys):
    with talking(greeting) as url, pytest.raises(SystemExit) as stop:
        lathe.main(words.format(url).split())
    assert stop.value.code == 2
    assert "no server answers there" in capsys.readouterr().err


def test_https_to_what_speaks_http_says_so(capsys):
    with talking(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as url, pytest.raises(SystemExit):
        lathe.main(["chat", "--url", url.replace("http", "https")])
    assert "is it http, not https?" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:{}/v1", "https://127.0.0.1:{}", "no-such-host.invalid:{}"])
@pytest.mark.parametrize("command", ["chat", "bench serve", "bench serve --model m"])
def test_a_server_that_is_down_is_named_as_it_was_typed(url, command, capsys):
    typed = url.format(free_port())
    with pytest.raises(SystemExit) as stop:
        lathe.main([*command.split(), "--url", typed])
    assert stop.value.code == 2
    assert typed in capsys.readouterr().err


@pytest.mark.parametrize("key", ["schlüssel", "one\ntwo", "\x00"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(key):
    with pytest.raises(ConfigError, match="printable ASCII") as refused:
        served_models("http://127.0.0.1:1", key)
    assert key not in str(refused.value)


@pytest.mark.parametrize("proxy", ["gopher://h:1", "http://h:port"])
def test_a_proxy_that_cannot_be_used_is_told(proxy, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(ConfigError, match="proxy"):
        served_models("http://no-such-host.invalid")


def chopped(data: bytes, rng: random.Random) -> Iterator[bytes]:
    while data:
        size = rng.choice((1, 2, 3, 7, 100))
        yield data[:size]
        data = data[size:]


LINE_BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"
"""What str.splitlines takes for the end of a line, and a stream of events does not."""


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_events_are_the_same_however_the_stream_is_cut(ending):
    rng = random.Random(1)
    for _ in range(200):
        texts = ["".join(rng.choices(LINE_BREAKS + 'aé日🙂"\\ \n\t', k=rng.randrange(12))) for _ in range(4)]
        sent = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        lines = [f"data: {data}{ending}{ending}: keep-alive{ending}{ending}" for data in sent]
        stream = "".join([*lines, f"data: [DONE]{ending}", f"data: after{ending}"]).encode()
        events = EventData()
        got = [data for some in chopped(stream, rng) for data in events.feed(some)]
        assert [json.loads(data, strict=False)["text"] for data in got] == texts
        assert events.is_done


@pytest.mark.parametrize(("status", "expected"), [(400, 400), (404, 404), (429, 503), (500, 503), (503, 503)])
def test_a_refusal_is_the_callers_fault_or_the_servers(status, expected):
    error = refusal(status, "")
    assert error.status == expected
    assert str(status) in str(error)


def every_error(kind: type[LatheError] = LatheError) -> list[type[LatheError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in every_error(child))]


@pytest.mark.parametrize("kind", every_error())
def test_what_another_lathe_raises_is_raised_here_as_what_it_is(kind):
    body = openai_error(kind.status, "what it was", code=kind.code, param="a field").body.decode()
    for error in (refusal(kind.status, body), failure(body)):
        assert type(error) is kind
        assert str(error) == "what it was"
        assert getattr(error, "param", "a field") == "a field"
    assert not isinstance(refusal(418, body), kind) or kind in (LatheError, RequestError)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"error": {"message": "m", "code": 1}}', "m"),
        ('{"error": "m"}', "m"),
        ('{"error": null}', '{"error": null}'),
        ('{"error": {"code": 1}}', '{"error": {"code": 1}}'),
        ("[]", "[]"),
        ("  a\n  b", "a b"),
        ("", ""),
    ],
)
def test_a_message_is_found_in_whatever_a_server_says(body, message):
    assert message_of(body) == message
