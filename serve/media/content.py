"""What a user shows a model, decoded: pictures, clips and sounds, known by what they hold, not by where they lay.

Plain host data: no file, no address, no processor and no array of the device.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from serve.model.prompt import MediaKind


@dataclass(frozen=True, eq=False)
class Picture:
    """pixels [H, W, 3] uint8, sRGB, upright."""

    pixels: np.ndarray = field(repr=False)

    kind: MediaKind = field(default="image", init=False)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        height, width = self.pixels.shape[:2]
        return height, width

    @cached_property
    def sha256(self) -> str:
        """Of the pixels and their shape, in hex."""
        return _hash(self.pixels)

    @property
    def num_bytes(self) -> int:
        return int(self.pixels.nbytes)


@dataclass(frozen=True, eq=False)
class Clip:
    """frames in order, all of one size; times_s: seconds from the clip's start, one a frame, ascending."""

    frames: tuple[Picture, ...] = field(repr=False)
    times_s: tuple[float, ...] = field(repr=False)

    kind: MediaKind = field(default="video", init=False)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a frame."""
        return self.frames[0].size

    @cached_property
    def sha256(self) -> str:
        """Of the frames and their times, in hex."""
        told = "\n".join(
            f"{time_s!r} {frame.sha256}" for time_s, frame in zip(self.times_s, self.frames, strict=True)
        )
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        return sum(frame.num_bytes for frame in self.frames)


@dataclass(frozen=True, eq=False)
class Sound:
    """samples [n] float32 in [-1, 1], one channel; rate: samples a second."""

    samples: np.ndarray = field(repr=False)
    rate: int

    kind: MediaKind = field(default="audio", init=False)

    @cached_property
    def sha256(self) -> str:
        """Of the samples and their rate, in hex."""
        return _hash(self.samples, str(self.rate))

    @property
    def num_bytes(self) -> int:
        return int(self.samples.nbytes)


Content = Picture | Clip | Sound


def _hash(array: np.ndarray, *more: str) -> str:
    told = hashlib.sha256(repr((array.shape, array.dtype.str, more)).encode())
    told.update(np.ascontiguousarray(array).data)
    return told.hexdigest()
