"""Where media lie -> their content: data URIs, addresses, files under allowed folders, lists of frames.

Everything here may take its time (a slow server, a long clip) and is called on a thread that may wait.
"""

from __future__ import annotations

import base64
import binascii
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
from PIL import Image

from serve.errors import RequestError
from serve.media.clips import clip_of, read_clip
from serve.media.content import Clip, Content, Picture, Sound
from serve.media.fetch import fetch
from serve.media.parts import MediaPart
from serve.media.pictures import check_size, picture_of, read_picture
from serve.media.settings import MediaLimits, MediaSettings
from serve.media.sounds import read_sound, sound_of
from serve.model.prompt import MediaKind


@dataclass(frozen=True)
class Sources:
    """What is read, and from where.

    roots   folders whose files are read, by any path into them, once links are followed; none: no file is read
    folder  what a relative path starts from; None: paths are absolute
    """

    limits: MediaLimits = field(default_factory=MediaLimits)
    roots: tuple[Path, ...] = ()
    folder: Path | None = None

    def load(self, part: MediaPart, settings: MediaSettings = MediaSettings()) -> Content:
        """What a part shows, decoded. RequestError that begins with the part's name and has it as its param.

        settings  which frames of a clip, and how large what is shown will be made; the part's own go first
        """
        settings = part.settings.over(settings)
        if part.kind == "audio":
            return self._sound(part.source, part.name)
        shown: Picture | Clip
        if part.kind == "image":
            shown = self._picture(part.source, part.name)
        else:
            shown = self._clip(part.source, part.name, settings)
        _check_enlarged(shown, settings, part.name, self.limits)
        return shown

    def _picture(self, source: Any, name: str) -> Picture:
        if isinstance(source, Picture):
            return source
        if isinstance(source, (Image.Image, np.ndarray)):
            return _decoded(source, name, self.limits)
        return read_picture(self.read(source, "image", name), name, self.limits)

    def _clip(self, source: Any, name: str, settings: MediaSettings) -> Clip:
        if isinstance(source, Clip):
            return source
        if isinstance(source, (list, tuple)):
            if len(source) > self.limits.max_video_frames:
                raise RequestError(
                    f"{name}: found {len(source)} frames; at most {self.limits.max_video_frames} are read",
                    name,
                )
            frames = (self._picture(frame, f"{name}.{number}") for number, frame in enumerate(source))
            return clip_of(frames, name, settings, self.limits)
        return read_clip(self.read(source, "video", name), name, settings, self.limits)

    def _sound(self, source: Any, name: str) -> Sound:
        if isinstance(source, Sound):
            return source
        if isinstance(source, np.ndarray):
            return sound_of(source, name)
        return read_sound(self.read(source, "audio", name), name, self.limits)

    def read(self, source: Any, kind: MediaKind, name: str) -> bytes:
        """The bytes that a source leads to, as they lie there. RequestError."""
        max_bytes = self.limits.max_bytes(kind)
        if isinstance(source, (bytes, bytearray, memoryview)):
            return self._bounded(bytes(source), max_bytes, name)
        if isinstance(source, Path):
            return self._file(source, max_bytes, name)
        if not isinstance(source, str) or not source.strip():
            found = (
                "nothing" if source is None or source == "" else f"a value of type {type(source).__name__}"
            )
            raise RequestError(
                f"{name}: found {found}; expected an http or https address, a data URI or a path", name
            )
        source = source.strip()
        scheme = source[:8].partition(":")[0].lower()
        if scheme == "data":
            return self._bounded(_of_data_uri(source, max_bytes, name), max_bytes, name)
        if scheme in ("http", "https"):
            return fetch(source, name, max_bytes, self.limits)
        if scheme == "file":
            return self._file(_path_of(source, name), max_bytes, name)
        head = source.split("/", 1)[0]
        if ":" in head and len(head) > 2:
            raise RequestError(
                f"{name}: found an address of kind {head.partition(':')[0][:20]!a}; expected http, https, data or "
                "a path",
                name,
            )
        return self._file(Path(source), max_bytes, name)

    def _bounded(self, data: bytes, max_bytes: int, name: str) -> bytes:
        if len(data) > max_bytes:
            raise RequestError(f"{name}: found {len(data):,} bytes; at most {max_bytes:,} are read", name)
        return data

    def _file(self, path: Path, max_bytes: int, name: str) -> bytes:
        """A file's bytes. Of what lies outside the roots nothing is told, not even whether it exists."""
        if not self.roots:
            raise RequestError(
                f"{name}: found a path; no folder is allowed here, so send the file as a data URI", name
            )
        if not path.is_absolute():
            if self.folder is None:
                raise RequestError(
                    f"{name}: found the relative path {str(path)[:80]!r}; expected an absolute one, an http or https "
                    "address or a data URI",
                    name,
                )
            path = self.folder / path
        try:
            real = Path(os.path.realpath(path))
        except (OSError, ValueError):  # too long, or a null character
            raise RequestError(f"{name}: {str(path)[:80]!r} is no path of a file", name) from None
        if not any(real.is_relative_to(os.path.realpath(root)) for root in self.roots):
            raise RequestError(f"{name}: {str(path)[:200]!r} is in no folder that is allowed here", name)
        try:
            return _read_file(real, max_bytes, name)
        except OSError as error:
            raise RequestError(
                f"{name}: {str(path)[:200]!r} cannot be read: {error.strerror}", name
            ) from None


