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
    "blue": (45, 90, 235),
    "yellow": (240, 215, 35),
    "orange": (245, 135, 20),
    "purple": (150, 60, 190),
    "pink": (250, 150, 195),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {
    "top left": (0.25, 0.25),
    "top right": (0.75, 0.25),
    "bottom left": (0.25, 0.75),
    "bottom right": (0.75, 0.75),
}
"""Name -> centre, as shares of width and height."""

SIZES = (56, 64, 84, 112, 128)
"""Edges in pixels; the model's processor makes 56 x 56 of each."""
FINER = 3
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
    """The scene on a dark ground, with its colour, place and size varied a little; a square RGB picture."""
    edge = rng.choice(SIZES)
    colour = _near(rng, COLOURS[scene.colour], 12)
    if scene.shape is None or scene.place is None:
        return Image.new("RGB", (edge, edge), colour)
    grey = rng.randint(20, 60)
    fine = edge * FINER
    picture = Image.new("RGB", (fine, fine), _near(rng, (grey, grey, grey), 8))
    x, y = PLACES[scene.place]
    centre = ((x + rng.uniform(-0.03, 0.03)) * fine, (y + rng.uniform(-0.03, 0.03)) * fine)
    _shape(ImageDraw.Draw(picture), scene.shape, centre, rng.uniform(0.18, 0.22) * fine, colour)
    return picture.resize((edge, edge), Image.Resampling.BOX)


def _near(rng: random.Random, colour: Rgb, spread: int) -> Rgb:
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in colour)
    return red, green, blue


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
