"""Laws of boxes and points: they follow their picture, whatever they are written in, and nothing else moves."""

from __future__ import annotations

import json
import random
import re

import pytest

from train.data.coordinates import Coordinates, Picture

TAGS, KEYS = ("box", "point"), ("bbox_2d", "point_2d")
HALF = Picture(stored=(200, 400), seen=(100, 200))


def of(rows: str, model: str) -> Coordinates:
    return Coordinates(rows, model, KEYS, TAGS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<box>(40,20),(400,200)</box>", "<box>(20,10),(200,100)</box>"),
        ("a<|box_start|>(40,20),(80,100)<|box_end|>b", "a<|box_start|>(20,10),(40,50)<|box_end|>b"),
        ('[{"bbox_2d": [40, 20, 80, 100], "label": "40"}]', '[{"bbox_2d": [20, 10, 40, 50], "label": "40"}]'),
        ('{"point_2d": [[40, 20], [80, 100]]}', '{"point_2d": [[20, 10], [40, 50]]}'),
        ("<point>40 20</point> of 40", "<point>20 10</point> of 40"),
        ("bbox_2d: [40, 20] and (40,20)", "bbox_2d: [40, 20] and (40,20)"),
    ],
)
def test_coordinates_follow_wherever_they_are_known_to_stand(text, expected):
    assert of("pixels", "pixels").adjusted(text, HALF) == expected


def test_units_are_shares_of_the_stored_picture_whatever_its_new_size():
    text = "<box>(100,50),(400,200)</box>"
    assert of("pixels", "thousandths").adjusted(text, HALF) == "<box>(250,250),(1000,1000)</box>"
    assert of("pixels", "fractions").adjusted(text, HALF) == "<box>(0.2500,0.2500),(1.0000,1.0000)</box>"
    assert of("fractions", "pixels").adjusted("<box>(0.25,0.25)</box>", HALF) == "<box>(50,25)</box>"
    assert of("thousandths", "pixels").adjusted("<point>500, 500</point>", HALF) == "<point>100, 50</point>"


def test_a_picture_of_its_own_size_leaves_its_boxes():
    rng = random.Random(0)
    for _ in range(50):
        height, width = rng.randint(20, 2000), rng.randint(20, 2000)
        box = [rng.randint(0, width), rng.randint(0, height), rng.randint(0, width), rng.randint(0, height)]
        text = json.dumps({"bbox_2d": box})
        assert of("pixels", "pixels").adjusted(text, Picture((height, width), (height, width))) == text


def test_boxes_drawn_on_the_stored_and_on_the_new_picture_cover_the_same_share():
    rng = random.Random(1)
    for _ in range(50):
        stored = (rng.randint(200, 2000), rng.randint(200, 2000))
        seen = (28 * rng.randint(8, 40), 28 * rng.randint(8, 40))
        x, y = rng.randint(0, stored[1]), rng.randint(0, stored[0])
        moved = of("pixels", "pixels").adjusted(f"<point>{x},{y}</point>", Picture(stored, seen))
        new_x, new_y = map(int, re.findall(r"\d+", moved))
        assert new_x / seen[1] == pytest.approx(x / stored[1], abs=1 / seen[1])
        assert new_y / seen[0] == pytest.approx(y / stored[0], abs=1 / seen[0])


def test_a_coordinate_outside_of_its_picture_is_named():
    with pytest.raises(ValueError, match="found the coordinate 401, outside of a picture of 400x200"):
        of("pixels", "pixels").adjusted("<box>(401,20)</box>", HALF)
