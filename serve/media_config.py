"""What a server is told of media: how much of them it takes, and how finely it looks. Blocks of the configuration."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from serve.media.settings import MAX_FPS, MIB, MediaLimits, MediaSettings
from serve.settings import Strict


class MediaLimitsConfig(Strict):
    """What a request may show; more answers 400, and names the part."""

    max_items: int = Field(32, ge=0)
    """Pictures, clips and sounds of one request, together."""
    max_image_mib: float = Field(20, gt=0)
    """A picture's file, and a frame's, in MiB."""
    max_image_megapixels: float = Field(50, gt=0)
    """Its width times its height, in millions, as its header says: a larger one is not decoded."""
    max_video_mib: float = Field(200, gt=0)
    """A clip's file, in MiB."""
    max_video_frames: int = Field(768, ge=1)
    """Of one clip."""
    max_video_megapixels: float = Field(128, gt=0)
    """Of all its frames that are looked at, in millions: three bytes of memory each."""
    max_audio_mib: float = Field(50, gt=0)
    """A sound's file, in MiB."""
    max_audio_s: float = Field(1800, gt=0)
    """How long it may sound, in seconds."""
    fetch_s: float = Field(10, gt=0)
    """For one address, from looking its name up to the last byte, redirects included, in seconds."""
    decode_s: float = Field(30, gt=0)
    """For a clip's frames, in seconds."""
    allow_private_hosts: bool = False
    """Fetch from loopback, private and link-local addresses too. They are refused by the address that a name
    resolves to, also behind a redirect."""

    def build(self) -> MediaLimits:
        """In bytes and pixels."""
        return MediaLimits(
            max_items=self.max_items,
            max_image_bytes=int(self.max_image_mib * MIB),
            max_image_pixels=int(self.max_image_megapixels * 1e6),
            max_video_bytes=int(self.max_video_mib * MIB),
            max_video_frames=self.max_video_frames,
            max_video_pixels=int(self.max_video_megapixels * 1e6),
            max_audio_bytes=int(self.max_audio_mib * MIB),
            max_audio_s=self.max_audio_s,
            fetch_s=self.fetch_s,
            decode_s=self.decode_s,
            allow_private_hosts=self.allow_private_hosts,
        )


class MediaConfig(Strict):
    """How media are looked at where a request says nothing (mm_processor_kwargs); the family's way, if left out."""

    min_pixels: int | None = Field(None, ge=1)
    """Of each picture and frame: smaller ones are enlarged."""
    max_pixels: int | None = Field(None, ge=1)
    """Of each picture and frame: larger ones are made smaller, and so cost fewer tokens."""
    fps: float | None = Field(None, gt=0, le=MAX_FPS)
    """Frames taken of a second of a clip."""
    max_frames: int | None = Field(None, ge=1)
    """Of a clip; a longer one gives as many, evenly spread."""

    def build(self) -> MediaSettings:
        """As a request's are."""
        return MediaSettings(self.min_pixels, self.max_pixels, None, self.fps, self.max_frames)

    def problems(self) -> Iterator[tuple[str, str]]:
        """Bounds that no picture is within."""
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            yield "media.min_pixels", f"found {self.min_pixels}, which is above max_pixels {self.max_pixels}"
