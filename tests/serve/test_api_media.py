"""Pictures over real HTTP with the official client: what bad ones answer, and what they leave alone."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from odd_values import EDGES, ODD, places, with_
from PIL import Image

from serve.api.server import serving
from serve.config import ServeConfig
from serve.runtime import Runtime

FETCH_S = 5
WAIT_S = 120
FREE = {"ignore_eos": True}
QUESTION = {"type": "text", "text": "what is it?"}
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect/></svg>'
HERE = "messages.0.content.1"


def picture(seed: int, size: tuple[int, int] = (56, 56)) -> Image.Image:
    """Coloured noise, of another picture for another seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def file_of(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    written = io.BytesIO()
    image.save(written, form, **options)
    return written.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_url(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


PNG = file_of(picture(0))
BOMB = file_of(Image.new("1", (20_000, 20_000)))
JPEG = file_of(picture(1, (640, 480)), "JPEG", quality=90)


class Host:
    """A web server with pictures, and with what goes wrong in one. `seen`: paths that were asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {
            "/good.png": PNG,
            "/page": b"<!doctype html><html></html>",
            "/x.svg": SVG,
        }
        self.seen: list[str] = []
        self.is_over = threading.Event()
        self.is_slow = threading.Event()
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.seen.append(self.path)
                content = host.files.get(self.path)
                if self.path in ("/slow", "/huge", "/endless", "/round"):
                    host._misbehave(self)
                elif content is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _misbehave(self, handler: BaseHTTPRequestHandler) -> None:
        """Slowly, a byte at a time; a gigabyte, told or not; round in a circle."""
        handler.send_response(302 if handler.path == "/round" else 200)
        if handler.path == "/round":
            handler.send_header("Location", "/round")
        if handler.path == "/huge":
            handler.send_header("Content-Length", str(1 << 30))
        handler.end_headers()
        if handler.path == "/slow":
            self.is_slow.set()
        piece = PNG[:1] if handler.path == "/slow" else bytes(1 << 20)
        try:
            for _ in range(1 << (20 if handler.path == "/slow" else 10)):
                if handler.path == "/round" or self.is_over.wait(0.05 if handler.path == "/slow" else 0):
                    return
                handler.wfile.write(piece)
        except OSError:
            return

    @contextmanager
    def running(self) -> Iterator[Host]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self.is_over.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host().running() as running:
        yield running


@contextmanager
def served(folder: Path, **fields: object) -> Iterator[openai.OpenAI]:
    runtime = Runtime.start(ServeConfig(model=str(folder), name="sees", **fields))
    try:
        with (
            serving(runtime) as url,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as opened,
        ):
            yield opened
        assert runtime.worker.failure is None
    finally:
        runtime.close()


@pytest.fixture(scope="module")
def client(vlm_folder: Callable[[str], Path]) -> Iterator[openai.OpenAI]:
    """Of a server that fetches from anywhere, within FETCH_S."""
    limits = {"allow_private_hosts": True, "fetch_s": FETCH_S, "max_items": 8}
    with served(vlm_folder("qwen2_vl"), media_limits=limits) as opened:
        yield opened


@pytest.fixture(scope="module")
def closed(
    vlm_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai.OpenAI]:
    """Of a server that fetches from public hosts alone, and reads no file but those in one folder."""
    roots = [tmp_path_factory.mktemp("shown")]
    (roots[0] / "good.png").write_bytes(PNG)
    with served(vlm_folder("qwen2_vl"), allowed_media_roots=roots) as opened:
        opened.root = roots[0]
        yield opened


def chat(client: openai.OpenAI, *parts: dict, **changes: object):
    messages = [{"role": "user", "content": [QUESTION, *parts]}]
    fields = {"model": "sees", "messages": messages, "max_tokens": 4, "temperature": 0, "extra_body": FREE}
    return client.chat.completions.create(**{**fields, **changes})


def refused(client: openai.OpenAI, *parts: dict, **changes: object) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, *parts, **changes)
    return caught.value


@contextmanager
def another_stream(client: openai.OpenAI) -> Iterator[Callable[[], int]]:
    """Inside it a long text answer is being streamed; gives how many pieces have come so far."""
    arrived: list[float] = []
    begun, is_over = threading.Event(), threading.Event()

    def read() -> None:
        fields = {"model": "sees", "messages": [{"role": "user", "content": "tell me more"}], "stream": True}
        with client.chat.completions.create(**fields, max_tokens=1900, extra_body=FREE) as stream:
            for _ in stream:
                arrived.append(time.monotonic())
                begun.set()
                if is_over.is_set():
                    return

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        try:
            assert begun.wait(WAIT_S)
            yield lambda: len(arrived)
        finally:
            is_over.set()
        reading.result(WAIT_S)


BAD: dict[str, tuple[dict, str]] = {
    "no base64": (image_url("data:image/png;base64,@@@"), "base64"),
    "nothing": (image_url("data:image/png;base64,"), "found no bytes"),
    "text": (image_url(data_uri(b"hello, this is no picture")), "found text"),
    "noise": (image_url(data_uri(bytes(range(256)))), "expected a picture"),
    "svg": (image_url(data_uri(SVG, "image/svg+xml")), "SVG"),
    "truncated JPEG": (image_url(data_uri(JPEG[: len(JPEG) // 2], "image/jpeg")), "truncated"),
    "truncated PNG": (image_url(data_uri(PNG[: len(PNG) // 2])), "picture cannot be decoded"),
    "20,000 x 20,000": (image_url(data_uri(BOMB)), "at most 50,000,000 are read"),
    "another scheme": (image_url("ftp://host/x.png"), "expected http, https, data or a path"),
    "no such file": (image_url("/nowhere/x.png"), "No such file"),
    "a folder": (image_url("/"), "Is a directory"),
    "a device": (image_url("/dev/zero"), "no plain file"),
    "a relative path": (image_url("x.png"), "relative path"),
    "a clip that is none": ({"type": "video_url", "video_url": {"url": data_uri(b"no film")}}, "video_url"),
    "a frame that is none": ({"type": "video", "video": [data_uri(PNG), data_uri(b"text")]}, "video.1"),
}
ON_THE_WEB = {
    "/page": "a web page",
    "/x.svg": "SVG",
    "/nothing": "status 404",
    "/slow": f"no whole answer within {FETCH_S:g} s",
    "/huge": "1,073,741,824 bytes",
    "/endless": "holds more than",
    "/round": "redirects more than",
}


def check_refusal(error: openai.APIStatusError, told: str) -> None:
    assert error.status_code == 400, error.message
    assert error.body["param"].startswith(HERE), error.body
    assert error.body["message"].startswith(HERE)
    assert told in error.body["message"]
    assert error.body["type"] == "invalid_request_error"


def test_bad_pictures_are_refused_by_their_place_while_another_stream_goes_on(client, host):
    with another_stream(client) as num_pieces:
        for name, (part, told) in BAD.items():
            before = num_pieces()
            check_refusal(refused(client, part), told)
            assert num_pieces() >= before, name
        for path, told in ON_THE_WEB.items():
            start_s, before = time.monotonic(), num_pieces()
            check_refusal(refused(client, image_url(host.url + path)), told)
            assert time.monotonic() - start_s < FETCH_S + 20, path
            assert num_pieces() > before or path != "/slow"


def test_too_many_pictures_are_refused_before_any_is_looked_at(client, host):
    asked = len(host.seen)
    error = refused(client, *[image_url(f"{host.url}/good.png")] * 100)
    assert (error.status_code, error.body["param"]) == (400, "messages.0.content.9.image_url")
    assert "found 100 pictures, clips and sounds; at most 8 are taken" in error.body["message"]
    assert len(host.seen) == asked


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{port}/good.png",
        "http://localhost:{port}/good.png",
        "http://localhost.localdomain:{port}/good.png",
        "http://0.0.0.0:{port}/good.png",
        "http://[::1]:{port}/good.png",
        "http://[::ffff:127.0.0.1]:{port}/good.png",
        "http://2130706433:{port}/good.png",
        "http://0x7f.1:{port}/good.png",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/x.png",
        "http://user@127.0.0.1:{port}/good.png",
    ],
)
def test_no_address_leads_to_this_machine_unless_that_is_allowed(closed, host, address):
    asked = len(host.seen)
    error = refused(closed, image_url(address.format(port=host.url.rsplit(":", 1)[1])))
    check_refusal(error, ": ")
    assert len(host.seen) == asked


def test_files_are_shown_from_allowed_folders_alone_and_links_out_of_them_are_followed_first(
    closed, tmp_path
):
    outside = tmp_path / "outside.png"
    outside.write_bytes(PNG)
    (closed.root / "link.png").symlink_to(outside)
    for path in (
        outside,
        closed.root / "link.png",
        closed.root / ".." / tmp_path.name / "outside.png",
        "/etc/passwd",
    ):
        check_refusal(refused(closed, image_url(str(path))), "in no folder that is allowed here")
        check_refusal(refused(closed, image_url(f"file://{path}")), "in no folder that is allowed here")


def pieces_taken(raw: socket.socket, piece: bytes, count: int) -> int:
    """How many of `count` pieces the other side lets come before it hangs up."""
    for number in range(count):
        try:
            raw.sendall(piece)
        except OSError:
            return number
    return count


def test_a_body_of_a_gigabyte_is_not_read(client):
    address = httpx.URL(str(client.base_url))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection((address.host, address.port), timeout=WAIT_S) as raw:
        raw.sendall(head + b"content-length: 1073741824\r\n\r\n")
        assert b" 413 " in raw.recv(65536)
    with socket.create_connection((address.host, address.port), timeout=WAIT_S) as raw:
        raw.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
        piece = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
        assert pieces_taken(raw, piece, 1 << 10) < 100


@pytest.mark.parametrize(
    ("told", "param"),
    [
        ({"max_pixel": 5}, "mm_processor_kwargs.max_pixel"),
        ({"max_pixels": "many"}, "mm_processor_kwargs.max_pixels"),
        ({"max_pixels": 0}, "mm_processor_kwargs.max_pixels"),
        ({"min_pixels": 9000, "max_pixels": 50}, "mm_processor_kwargs.min_pixels"),
        ({"fps": -1}, "mm_processor_kwargs.fps"),
        ([], "mm_processor_kwargs"),
    ],
)
def test_settings_of_pictures_that_cannot_be_are_refused_by_their_name(client, told, param):
    error = refused(client, extra_body={"mm_processor_kwargs": told})
    assert (error.status_code, error.body["param"]) == (400, param)
    assert error.body["message"].startswith("mm_processor_kwargs")


FULL = {
    "model": "sees",
    "max_tokens": 1,
    "mm_processor_kwargs": {
        "max_pixels": 3136,
        "fps": 2,
        "size": {"shortest_edge": 784, "longest_edge": 3136},
    },
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": data_uri(PNG), "detail": "low"}},
                {"type": "image", "image": data_uri(PNG), "min_pixels": 784, "max_pixels": 3136},
                {"type": "input_image", "image_url": data_uri(PNG), "detail": "high"},
                {"type": "video", "video": [data_uri(PNG), data_uri(PNG)], "fps": 2, "max_frames": 4},
                {"type": "video_url", "video_url": {"url": "x.mp4"}},
            ],
        }
    ],
}
"""Parts of every kind; the last is no clip, so nothing is computed."""


@pytest.mark.parametrize("values", [ODD[:3], pytest.param([*ODD[3:], *EDGES], marks=pytest.mark.large)])
def test_no_odd_value_in_a_part_brings_the_server_down(client, values):
    address = httpx.URL(str(client.base_url)).join("/v1/chat/completions")
    inside = [at for at, _ in places(FULL) if at[0] in ("messages", "mm_processor_kwargs")]
    assert len(inside) > 25
    with httpx.Client(timeout=WAIT_S) as http:
        for at in inside:
            for value in values:
                content = json.dumps(with_(FULL, at, value)).encode()
                answer = http.post(address, content=content, headers={"content-type": "application/json"})
                assert answer.status_code in (200, 400), (at, value, answer.text)
                assert answer.status_code == 200 or answer.json()["error"]["message"]
    assert chat(client, image_url(data_uri(PNG))).choices


def test_a_model_says_what_it_takes_and_refuses_what_it_does_not(client):
    (card,) = client.models.list().data
    assert card.model_extra["input_modalities"] == ["text", "image", "video"]
    sound = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    check_refusal(
        refused(client, sound), "sounds are not accepted, this model reads text, images and videos only"
    )


def test_a_client_that_leaves_makes_room_for_the_next_at_once(vlm_folder, host):
    limits = {"allow_private_hosts": True, "fetch_s": 600}
    folder = vlm_folder("qwen2_vl")
    slow, bad = image_url(f"{host.url}/slow"), image_url(data_uri(b"no picture"))
    with served(folder, media_limits=limits, max_rows=1, max_waiting=0, max_context=256) as client:
        address = httpx.URL(str(client.base_url))
        body = {"model": "sees", "messages": [{"role": "user", "content": [QUESTION, slow]}]}
        host.is_slow.clear()
        with socket.create_connection((address.host, address.port)) as raw:
            raw.sendall(posted(body))
            assert host.is_slow.wait(WAIT_S)
            error = refused(client, bad)
            assert error.status_code == 503
            assert "requests that show something wait already" in error.body["message"]
        end_s = time.monotonic() + WAIT_S
        while error.status_code == 503 and time.monotonic() < end_s:
            error = refused(client, bad)
        assert error.status_code == 400


def test_a_request_of_slow_addresses_leaves_threads_to_its_neighbours(vlm_folder, host):
    """Twenty, where sixteen threads fetch."""
    slow = [image_url(f"{host.url}/slow")] * 20
    body = {"model": "sees", "messages": [{"role": "user", "content": [QUESTION, *slow]}]}
    host.files["/other.png"] = file_of(picture(77))
    host.is_slow.clear()
    limits = {"allow_private_hosts": True, "fetch_s": 600}
    with served(vlm_folder("qwen2_vl"), media_limits=limits) as client:
        address = httpx.URL(str(client.base_url))
        with socket.create_connection((address.host, address.port)) as raw:
            raw.sendall(posted(body))
            assert host.is_slow.wait(WAIT_S)
            assert chat(client, QUESTION, image_url(f"{host.url}/other.png")).choices


def posted(body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content
