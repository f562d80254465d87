"""Rows with a picture each, a question about it and an answer, as visual instruction sets have them; no network.

Pictures differ in size and shape; words have lognormal lengths. Each picture is asked about by several rows. The same
seed gives the same rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from serve.bench.prompts import WORDS
from train.bench.chats import ANSWER_SHARE, Lengths

CELL = 28
"""Sides are so many times this, so that no processor rounds them."""


@dataclass(frozen=True)
class Pictures:
    """What the rows show and say.

    sides             a picture's width and height, each drawn evenly from this range, in cells of 28 pixels
    rows_per_picture  questions asked about one
    words             of a row, question and answer together
    """

    sides: tuple[int, int] = (4, 12)
    rows_per_picture: int = 2
    words: Lengths = field(default_factory=lambda: Lengths(median=40.0, sigma=0.6, longest=160))


def write_rows(file: Path, count: int, asked: Pictures, seed: int = 0) -> None:
    """`count` rows of {"messages": …} into `file`, in a shuffled order; their pictures into a folder beside it."""
    rng = np.random.default_rng(seed)
    folder = file.parent / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in range(-(-count // asked.rows_per_picture)):
        names.append(f"{number:05}.png")
        Image.fromarray(_picture(rng, asked.sides)).save(folder / names[-1])
    shown = rng.permutation(np.repeat(np.arange(len(names)), asked.rows_per_picture)[:count])
    rows = [
        _row(rng, f"{folder.name}/{names[number]}", int(num_words))
        for number, num_words in zip(shown, asked.words.draw(count, rng), strict=True)
    ]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


def _picture(rng: np.random.Generator, sides: tuple[int, int]) -> np.ndarray:
    """[H, W, 3] uint8: blocks of colour with grain, so that neither PNG nor tower finds it empty."""
    height, width = rng.integers(sides[0], sides[1] + 1, 2)
    blocks = rng.integers(0, 224, (height, width, 3), dtype=np.uint8).repeat(CELL, 0).repeat(CELL, 1)
    return blocks + rng.integers(0, 32, blocks.shape, dtype=np.uint8)


def _row(rng: np.random.Generator, picture: str, num_words: int) -> list[dict]:
    num_answer = max(round(num_words * rng.uniform(*ANSWER_SHARE)), 1)
    question = [
        {"type": "image", "image": picture},
        {"type": "text", "text": _text(rng, num_words - num_answer)},
    ]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(rng, num_answer)},
    ]


def _text(rng: np.random.Generator, num_words: int) -> str:
    return " ".join(rng.choice(WORDS, max(num_words, 1)))
