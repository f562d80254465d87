"""How media are made ready for a tower, and how much of them is taken at all.

`MediaSettings` is asked for by a request or a recipe, `MediaLimits` is set by whoever runs the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from serve.errors import RequestError

MIB = 1 << 20
MAX_EDGE = 1 << 16
"""Of a size that is asked for, in pixels."""
MAX_FPS = 240.0
_SPELLINGS = {"num_frames": "max_frames", "nframes": "max_frames"}
"""Of qwen-vl-utils and vLLM -> ours."""


@dataclass(frozen=True)
class MediaSettings:
    """None: as the family's own processor does it.

    min_pixels, max_pixels  of each picture and each frame, as the family's processor takes it
    resize                  (height, width) that each picture and each frame is brought to first
    fps                     frames taken of a second of a clip; of frames that are given: how they follow one another
    max_frames              of a clip; a longer one gives as many, evenly spread
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resize: tuple[int, int] | None = None
    fps: float | None = None
    max_frames: int | None = None

    def over(self, base: MediaSettings) -> MediaSettings:
        """These settings, and those of `base` where these say nothing."""
        told = {name: value for name, value in vars(self).items() if value is not None}
        return replace(base, **told)


@dataclass(frozen=True)
class MediaLimits:
    """What is taken from a client; counts and bytes are of what was sent, pixels of what it decodes to."""

    max_items: int = 32
    """Pictures, clips and sounds of one request."""
    max_image_bytes: int = 20 * MIB
    max_image_pixels: int = 50_000_000
    """Read from the header, before anything is decoded."""
    max_video_bytes: int = 200 * MIB
    max_video_frames: int = 768
    max_video_pixels: int = 128_000_000
    """Of all frames taken together: three bytes of memory each."""
    max_audio_bytes: int = 50 * MIB
    max_audio_s: float = 1800.0
    fetch_s: float = 20.0
    """For one address, from looking its name up to the last byte."""
    max_redirects: int = 4
    allow_private_hosts: bool | tuple[str, ...] = False
    """Whether addresses of loopback and private networks are fetched from, or the names of the hosts for which they
    are."""
    decode_s: float = 30.0
    """Of a clip's frames."""

    def max_bytes(self, kind: str) -> int:
        """Of one item's file."""
        sizes = {"video": self.max_video_bytes, "audio": self.max_audio_bytes}
        return sizes.get(kind, self.max_image_bytes)


def settings_of(told: Mapping[str, Any], name: str = "mm_processor_kwargs") -> MediaSettings:
    """Settings by vLLM's names: min_pixels, max_pixels, size, resized_height and resized_width, fps, max_frames.

    RequestError that names what is unknown or no such number; null counts as not written.
    """
    known: dict[str, Any] = {}
    edges: dict[str, int] = {}
    for key, value in told.items():
        here = f"{name}.{key}"
        if value is None:
            continue
        target = _SPELLINGS.get(key, key)
        if target in ("min_pixels", "max_pixels", "max_frames"):
            known[target] = _count(value, here)
        elif target == "fps":
            known["fps"] = _rate(value, here)
        elif target in ("resized_height", "resized_width"):
            edges[target] = _count(value, here, MAX_EDGE)
        elif target == "size":
            known.update(_size(value, here))
        else:
            raise RequestError(
                f"{here}: not known here; expected min_pixels, max_pixels, size, resized_height and resized_width, "
                "fps, max_frames",
                here,
            )
    if len(edges) == 1:
        raise RequestError(
            f"{name}: found {next(iter(edges))} alone; resized_height and resized_width go together", name
        )
    if edges:
        known["resize"] = (edges["resized_height"], edges["resized_width"])
    return checked(MediaSettings(**known), name)


def checked(settings: MediaSettings, name: str) -> MediaSettings:
    """The same. RequestError for settings that contradict each other."""
    low, high = settings.min_pixels, settings.max_pixels
    if low is not None and high is not None and low > high:
        raise RequestError(f"{name}: found min_pixels {low} above max_pixels {high}", f"{name}.min_pixels")
    return settings


def _size(value: Any, here: str) -> dict[str, Any]:
    """`{"height", "width"}`, or the bounds in pixels that transformers calls shortest and longest edge."""
    if isinstance(value, Mapping):
        keys = {key for key, entry in value.items() if entry is not None}
        if keys == {"height", "width"}:
            return {
                "resize": tuple(_count(value[key], f"{here}.{key}", MAX_EDGE) for key in ("height", "width"))
            }
        if keys and keys <= {"shortest_edge", "longest_edge"}:
            names = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}
            return {names[key]: _count(value[key], f"{here}.{key}") for key in keys}
    raise RequestError(
        f"{here}: expected an object with height and width, or with shortest_edge and longest_edge in pixels of "
        "the whole picture",
        here,
    )


def _count(value: Any, here: str, limit: int = 1 << 40) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise RequestError(
            f"{here}: found {str(value)[:40]}; expected a whole number from 1 to {limit}", here
        )
    return value


def _rate(value: Any, here: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MAX_FPS:
        raise RequestError(
            f"{here}: found {str(value)[:40]}; expected frames a second, above 0, at most {MAX_FPS:g}", here
        )
    return float(value)
