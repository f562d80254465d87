"""Which parts of messages show something, by OpenAI's, Qwen's and Anthropic's names, and where they say it lies.

Reads nothing: `sources.py` turns a part into its content. A problem is named by its place, `messages.0.content.1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.errors import RequestError
from serve.media.settings import MediaSettings, settings_of
from serve.model.messages import MEDIA_PARTS
from serve.model.prompt import MediaKind

_DETAILS = ("auto", "low", "high", "original")
_SETTINGS = frozenset(
    ("min_pixels", "max_pixels", "resized_height", "resized_width", "fps", "max_frames", "nframes")
)
"""What Qwen's parts say of themselves."""
_HINTS = ("uuid", "cache_control")
"""Keys that ask nothing of the answer."""
_SOUNDS = ("wav", "mp3", "flac")


@dataclass(frozen=True, eq=False)
class MediaPart:
    """One thing that a message shows.

    name    where it stands: messages.0.content.1.image_url
    source  an address, a path or a data URI; bytes; for a clip also a list of those, its frames; or what was decoded
            already: an image of Pillow's, an array
    settings  what the part itself says
    """

    kind: MediaKind
    name: str
    source: Any = field(repr=False)
    settings: MediaSettings = field(default_factory=MediaSettings)


def media_part(part: Mapping[str, Any], here: str) -> MediaPart:
    """One part of a known type; `here` is its place. RequestError."""
    kind = MEDIA_PARTS[part["type"]]
    key = next((key for key in _keys(part["type"], kind) if part.get(key) is not None), None)
    if key is None:
        expected = _keys(part["type"], kind)[0]
        raise RequestError(
            f"{here}.{expected}: found nothing; expected {_expected(kind)}", f"{here}.{expected}"
        )
    others = {k: v for k, v in part.items() if k not in ("type", key, *_SETTINGS, *_HINTS) and v is not None}
    said = {k: v for k, v in part.items() if k in _SETTINGS}
    if "detail" in others:
        _check_detail(others.pop("detail"), f"{here}.detail")
    if others:
        other = next(iter(others))
        raise RequestError(f"{here}.{other}: not known in a part of type {part['type']}", f"{here}.{other}")
    name = f"{here}.{key}"
    return MediaPart(kind, name, _source(part[key], key, kind, name), settings_of(said, here))


def _keys(part_type: str, kind: MediaKind) -> tuple[str, ...]:
    """Names under which a part of this type may hold its source."""
    if part_type in ("image_url", "input_image"):
        return ("image_url",)
    if part_type == "input_audio":
        return ("input_audio",)
    if part_type.endswith("_url"):
        return (part_type,)
    return (kind, f"{kind}_url", "url", "path", "source")


def _source(value: Any, key: str, kind: MediaKind, name: str) -> Any:
    """What says where it lies, out of the object that some types wrap it in."""
    if not isinstance(value, Mapping):
        return value
    if key == "input_audio":
        return _input_audio(value, name)
    if "bytes" in value or "path" in value:  # as data sets of the hub hold pictures
        data = value.get("bytes")
        return data if data is not None else value.get("path")
    if key == "source":
        return _anthropic(value, name)
    unknown = next((k for k in value if k not in ("url", "detail", *_SETTINGS)), None)
    if unknown is not None:
        raise RequestError(f"{name}.{unknown}: not known here; expected url", f"{name}.{unknown}")
    if value.get("detail") is not None:
        _check_detail(value["detail"], f"{name}.detail")
    if value.get("url") is None:
        raise RequestError(f"{name}.url: found nothing; expected {_expected(kind)}", f"{name}.url")
    return value["url"]


def _input_audio(value: Mapping[str, Any], name: str) -> str:
    unknown = next((k for k in value if k not in ("data", "format")), None)
    if unknown is not None:
        raise RequestError(f"{name}.{unknown}: not known here; expected data and format", f"{name}.{unknown}")
    data, form = value.get("data"), value.get("format")
    if form is not None and form not in _SOUNDS:
        raise RequestError(
            f"{name}.format: found {str(form)[:40]!r}; expected {', '.join(_SOUNDS)}", f"{name}.format"
        )
    if not isinstance(data, str):
        raise RequestError(f"{name}.data: expected the sound's bytes as base64", f"{name}.data")
    return data if data[:5].lower() == "data:" else f"data:audio/{form or 'wav'};base64,{data}"


def _anthropic(value: Mapping[str, Any], name: str) -> str:
    if value.get("type") == "url" and isinstance(value.get("url"), str):
        return str(value["url"])
    if value.get("type") == "base64" and isinstance(value.get("data"), str):
        return f"data:{value.get('media_type', '')};base64,{value['data']}"
    raise RequestError(
        f"{name}: expected an object of type url with url, or of type base64 with media_type and data", name
    )


def _check_detail(value: Any, name: str) -> None:
    """A hint; how many pixels are read is said by mm_processor_kwargs."""
    if value not in _DETAILS:
        raise RequestError(f"{name}: found {str(value)[:40]!r}; expected {', '.join(_DETAILS)}", name)


def _expected(kind: MediaKind) -> str:
    what = {"image": "a picture", "video": "a clip, or a list of its frames", "audio": "a sound"}[kind]
    return f"{what}: an http or https address, a data URI or a path"
