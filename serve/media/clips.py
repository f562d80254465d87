"""A clip's bytes -> the frames a model is shown: `fps` of them a second, or as many as it may have.

Frames stand at whole multiples of 1/fps from the clip's start, so a longer cut begins with the same ones. OpenCV
decodes films, Pillow animated pictures. Only containers known by their first bytes are opened: a playlist would have
the decoder fetch what it names.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from serve.errors import RequestError
from serve.media.content import Clip, Picture
from serve.media.pictures import picture_of, said_by
from serve.media.settings import MediaLimits, MediaSettings

FPS = 2.0
"""Where nobody says: what Qwen's processors take."""
_ANIMATIONS = ("GIF", "WEBP", "PNG", "AVIF")
_READ = "MP4, MOV, WebM, Matroska, AVI, GIF and animated WebP"
_MIN_FRAME_S = 0.02
"""Of a frame of an animation that gives itself less; browsers do alike."""


def read_clip(
    data: bytes, name: str, settings: MediaSettings = MediaSettings(), limits: MediaLimits = MediaLimits()
) -> Clip:
    """A film's or an animation's frames. RequestError that begins with `name` and has it as its param."""
    if _is_film(data):
        return _film(data, name, settings, limits)
    if _is_animation(data):
        return _animation(data, name, settings, limits)
    raise RequestError(f"{name}: found no film that is read; expected {_READ}", name)


def clip_of(
    frames: Iterable[Picture],
    name: str,
    settings: MediaSettings = MediaSettings(),
    limits: MediaLimits = MediaLimits(),
) -> Clip:
    """A clip of frames that are given, all of which are taken: they follow one another by `fps`.

    RequestError for none, too many, or frames of several sizes.
    """
    taken = _bounded(frames, name, limits)
    if not taken:
        raise RequestError(f"{name}: found no frames; expected at least one", name)
    most = settings.max_frames
    if most is not None and len(taken) > most:
        raise RequestError(f"{name}: found {len(taken)} frames where max_frames is {most}; send fewer", name)
    fps = settings.fps or FPS
    return Clip(tuple(taken), tuple(number / fps for number in range(len(taken))))


def numbers_of(num_frames: int, rate: float, settings: MediaSettings, limits: MediaLimits) -> tuple[int, ...]:
    """Which frames of a film of `num_frames` at `rate` a second are taken."""
    step = max(1.0, rate / (settings.fps or FPS))
    count = max(1, int((num_frames - 1) / step) + 1) if num_frames else 0
    most = min(settings.max_frames or limits.max_video_frames, limits.max_video_frames)
    if count <= most:
        return tuple(min(round(number * step), num_frames - 1) for number in range(count))
    return tuple(np.linspace(0, num_frames - 1, most).round().astype(int).tolist())


def _bounded(frames: Iterable[Picture], name: str, limits: MediaLimits) -> list[Picture]:
    """The frames, within bounds and of one size."""
    taken: list[Picture] = []
    pixels = 0
    for frame in frames:
        pixels += frame.size[0] * frame.size[1]
        if pixels > limits.max_video_pixels or len(taken) >= limits.max_video_frames:
            raise RequestError(
                f"{name}: the frames have more than {limits.max_video_pixels:,} pixels together, or are more than "
                f"{limits.max_video_frames}; ask for fewer (fps, max_frames)",
                name,
            )
        if taken and frame.size != taken[0].size:
            raise RequestError(
                f"{name}: found frames of {taken[0].size[1]} x {taken[0].size[0]} and "
                f"{frame.size[1]} x {frame.size[0]} pixels; expected one size",
                name,
            )
        taken.append(frame)
    return taken


def _is_film(data: bytes) -> bool:
    if data[4:8] == b"ftyp":
        return data[8:12] not in (b"heic", b"heix", b"mif1", b"avif", b"avis")
    if data[:4] == b"RIFF":
        return data[8:12] == b"AVI "
    return data[:4] == b"\x1aE\xdf\xa3" or data[4:8] in (b"moov", b"mdat", b"wide", b"free")


def _is_animation(data: bytes) -> bool:
    return (
        data[:6] in (b"GIF87a", b"GIF89a")
        or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")
        or data[:8] == b"\x89PNG\r\n\x1a\n"
        or data[4:12] == b"ftypavis"
    )


