"""The small world of shapes: `Scene`, what one picture shows, `Move`, what a clip does, and how they are drawn.

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
RADII = (0.18, 0.22)
"""Of shapes, as shares of the edge."""
FILM_STEPS = (2, 3, 4)
"""Pictures of a clip, each of them two frames."""
FINER = 3
"""Pixels are drawn so many times finer, then averaged: soft edges."""
LIGHTER, TINTED = 55, 60
"""By how much, of 255, the ground is lighter at the top, and bluer at the left and redder at the right. The model's
tower knows only how far pieces of a picture are from each other; the ground tells which corner each is in."""

Rgb = tuple[int, int, int]
Corners = tuple[Rgb, Rgb, Rgb, Rgb]
"""The ground's colours at top left, top right, bottom left and bottom right."""


@dataclass(frozen=True)
class Scene:
    """One shape of one colour in one quarter of a picture; without shape and place the colour fills all of it."""

    colour: str
    shape: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Move:
    """One shape of one colour that goes from one quarter of the picture to another."""

    colour: str
    shape: str
    begin: str
    end: str


def draw_move(rng: random.Random) -> Move:
    begin, end = rng.sample(list(PLACES), 2)
    return Move(rng.choice(list(COLOURS)), rng.choice(SHAPES), begin, end)


def draw_scene(rng: random.Random, share_plain: float = 0.0) -> Scene:
    """A random scene; so large a share of them is one colour all over."""
    colour = rng.choice(list(COLOURS))
    if rng.random() < share_plain:
        return Scene(colour)
    return Scene(colour, rng.choice(SHAPES), rng.choice(list(PLACES)))


def paint(rng: random.Random, scene: Scene) -> Image.Image:
    """The scene on a dark, shaded ground, with its colour, place and size varied a little; a square RGB picture."""
    edge = rng.choice(SIZES)
    colour = _near(rng, COLOURS[scene.colour], 12)
    if scene.shape is None or scene.place is None:
        return Image.new("RGB", (edge, edge), colour)
    ground = _ground(rng)
    return _draw(edge, ground, scene.shape, _centre(rng, scene.place), rng.uniform(*RADII), colour)


def film(rng: random.Random, move: Move) -> list[Image.Image]:
    """The move as frames, two of each picture, as the tower takes them: it begins and ends in its corners."""
    edge = rng.choice(SIZES)
    colour = _near(rng, COLOURS[move.colour], 12)
    ground, radius = _ground(rng), rng.uniform(*RADII)
    begin, end = _centre(rng, move.begin), _centre(rng, move.end)
    steps = rng.choice(FILM_STEPS)
    frames = []
    for step in range(steps):
        share = step / (steps - 1)
        centre = (begin[0] + (end[0] - begin[0]) * share, begin[1] + (end[1] - begin[1]) * share)
        frames += [_draw(edge, ground, move.shape, centre, radius, colour)] * 2
    return frames


def _ground(rng: random.Random) -> Corners:
    grey = rng.randint(20, 60) // 2
    red, green, blue = _near(rng, (grey, grey, grey), 8)
    top_left, top_right, bottom_left, bottom_right = (
        (red + light + right, green + light, blue + light + left)
        for light in (LIGHTER, 0)
        for left, right in ((TINTED, 0), (0, TINTED))
    )
    return top_left, top_right, bottom_left, bottom_right


def _centre(rng: random.Random, place: str) -> tuple[float, float]:
    x, y = PLACES[place]
    return x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03)


def _draw(
    edge: int, ground: Corners, shape: str, centre: tuple[float, float], radius: float, colour: Rgb
) -> Image.Image:
    """`centre` and `radius` as shares of the edge."""
    fine = edge * FINER
    corners = Image.new("RGB", (2, 2))
    corners.putdata(ground)
    picture = corners.resize((fine, fine), Image.Resampling.BILINEAR)
    x, y = centre
    _shape(ImageDraw.Draw(picture), shape, (x * fine, y * fine), radius * fine, colour)
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
