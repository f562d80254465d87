"""What a message's content may be made of: text, pictures, clips and sounds, in the words of OpenAI, vLLM and Qwen.

A part says where its content is (a data URI, an address, a path) and how finely it is to be looked at. Nothing is
fetched or decoded here.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from serve.api.strict import Body, Neutral
from serve.errors import RequestError
from serve.model.prompt import MediaKind

LOW_DETAIL_PIXELS = 512 * 512
"""What `detail: low` leaves of a picture, as OpenAI's does."""

Detail = Literal["auto", "low", "high", "original"]
"""All but low: what the request and the server allow."""
Source = Annotated[str, Field(min_length=1)]
"""A data URI, an http(s) address, or a path."""


_OF_OTHERS = ("text", "image_url", "image", "video_url", "video", "input_audio", "file", "refusal")


def _no_others(*own: str) -> Neutral:
    """What other kinds of parts hold, as null: clients with one class for all parts write every field of it."""
    return {name: (None,) for name in _OF_OTHERS if name not in own}


class TextPart(Body):
    """A piece of a message."""

    hints = frozenset({"cache_control", "prompt_cache_breakpoint"})
    neutral: ClassVar[Neutral] = _no_others("text")

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """The words by which an assistant refused, in its own turn."""

    neutral: ClassVar[Neutral] = _no_others("refusal")

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        """The words."""
        return self.refusal


WORDS = (TextPart, RefusalPart)
"""Parts that are text."""


class _Shown(Body):
    """A picture, a clip or a sound."""

    hints = frozenset({"cache_control", "prompt_cache_breakpoint"})
    neutral: ClassVar[Neutral] = {"uuid": (None,)}
    kind: ClassVar[MediaKind]

    @property
    def is_low(self) -> bool:
        """True if little detail is asked for."""
        return False


class _Address(Body):
    """Where a clip is."""

    url: Source


class ImageUrl(_Address):
    """Where a picture is, and how much detail of it is wanted."""

    detail: Detail | None = None


def _spelled_out(value: Any) -> Any:
    """A bare address is the object that holds it."""
    return {"url": value} if isinstance(value, str) else value


class ImageUrlPart(_Shown):
    """OpenAI's picture."""

    kind = "image"

    neutral: ClassVar[Neutral] = {**_Shown.neutral, **_no_others("image_url")}

    type: Literal["image_url"]
    image_url: ImageUrl

    _spelled = field_validator("image_url", mode="before", json_schema_input_type=ImageUrl | Source)(
        _spelled_out
    )

    @property
    def is_low(self) -> bool:
        return self.image_url.detail == "low"


class InputImagePart(_Shown):
    """The picture of OpenAI's responses."""

    neutral: ClassVar[Neutral] = {**_Shown.neutral, **_no_others("image_url"), "file_id": (None,)}
    kind = "image"

    type: Literal["input_image"]
    image_url: ImageUrl
    detail: Detail | None = None

    _spelled = field_validator("image_url", mode="before", json_schema_input_type=ImageUrl | Source)(
        _spelled_out
    )

    @model_validator(mode="after")
    def _one_detail(self) -> InputImagePart:
        both = {self.detail, self.image_url.detail} - {None}
        if len(both) > 1:
            raise RequestError(
                f"detail: found {self.detail}, but image_url.detail is {self.image_url.detail}; send one",
                "detail",
            )
        return self

    @property
    def is_low(self) -> bool:
        return "low" in (self.detail, self.image_url.detail)


class _Sized(_Shown):
    """What Qwen's clients say beside the source; it takes the place of mm_processor_kwargs for this part."""

    min_pixels: int | None = Field(None, ge=1)
    max_pixels: int | None = Field(None, ge=1)
    resized_height: int | None = Field(None, ge=1)
    resized_width: int | None = Field(None, ge=1)


class ImagePart(_Sized):
    """Qwen's picture, and Hugging Face's, which is at a `url` or a `path`."""

    kind = "image"

    neutral: ClassVar[Neutral] = {**_Shown.neutral, **_no_others("image")}

    type: Literal["image"]
    image: Source | None = None
    url: Source | None = None
    path: Source | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ImagePart:
        num_sources = sum(each is not None for each in (self.image, self.url, self.path))
        if num_sources != 1:
            raise RequestError(f"image: found {num_sources} sources (image, url, path); send one", "image")
        return self


class _Film(_Sized):
    """What is said of a clip."""

    fps: float | None = Field(None, gt=0)
    """Frames taken of a second of a file; of frames that are given, how they follow each other."""
    max_frames: int | None = Field(None, ge=1)


class VideoUrlPart(_Film):
    """vLLM's clip."""

    kind = "video"

    neutral: ClassVar[Neutral] = {**_Shown.neutral, **_no_others("video_url")}

    type: Literal["video_url"]
    video_url: _Address

    _spelled = field_validator("video_url", mode="before", json_schema_input_type=_Address | Source)(
        _spelled_out
    )


class VideoPart(_Film):
    """Qwen's clip: a file, or its frames in their order."""

    kind = "video"

    neutral: ClassVar[Neutral] = {**_Shown.neutral, **_no_others("video")}

    type: Literal["video"]
    video: Source | Annotated[list[Source], Field(fail_fast=True, min_length=1)]


class InputAudio(Body):
    """OpenAI's `input_audio`: base64, and what it is."""

    data: Source
    format: Literal["wav", "mp3", "flac"] | None = None


class InputAudioPart(_Shown):
    """OpenAI's sound."""

    kind = "audio"

    neutral: ClassVar[Neutral] = {**_Shown.neutral, **_no_others("input_audio")}

    type: Literal["input_audio"]
    input_audio: InputAudio


Shown = ImageUrlPart | InputImagePart | ImagePart | VideoUrlPart | VideoPart | InputAudioPart
Part = Annotated[TextPart | RefusalPart | Shown, Field(discriminator="type")]
"""By its `type`."""
