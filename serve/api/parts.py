"""What a message's content may be made of: text, pictures, clips and sounds, in the words of OpenAI, vLLM and Qwen.

A part says where its content is (a data URI, an address, a path) and how finely it is to be read. Nothing is fetched
or decoded here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from serve.api.strict import Body, Neutral
from serve.errors import RequestError
from serve.model.prompt import MediaKind

LOW_DETAIL_PIXELS = 512 * 512
"""What `detail: low` leaves of a picture, as OpenAI's does."""

Detail = Literal["auto", "low", "high"]
Source = Annotated[str, Field(min_length=1)]
"""A data URI, an http(s) address, or a path."""


class TextPart(Body):
    """A piece of a message."""

    hints = frozenset({"cache_control"})

    type: Literal["text"]
    text: str


class _MediaPart(Body):
    """A picture, a clip or a sound."""

    hints = frozenset({"cache_control"})
    neutral: ClassVar[Neutral] = {"uuid": (None,)}
    kind: ClassVar[MediaKind]
    field: ClassVar[str]
    """Where the source is said."""

    @property
    def sources(self) -> Sequence[str]:
        """Where the content is: one, or the frames of a clip."""
        raise NotImplementedError

    @property
    def bounds(self) -> Mapping[str, Any]:
        """How finely it is to be read, in the words of MediaSettings, as far as the part says."""
        return {}


class _Address(Body):
    """Where a picture or a clip is."""

    url: Source


class ImageUrl(_Address):
    """OpenAI's `image_url`."""

    detail: Detail | None = None
    """low: 512 x 512 pixels at most; auto and high: what the request and the server allow."""


def _spelled_out(value: Any) -> Any:
    """A bare address is the object that holds it."""
    return {"url": value} if isinstance(value, str) else value


class ImageUrlPart(_MediaPart):
    """OpenAI's picture."""

    kind = "image"
    field = "image_url"

    type: Literal["image_url"]
    image_url: ImageUrl

    _spelled = field_validator("image_url", mode="before", json_schema_input_type=ImageUrl | Source)(
        _spelled_out
    )

    @property
    def sources(self) -> Sequence[str]:
        return (self.image_url.url,)

    @property
    def bounds(self) -> Mapping[str, Any]:
        return _bounds_of(self.image_url.detail)


class InputImagePart(_MediaPart):
    """The picture of OpenAI's responses."""

    neutral: ClassVar[Neutral] = {**_MediaPart.neutral, "file_id": (None,)}
    kind = "image"
    field = "image_url"

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
    def sources(self) -> Sequence[str]:
        return (self.image_url.url,)

    @property
    def bounds(self) -> Mapping[str, Any]:
        return _bounds_of(self.detail or self.image_url.detail)


class _SizedPart(_MediaPart):
    """What Qwen's clients write: bounds beside the source."""

    min_pixels: int | None = Field(None, ge=1)
    max_pixels: int | None = Field(None, ge=1)

    @property
    def bounds(self) -> Mapping[str, Any]:
        names = ("min_pixels", "max_pixels", "fps", "max_frames")
        return {name: value for name in names if (value := getattr(self, name, None)) is not None}


class ImagePart(_SizedPart):
    """Hugging Face's and Qwen's picture."""

    kind = "image"
    field = "image"

    type: Literal["image"]
    image: Source

    @property
    def sources(self) -> Sequence[str]:
        return (self.image,)


class VideoUrlPart(_SizedPart):
    """vLLM's clip."""

    kind = "video"
    field = "video_url"

    type: Literal["video_url"]
    video_url: _Address
    fps: float | None = Field(None, gt=0)
    max_frames: int | None = Field(None, ge=1)

    _spelled = field_validator("video_url", mode="before", json_schema_input_type=_Address | Source)(
        _spelled_out
    )

    @property
    def sources(self) -> Sequence[str]:
        return (self.video_url.url,)


class VideoPart(_SizedPart):
    """Qwen's clip: a file, or its frames in their order."""

    kind = "video"
    field = "video"

    type: Literal["video"]
    video: Source | Annotated[list[Source], Field(fail_fast=True, min_length=1)]
    fps: float | None = Field(None, gt=0)
    """Frames a second: taken from a file, or how frames that are given follow each other."""
    max_frames: int | None = Field(None, ge=1)

    @property
    def sources(self) -> Sequence[str]:
        return (self.video,) if isinstance(self.video, str) else tuple(self.video)


class InputAudio(Body):
    """OpenAI's `input_audio`. `format` is a hint: what the bytes are is found by looking at them."""

    hints = frozenset({"format"})

    data: Source
    """Base64."""


class InputAudioPart(_MediaPart):
    """OpenAI's sound."""

    kind = "audio"
    field = "input_audio"

    type: Literal["input_audio"]
    input_audio: InputAudio

    @property
    def sources(self) -> Sequence[str]:
        return (self.input_audio.data,)


MediaPart = ImageUrlPart | InputImagePart | ImagePart | VideoUrlPart | VideoPart | InputAudioPart
MEDIA_PARTS = (ImageUrlPart, InputImagePart, ImagePart, VideoUrlPart, VideoPart, InputAudioPart)
Part = Annotated[TextPart | MediaPart, Field(discriminator="type")]
"""By its `type`."""


def _bounds_of(detail: Detail | None) -> Mapping[str, Any]:
    return {"max_pixels": LOW_DETAIL_PIXELS} if detail == "low" else {}
