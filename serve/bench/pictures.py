"""Pictures and clips that nobody has seen before, made up: what a benchmark of sight shows."""

from __future__ import annotations

import base64
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GRAIN = 16
"""Edge of a patch of one colour before it is smoothed, in pixels: so that a file is neither tiny nor noise."""
CLIP_FPS = 2.0


class PictureMaker:
    """Makes pictures of `edge` x `edge` pixels, each another; the same seed makes the same ones."""

    def __init__(self, seed: int, edge: int) -> None:
        self._random = np.random.default_rng(seed)
        self._edge = edge

    def image(self) -> Image.Image:
        """The next picture."""
        side = max(2, self._edge // GRAIN)
        colours = self._random.integers(0, 256, (side, side, 3), np.uint8)
        return Image.fromarray(colours).resize((self._edge, self._edge), Image.Resampling.BICUBIC)

    def part(self) -> Mapping[str, Any]:
        """The next picture as a part of a message, PNG in base64."""
        return image_part(data_uri(self.image(), "PNG"))

    def clip(self, num_frames: int, file: Path) -> Mapping[str, Any]:
        """A film of so many new pictures, written to `file` (.avi), as a part that names it."""
        import cv2

        size = (self._edge, self._edge)
        writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"MJPG"), CLIP_FPS, size)
        assert writer.isOpened(), f"OpenCV cannot write {file}"
        for _ in range(num_frames):
            writer.write(np.asarray(self.image())[:, :, ::-1])
        writer.release()
        return {"type": "video_url", "video_url": {"url": str(file.absolute())}}

    def sent_clip(self, num_frames: int) -> Mapping[str, Any]:
        """The same with the film in it, for a server that sees no files of this machine."""
        with tempfile.TemporaryDirectory(prefix="lathe-bench-") as folder:
            file = Path(folder) / "clip.avi"
            part = self.clip(num_frames, file)
            content = base64.b64encode(file.read_bytes()).decode()
        return {**part, "video_url": {"url": f"data:video/x-msvideo;base64,{content}"}}


def data_uri(image: Image.Image, format: str) -> str:
    """The picture in a file of that format, which is its address."""
    file = io.BytesIO()
    image.save(file, format)
    content = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{format.lower()};base64,{content}"


def image_part(url: str) -> Mapping[str, Any]:
    """OpenAI's part for a picture at that address."""
    return {"type": "image_url", "image_url": {"url": url}}
