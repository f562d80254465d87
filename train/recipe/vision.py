"""A recipe's blocks for models that see: how pictures and clips are made ready, and what of their towers trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from serve.media.settings import MediaSettings
from serve.settings import Problems, Strict

MAX_EDGE = 1 << 16


class Coordinates(Strict):
    """Boxes and points that rows name in pictures, and what the model is to say instead."""

    rows: Literal["pixels", "fractions", "thousandths"] = "pixels"
    """What rows say: pixels of the picture as it is stored; its width and height as 1, or as 1,000."""
    model: Literal["pixels", "fractions", "thousandths"] = "pixels"
    """What the model learns: pixels of the picture as it is resized for the tower (Qwen2.5-VL), or shares of it."""
    keys: tuple[str, ...] = ("bbox_2d", "point_2d", "bbox", "box", "point")
    """Of JSON objects in a turn's words: a list of x, y, x, y … or lists of them."""
    tags: tuple[str, ...] = ("box", "point", "quad", "poly")
    """Of marks in a turn's words: `<box>(x,y),(x,y)</box>` and `<|box_start|>(x,y),(x,y)<|box_end|>`."""


class ImageConfig(Strict):
    """How pictures, and frames of clips, are made ready for the tower. Nothing: as the model's own processor does."""

    min_pixels: int | None = Field(default=None, ge=1)
    """Smaller pictures are enlarged to so many pixels."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Larger pictures are shrunk to so many pixels; fewer of them are fewer tokens."""
    resize: tuple[int, int] | None = None
    """[height, width] that each picture is brought to first."""
    fps: float | None = Field(default=None, gt=0)
    """Frames taken of a second of a clip."""
    max_frames: int | None = Field(default=None, ge=1)
    """Of a clip; a longer one gives as many, evenly spread."""
    coordinates: Coordinates | None = None
    """Boxes and points in turns follow the picture's new size. Nothing: turns stay as they are written."""

    @model_validator(mode="after")
    def _agrees(self) -> ImageConfig:
        problems: list[tuple[str, str]] = []
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            problems.append(
                ("min_pixels", f"found {self.min_pixels}, more than max_pixels {self.max_pixels}")
            )
        if self.resize and not all(1 <= edge <= MAX_EDGE for edge in self.resize):
            problems.append(("resize", f"found {list(self.resize)}; expected [height, width] in pixels"))
        if problems:
            raise Problems(problems)
        return self

    @property
    def settings(self) -> MediaSettings:
        """As serving takes them."""
        return MediaSettings(self.min_pixels, self.max_pixels, self.resize, self.fps, self.max_frames)


def _how(value: Any) -> Any:
    """False and nothing are one."""
    return None if value is False else value


How = Annotated[Literal["lora", "full"] | None, BeforeValidator(_how)]


class TrainVision(Strict):
    """What of a model's eyes trains. Nothing: its tower and its projector stay as they are, and a picture's features
    are computed once."""

    tower: How = None
    """What turns pixels into vectors. `lora`: an adapter on its linear layers; `full`: its weights; false."""
    projector: How = None
    """What turns those into the language model's (merger, connector). `lora`, `full`, or false."""

    def __bool__(self) -> bool:
        return bool(self.tower or self.projector)


def problems(train_vision: TrainVision, fine_tune_type: str) -> Iterator[tuple[str, str]]:
    """(key, what is wrong) of what trains beside the language model."""
    said = {"tower": train_vision.tower, "projector": train_vision.projector}
    for name, how in said.items():
        if how == "lora" and fine_tune_type == "full":
            yield f"train_vision.{name}", "found lora with fine_tune_type: full; expected full, or false"