def _read_file(path: Path, max_bytes: int, name: str) -> bytes:
    # Without waiting: a pipe without a writer would hold the thread for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise RequestError(f"{name}: {str(path)[:200]!r} is no plain file", name)
        if status.st_size > max_bytes:
            raise RequestError(
                f"{name}: found {status.st_size:,} bytes; at most {max_bytes:,} are read", name
            )
        return stream.read(max_bytes + 1)[:max_bytes]


def _path_of(url: str, name: str) -> Path:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise RequestError(f"{name}: found a file on another host; expected file:///path", name)
    return Path(unquote(parts.path))


def _of_data_uri(uri: str, max_bytes: int, name: str) -> bytes:
    head, comma, data = uri.partition(",")
    if not comma:
        raise RequestError(f"{name}: found a data URI without a comma; expected data:…;base64,…", name)
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(data)
    if len(data) * 3 // 4 > max_bytes + 3:
        raise RequestError(
            f"{name}: found {len(data) * 3 // 4:,} bytes; at most {max_bytes:,} are read", name
        )
    text = "".join(unquote(data).split()) if "%" in data else "".join(data.split())
    text = text.translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name}: found base64 that cannot be read: {error}", name) from None


def _decoded(source: Any, name: str, limits: MediaLimits) -> Picture:
    try:
        image = source if isinstance(source, Image.Image) else Image.fromarray(source)
        check_size(image, name, limits)
        image.load()
        return picture_of(image)
    except RequestError:
        raise
    except Exception as error:  # Pillow's, of an image that somebody else made
        raise RequestError(f"{name}: the picture cannot be read: {error}", name) from error


def _check_enlarged(shown: Picture | Clip, settings: MediaSettings, name: str, limits: MediaLimits) -> None:
    """RequestError if the settings make more pixels of it than are read of any: what was sent may be one pixel."""
    height, width = settings.resize or shown.size
    num_pixels = max(height * width, settings.min_pixels or 0)
    if num_pixels <= shown.size[0] * shown.size[1]:
        return
    total, limit, what = num_pixels, limits.max_image_pixels, "a picture"
    if isinstance(shown, Clip):
        total, limit, what = num_pixels * len(shown.frames), limits.max_video_pixels, "a clip's frames"
    if total > limit:
        raise RequestError(
            f"{name}: {total:,} pixels are asked to be made of it; at most {limit:,} are made of {what}", name
        )


def check_count(parts: Sequence[MediaPart], limits: MediaLimits) -> None:
    """RequestError that names the first part too many."""
    if len(parts) > limits.max_items:
        raise RequestError(
            f"{parts[limits.max_items].name}: found {len(parts)} pictures, clips and sounds; at most "
            f"{limits.max_items} are taken",
            parts[limits.max_items].name,
        )