def _film(data: bytes, name: str, settings: MediaSettings, limits: MediaLimits) -> Clip:
    import cv2

    with tempfile.NamedTemporaryFile(suffix=".film") as file:
        file.write(data)
        file.flush()
        film = cv2.VideoCapture(file.name, cv2.CAP_FFMPEG)
        try:
            if not film.isOpened():
                raise RequestError(f"{name}: the film cannot be decoded; expected {_READ}", name)
            width, height = (int(film.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            _check_frame(width, height, name, limits)
            rate = film.get(cv2.CAP_PROP_FPS)
            rate = rate if 0 < rate < 1000 else 1.0
            count = int(film.get(cv2.CAP_PROP_FRAME_COUNT))
            if count <= 0 or count > 1 << 24:
                count = _counted(film, name, limits)
                film.open(file.name, cv2.CAP_FFMPEG)
            numbers = numbers_of(count, rate, settings, limits)
            taken: dict[int, Picture] = {}

            def frames() -> Iterator[Picture]:
                for number, frame in _decoded(film, numbers, name, limits):
                    taken[number] = frame
                    yield frame

            pictures = _bounded(frames(), name, limits)
        finally:
            film.release()
    if not pictures:
        raise RequestError(f"{name}: the film holds no frame that can be decoded", name)
    return Clip(tuple(pictures), tuple(number / rate for number in taken))


def _counted(film: object, name: str, limits: MediaLimits) -> int:
    """How many frames a film has whose header does not say."""
    until = time.monotonic() + limits.decode_s
    count = 0
    while film.grab():  # type: ignore[attr-defined]
        count += 1
        _check_time(until, name, limits)
    return count


def _decoded(
    film: object, numbers: tuple[int, ...], name: str, limits: MediaLimits
) -> Iterator[tuple[int, Picture]]:
    """(number, frame) of the frames of these numbers, one after the other: seeking is not exact."""
    until = time.monotonic() + limits.decode_s
    at = -1
    for number in numbers:
        while at < number:
            if not film.grab():  # type: ignore[attr-defined]
                return  # headers promise more than there is, often by a few
            at += 1
            _check_time(until, name, limits)
        is_read, frame = film.retrieve()  # type: ignore[attr-defined]
        if not is_read:
            return
        pixels = np.ascontiguousarray(frame[:, :, ::-1])  # OpenCV's order is blue, green, red
        pixels.flags.writeable = False
        yield number, Picture(pixels)


def _check_time(until: float, name: str, limits: MediaLimits) -> None:
    if time.monotonic() > until:
        raise RequestError(
            f"{name}: decoding the film took more than {limits.decode_s:g} s; send a shorter one", name
        )


def _check_frame(width: int, height: int, name: str, limits: MediaLimits) -> None:
    if width * height > limits.max_image_pixels:
        raise RequestError(
            f"{name}: found frames of {width} x {height} pixels; at most {limits.max_image_pixels:,} are read",
            name,
        )


def _animation(data: bytes, name: str, settings: MediaSettings, limits: MediaLimits) -> Clip:
    """An animated picture's frames, as a film that shows each for its own time."""
    try:
        with Image.open(io.BytesIO(data), formats=_ANIMATIONS) as image:
            _check_frame(*image.size, name, limits)
            shown = _bounded(_shown(image, name, limits), name, limits)
            starts = _starts(image)
    except RequestError:
        raise
    except Exception as error:  # a decoder is foreign code: whatever a broken file makes it raise
        said = "it is broken" if isinstance(error, UnidentifiedImageError) else said_by(error)
        raise RequestError(f"{name}: the animation cannot be decoded: {said}", name) from error
    fps = settings.fps or FPS
    length_s = starts[-1]
    count = max(1, int(length_s * fps - 1e-9) + 1)
    times = [number / fps for number in range(count)]
    most = min(settings.max_frames or limits.max_video_frames, limits.max_video_frames)
    if count > most:
        times = np.linspace(0, times[-1], most).tolist()
    indices = [max(0, int(np.searchsorted(starts, t, side="right")) - 1) for t in times]
    last = len(shown) - 1
    return Clip(tuple(shown[min(index, last)] for index in indices), tuple(times))


def _shown(image: Image.Image, name: str, limits: MediaLimits) -> Iterator[Picture]:
    until = time.monotonic() + limits.decode_s
    for number in range(getattr(image, "n_frames", 1)):
        _check_time(until, name, limits)
        image.seek(number)
        yield picture_of(image.copy())


def _starts(image: Image.Image) -> list[float]:
    """Seconds at which each frame begins, and at which the last one ends."""
    starts = [0.0]
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        starts.append(starts[-1] + max(_MIN_FRAME_S, float(image.info.get("duration", 100)) / 1000))
    return starts
