"""Where media lie: data URIs, paths under allowed folders, addresses, lists of frames; and the names of refusals."""

from __future__ import annotations

import base64
import io
import os
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from serve.errors import RequestError
from serve.media.content import Clip, Picture, Sound
from serve.media.parts import media_part
from serve.media.settings import MediaLimits, MediaSettings, settings_of
from serve.media.sources import Sources, check_count

HERE = "messages.0.content.0"


def png(colour: tuple[int, int, int] = (10, 20, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(stream, "PNG")
    return stream.getvalue()


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def loaded(part, sources: Sources = Sources()):
    return sources.load(media_part(part, HERE))


def refusal(part, sources: Sources = Sources()) -> tuple[str, str]:
    """(param, message)"""
    with pytest.raises(RequestError) as caught:
        loaded(part, sources)
    assert str(caught.value).startswith(f"{caught.value.param}: ")
    return caught.value.param, str(caught.value)


@pytest.fixture
def address():
    """Of a server on this machine that answers with a picture."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-length", str(len(png())))
            self.end_headers()
            self.wfile.write(png())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.png?size=1"
    server.shutdown()
    server.server_close()


def test_a_picture_is_one_wherever_it_lies(tmp_path, address):
    (tmp_path / "a b.png").write_bytes(png())
    sources = Sources(MediaLimits(allow_private_hosts=True), roots=(tmp_path,), folder=tmp_path)
    path = tmp_path / "a b.png"
    unpadded = uri(png()).rstrip("=")
    wrapped = "\n".join(uri(png())[i : i + 60] for i in range(0, len(uri(png())), 60))
    where = [
        uri(png()),
        unpadded,
        wrapped,
        uri(png()).replace("data:image/png", "DATA:"),
        uri(png()).replace("+", "-").replace("/", "_").replace("image_png", "image/png"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in png()),
        str(path),
        "a b.png",
        "./a b.png",
        path.as_uri(),
        path.as_uri().replace("file:///", "file://localhost/"),
        address,
        f" {path} ",
        png(),
        path,
        {"bytes": png(), "path": None},
        {"bytes": None, "path": str(path)},
        Image.open(io.BytesIO(png())),
        np.full((4, 6, 3), (10, 20, 30), np.uint8),
        Picture(np.full((4, 6, 3), (10, 20, 30), np.uint8)),
    ]
    keys = {str(w)[:40]: loaded({"type": "image", "image": w}, sources).sha256 for w in where}
    assert set(keys.values()) == {Picture(np.full((4, 6, 3), (10, 20, 30), np.uint8)).sha256}, keys


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": uri(png())}},
        {"type": "image_url", "image_url": {"url": uri(png()), "detail": "high"}},
        {"type": "image_url", "image_url": uri(png())},
        {"type": "input_image", "image_url": uri(png()), "detail": "auto"},
        {"type": "image", "image": uri(png())},
        {"type": "image", "url": uri(png())},
        {"type": "image", "image_url": uri(png()), "min_pixels": 4, "max_pixels": 400},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": uri(png())[22:]}},
        {
            "type": "image",
            "source": {"type": "url", "url": uri(png())},
            "cache_control": {"type": "ephemeral"},
        },
        {"type": "image_url", "image_url": {"url": uri(png())}, "uuid": "a", "text": None},
    ],
)
def test_pictures_are_understood_by_everyones_names(part):
    assert isinstance(loaded(part), Picture)


def test_clips_and_sounds_are_understood_by_everyones_names():
    frames = [uri(png((i, i, i))) for i in range(3)]
    for part in (
        {"type": "video", "video": frames},
        {"type": "video", "video": frames, "fps": 4},
        {"type": "video_url", "video_url": {"url": frames}},
        {"type": "video", "video": tuple(png((i, i, i)) for i in range(3))},
    ):
        clip = loaded(part)
        assert isinstance(clip, Clip)
        assert clip.times_s[1] == (0.25 if "fps" in part else 0.5)
    rng = np.random.default_rng(0)
    samples = (rng.uniform(-1, 1, 800) * 32767).astype("<i2").tobytes()
    head = b"RIFF\x64\x06\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\x40\x06\0\0"
    sound = base64.b64encode(head + samples).decode()
    for part in (
        {"type": "input_audio", "input_audio": {"data": sound, "format": "wav"}},
        {"type": "input_audio", "input_audio": {"data": f"data:audio/wav;base64,{sound}"}},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{sound}"}},
        {"type": "audio", "audio": f"data:audio/wav;base64,{sound}"},
    ):
        found = loaded(part)
        assert isinstance(found, Sound)
        assert (found.rate, len(found.samples)) == (8000, 800)


@pytest.mark.parametrize(
    ("part", "param", "said"),
    [
        ({"type": "image_url"}, "image_url", "found nothing"),
        ({"type": "image_url", "image_url": {}}, "image_url.url", "found nothing"),
        ({"type": "image_url", "image_url": {"url": ""}}, "image_url", "found nothing"),
        ({"type": "image_url", "image_url": {"url": 3}}, "image_url", "type int"),
        ({"type": "image_url", "image_url": {"uri": "x"}}, "image_url.uri", "expected url"),
        ({"type": "image_url", "image_url": uri(png()), "colour": 1}, "colour", "not known"),
        (
            {"type": "image_url", "image_url": {"url": uri(png()), "detail": "max"}},
            "image_url.detail",
            "'max'",
        ),
        ({"type": "input_image", "file_id": "file-1"}, "image_url", "found nothing"),
        ({"type": "image", "image": uri(b"hello")}, "image", "text ('hello')"),
        ({"type": "image", "image": "data:image/png;base64"}, "image", "without a comma"),
        ({"type": "image", "image": "data:image/png;base64,@@@"}, "image", "base64 that cannot be read"),
        ({"type": "image", "image": "data:image/png;base64,"}, "image", "no bytes"),
        ({"type": "image", "image": "ftp://host/a.png"}, "image", "expected http, https, data"),
        ({"type": "image", "image": "javascript:alert(1)"}, "image", "expected http, https, data"),
        ({"type": "image", "image": "/etc/passwd"}, "image", "no folder is allowed"),
        ({"type": "image", "image": "file:///etc/passwd"}, "image", "no folder is allowed"),
        ({"type": "image", "image": uri(png()), "max_pixels": 0}, "max_pixels", "whole number"),
        ({"type": "image", "image": uri(png()), "fps": "fast"}, "fps", "frames a second"),
        ({"type": "image", "image": uri(png()), "resized_height": 28}, None, "go together"),
        (
            {"type": "image", "source": {"type": "file", "file_id": "a"}},
            "source",
            "expected an object of type url",
        ),
        ({"type": "video", "video": []}, "video", "no frames"),
        ({"type": "video", "video": [uri(png()), uri(b"hello")]}, "video.1", "text ('hello')"),
        ({"type": "video", "video": uri(b"hello", "video/mp4")}, "video", "no film"),
        (
            {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "midi"}},
            "input_audio.format",
            "midi",
        ),
        ({"type": "input_audio", "input_audio": {"format": "wav"}}, "input_audio.data", "base64"),
        ({"type": "input_audio", "input_audio": "AAAA"}, "input_audio", "no folder is allowed"),
    ],
)
def test_a_refusal_names_the_part(part, param, said):
    found, message = refusal(part)
    assert found == (f"{HERE}.{param}" if param else HERE)
    assert said in message


def test_a_hundred_pictures_are_refused_before_any_is_read():
    parts = [
        media_part({"type": "image", "image": "none.png"}, f"messages.0.content.{i}") for i in range(100)
    ]
    with pytest.raises(RequestError, match=r"messages\.0\.content\.32\.image: found 100 .* at most 32"):
        check_count(parts, MediaLimits())
    check_count(parts[:32], MediaLimits())


# Paths


@pytest.fixture
def roots(tmp_path) -> Path:
    inside = tmp_path / "inside"
    (inside / "deep").mkdir(parents=True)
    (inside / "deep" / "a.png").write_bytes(png())
    (tmp_path / "secret.png").write_bytes(png())
    (tmp_path / "inside-too").mkdir()
    (tmp_path / "inside-too" / "a.png").write_bytes(png())
    return inside


@pytest.mark.parametrize(
    "path",
    [
        *("../secret.png", "deep/../../secret.png", "link.png", "linked/secret.png", "../inside-too/a.png"),
        *("/etc/passwd", "../no-such-file.png", "%2e%2e/secret.png"),
    ],
)
def test_what_lies_outside_the_roots_is_refused_alike_whether_it_is_there_or_not(path, roots):
    (roots / "link.png").symlink_to(roots.parent / "secret.png")
    (roots / "linked").symlink_to(roots.parent)
    sources = Sources(roots=(roots,), folder=roots)
    said = "cannot be read" if path.startswith("%") else "in no folder that is allowed"
    spellings = {path, f"file://{roots / path}", str(roots / path)}
    for spelled in spellings - {f"file://{roots}/%2e%2e/secret.png"}:
        assert said in refusal({"type": "image", "image": spelled}, sources)[1]
    encoded = f"file://{roots}/%2e%2e/secret.png"
    assert "in no folder" in refusal({"type": "image", "image": encoded}, sources)[1]


def test_links_that_stay_inside_are_followed(roots):
    (roots / "link.png").symlink_to(roots / "deep" / "a.png")
    (roots.parent / "door").symlink_to(roots)
    assert isinstance(
        loaded({"type": "image", "image": str(roots / "link.png")}, Sources(roots=(roots,))), Picture
    )
    door = Sources(roots=(roots.parent / "door",))
    assert isinstance(loaded({"type": "image", "image": str(roots / "deep" / "a.png")}, door), Picture)


def test_what_is_no_plain_file_is_refused_at_once(roots):
    os.mkfifo(roots / "pipe")
    sources = Sources(MediaLimits(max_image_bytes=60), roots=(roots, Path("/dev")))
    for path, said in (
        (roots / "pipe", "no plain file"),
        (roots / "deep", "Is a directory"),
        (Path("/dev/zero"), "no plain file"),
        (roots / "none.png", "No such file"),
        (roots / "deep" / "a.png", "at most 60"),
        (roots / ("x" * 5000), "File name too long"),
        (str(roots) + "/a\0.png", "is no path"),
    ):
        assert said in refusal({"type": "image", "image": str(path)}, sources)[1]


def test_relative_paths_need_a_folder_to_start_from(roots):
    told = refusal({"type": "image", "image": "deep/a.png"}, Sources(roots=(roots,)))[1]
    assert "expected an absolute one" in told


def test_more_bytes_than_allowed_are_refused_before_they_are_decoded():
    sources = Sources(MediaLimits(max_image_bytes=50))
    for source in (uri(png()), png(), "data:," + "x" * 60):
        assert "at most 50" in refusal({"type": "image", "image": source}, sources)[1]


# Settings


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, MediaSettings()),
        ({"min_pixels": 1, "max_pixels": 2.0}, MediaSettings(min_pixels=1, max_pixels=2)),
        ({"size": {"shortest_edge": 3, "longest_edge": 9}}, MediaSettings(min_pixels=3, max_pixels=9)),
        ({"size": {"height": 28, "width": 56}}, MediaSettings(resize=(28, 56))),
        ({"resized_height": 28, "resized_width": 56}, MediaSettings(resize=(28, 56))),
        ({"fps": 2, "num_frames": 8}, MediaSettings(fps=2.0, max_frames=8)),
        ({"fps": None}, MediaSettings()),
    ],
)
def test_settings_have_vllms_names(told, expected):
    assert settings_of(told) == expected


@pytest.mark.parametrize(
    ("told", "param"),
    [
        ({"min_pixel": 1}, "min_pixel"),
        ({"max_pixels": True}, "max_pixels"),
        ({"max_pixels": "1"}, "max_pixels"),
        ({"max_pixels": -1}, "max_pixels"),
        ({"max_pixels": 1e400}, "max_pixels"),
        ({"fps": float("nan")}, "fps"),
        ({"fps": 0}, "fps"),
        ({"size": 448}, "size"),
        ({"size": {"height": 28}}, "size"),
        ({"size": {"height": 28, "width": 1 << 20}}, "size.width"),
        ({"resized_width": 28}, None),
        ({"min_pixels": 9, "max_pixels": 3}, "min_pixels"),
    ],
)
def test_settings_that_are_none_are_refused_by_name(told, param):
    with pytest.raises(RequestError) as caught:
        settings_of(told)
    assert caught.value.param == ("mm_processor_kwargs" + (f".{param}" if param else ""))


def test_a_parts_own_settings_go_first():
    part = media_part({"type": "image", "image": "x", "max_pixels": 5}, HERE)
    assert part.settings.over(MediaSettings(max_pixels=9, fps=1)) == MediaSettings(max_pixels=5, fps=1)


@pytest.mark.parametrize(
    "settings",
    [
        MediaSettings(min_pixels=10_001),
        MediaSettings(resize=(101, 100)),
        MediaSettings(min_pixels=1 << 39),
        MediaSettings(resize=(1 << 16, 1 << 16), max_pixels=50),
    ],
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_small_picture_is_not_made_a_huge_one(kind, settings):
    """A request of a hundred bytes could ask for terabytes: pixels that are made are bounded as those that come."""
    sources = Sources(MediaLimits(max_image_pixels=10_000, max_video_pixels=3 * 10_000))
    one, name = uri(png()), f"{HERE}.{kind}"
    part = media_part({"type": kind, kind: one if kind == "image" else [one] * 3}, HERE)
    with pytest.raises(RequestError, match="000 are made of a") as caught:
        sources.load(part, settings)
    assert caught.value.param == name
    fits = MediaSettings(min_pixels=10_000) if settings.resize is None else MediaSettings(resize=(100, 100))
    assert sources.load(part, fits).kind == kind
    with pytest.raises(RequestError):
        sources.load(replace(part, settings=settings), fits)
