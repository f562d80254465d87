"""The small world of shapes: `Scene`, what one picture shows, and how it is drawn.

Equal generators in equal states give equal pixels. It knows nothing of chats or files.
"""

from __future__ import annotations

import base64
import io
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 35, 35),
    "green": (35, 160, 60),
    "blue": (40, 75, 220),
    "yellow": (240, 215, 35),
    "orange": (245, 135, 20),
    "purple": (140, 50, 170),
    "black": (12, 12, 12),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {
    "top left": (0.28, 0.28),
    "top right": (0.72, 0.28),
    "bottom left": (0.28, 0.72),
    "bottom right": (0.72, 0.72),
}
"""Name -> centre, as shares of width and height."""

SIZES = ((56, 56), (64, 64), (84, 84), (96, 72), (72, 96), (112, 112), (128, 96))
"""Width and height in pixels; the model's processor makes 56 x 56 of each."""
FINER = 4
"""Pixels are drawn so many times finer, then averaged: soft edges."""

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """One shape of one colour in one quarter of a picture; without shape and place the colour fills all of it."""

    colour: str
    shape: str | None = None
    place: str | None = None


def draw_scene(rng: random.Random, share_plain: float = 0.0) -> Scene:
    """A random scene; so large a share of them is one colour all over."""
    colour = rng.choice(list(COLOURS))
    if rng.random() < share_plain:
        return Scene(colour)
    return Scene(colour, rng.choice(SHAPES), rng.choice(list(PLACES)))


def paint(rng: random.Random, scene: Scene) -> Image.Image:
    """The scene with its colour, place, size and background varied a little; an RGB picture of one of SIZES."""
    width, height = rng.choice(SIZES)
    colour = _near(rng, COLOURS[scene.colour], 12)
    if scene.shape is None or scene.place is None:
        return Image.new("RGB", (width, height), colour)
    picture = Image.new("RGB", (width * FINER, height * FINER), _background(rng, scene.colour))
    x, y = PLACES[scene.place]
    size = min(width, height) * FINER
    centre = ((x + rng.uniform(-0.05, 0.05)) * width * FINER, (y + rng.uniform(-0.05, 0.05)) * height * FINER)
    _shape(ImageDraw.Draw(picture), scene.shape, centre, rng.uniform(0.16, 0.23) * size, colour)
    return picture.resize((width, height), Image.Resampling.BOX)


def _near(rng: random.Random, colour: Rgb, spread: int) -> Rgb:
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in colour)
    return red, green, blue


def _background(rng: random.Random, colour: str) -> Rgb:
    """A grey, a little tinted, on which the colour is seen."""
    dark, light = (45, 85), (165, 215)
    low, high = {"black": light, "white": dark}.get(colour) or rng.choice((dark, light))
    grey = rng.randint(low, high)
    return _near(rng, (grey, grey, grey), 8)


def _shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], radius: float, colour: Rgb
) -> None:
    x, y = centre
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    elif shape == "square":
        half = radius * 0.88
        draw.rectangle((x - half, y - half, x + half, y + half), colour)
    elif shape == "triangle":
        half = radius * math.sqrt(3) / 2 * 1.15
        draw.polygon(
            [(x, y - radius * 1.1), (x - half, y + radius * 0.75), (x + half, y + radius * 0.75)], colour
        )
    else:
        thick = radius * 0.34
        draw.rectangle((x - radius, y - thick, x + radius, y + thick), colour)
        draw.rectangle((x - thick, y - radius, x + thick, y + radius), colour)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def data_uri(picture: Image.Image) -> str:
    """The picture as a PNG inside a URL, as chats carry it."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode("ascii")
