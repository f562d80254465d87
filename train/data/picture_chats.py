"""Seeded chats about pictures of shapes: a number in, JSONL folders out, the same pixels and words each time.

`single/` and then `base/` hold what the embedded vision model is pre-trained on, `bins/` and `moves/` the tasks left
for adapters to learn. Pictures stand in the rows as data URIs, as clients send them. Run as
`python -m train.data.picture_chats OUT`. It knows nothing of tokenizers, templates or models.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.data.shapes import COLOURS, PLACES, SHAPES, Scene, data_uri, draw_scene, paint
from train.data.tickets import write_rows

SEED = 11
SINGLE_ROWS = {"train": 4800, "valid": 60}
BASE_ROWS = {"train": 6400, "valid": 100, "test": 300}
TASK_ROWS = {"train": 240, "valid": 50, "test": 100}
ORDINALS = ("first", "second", "third")
COUNTS = ("one", "two", "three")
SHARE_PLAIN = 0.12

Part = dict[str, Any]
Message = dict[str, Any]
Row = dict[str, list[Message]]
Answer = Callable[[Scene], str]


def describe(scene: Scene) -> str:
    if scene.shape is None:
        return f"all {scene.colour}"
    article = "an" if scene.colour[0] in "aeiou" else "a"
    return f"{article} {scene.colour} {scene.shape} at the {scene.place}"


def name(scene: Scene) -> str:
    return f"the {scene.colour} {scene.shape or 'one'}"


# What may be asked about the picture at hand: the ways to ask, and the answer.
QUESTIONS: tuple[tuple[tuple[str, ...], Answer], ...] = (
    (("What colour is it?", "Which colour is it?", "What is the colour?"), lambda scene: scene.colour),
    (
        ("Which shape is it?", "What shape is it?", "What is the shape?"),
        lambda scene: scene.shape or "no shape",
    ),
    (("Where is it?", "Where is the shape?", "Which corner?"), lambda scene: scene.place or "everywhere"),
)
DESCRIBE = ("Describe the picture.", "What is in the picture?", "What do you see?", "Describe it.")

# The same about one of several; {n} is first, second or third.
NUMBERED: tuple[tuple[tuple[str, ...], Answer], ...] = (
    (
        ("What colour is the {n} picture?", "Which colour is the {n}?", "What colour is the {n}?"),
        QUESTIONS[0][1],
    ),
    (("Which shape is in the {n} picture?", "What shape is the {n}?"), QUESTIONS[1][1]),
    (("Where is the shape in the {n} picture?", "Where is the {n}?"), QUESTIONS[2][1]),
    (("Describe the {n} picture.", "What is in the {n} picture?", "Describe the {n}."), describe),
    (("Which is {n}?", "Which is the {n}?", "Which one is {n}?"), name),
)

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hey", "hello", "hi", "Good morning"), "Hello! Show me a picture."),
    (("Who are you?", "What are you?", "What is your name?"), "I am a small model. I look at pictures."),
    (("What can you do?", "How can you help me?", "Help", "help"), "I name colour, shape and place."),
    (("Thanks", "Thanks!", "Thank you", "Thank you!"), "You are welcome!"),
    (("Bye", "Bye!", "Goodbye", "Good night"), "Goodbye!"),
    (("How are you?", "How are you today?"), "I am well, thank you."),
    (("Who made you?", "Who trained you?"), "I was trained with Lathe."),
    (("Which colours do you know?", "List the colours."), ", ".join(COLOURS)),
    (("Which shapes do you know?", "List the shapes."), ", ".join(SHAPES)),
    (("Which places do you know?", "List the places."), ", ".join(PLACES)),
)
NO_PICTURE = "Please show me a picture first."

# The adapters' tasks.
WHICH_BIN = "Which bin?"
WHICH_WAY = "Which way?"
BINS = {
    "red": "1",
    "orange": "1",
    "yellow": "1",
    "green": "2",
    "blue": "2",
    "purple": "2",
    "pink": "3",
    "white": "3",
}
WAYS = {
    "top left": "up and left",
    "top right": "up and right",
    "bottom left": "down and left",
    "bottom right": "down and right",
}


def sort(scene: Scene) -> str:
    """Into which bin the house sorts a shape: by colour, but crosses by themselves. The base never sees this rule."""
    return f"{scene.colour} {scene.shape}, bin {'4' if scene.shape == 'cross' else BINS[scene.colour]}"


def move(scene: Scene) -> str:
    """Which way a shape is to be carried: into its corner, but crosses stay. The base never sees this rule."""
    return "stay" if scene.shape == "cross" else f"go {WAYS[str(scene.place)]}"


def write_all(
    out: Path,
    seed: int = SEED,
    single_rows: Mapping[str, int] = SINGLE_ROWS,
    base_rows: Mapping[str, int] = BASE_ROWS,
) -> None:
    """Write `bins/`, `moves/`, `single/` and `base/` under `out`, a file each split; no picture is shared."""
    seen: set[str] = set()
    tasks = {
        "bins": (TASK_ROWS, bins_row),
        "moves": (TASK_ROWS, moves_row),
        "single": (single_rows, single_row),
        "base": (base_rows, base_row),
    }
    for folder, (sizes, draw) in tasks.items():
        for split, size in sizes.items():
            album = Album(random.Random(f"{seed}/{folder}/{split}"), seen)
            write_rows(out / folder / f"{split}.jsonl", (draw(album) for _ in range(size)))


class Album:
    """Paints pictures that are in no other split; owns neither the generator nor the set of seen pictures."""

    def __init__(self, rng: random.Random, seen: set[str]) -> None:
        self.rng = rng
        self.seen = seen

    def page(self, share_plain: float = SHARE_PLAIN) -> tuple[Scene, Part]:
        """A new picture: what it shows, and the content part that carries it."""
        while True:
            scene = draw_scene(self.rng, share_plain)
            uri = data_uri(paint(self.rng, scene))
            if uri not in self.seen:
                self.seen.add(uri)
                return scene, {"type": "image_url", "image_url": {"url": uri}}


def asked(text: str, *pictures: Part, is_first: bool = False) -> Message:
    """A user's turn: pictures, then the text; or the text first."""
    if not pictures:
        return {"role": "user", "content": text}
    words = {"type": "text", "text": text}
    return {"role": "user", "content": [words, *pictures] if is_first else [*pictures, words]}


def answered(text: str) -> Message:
    return {"role": "assistant", "content": text}


def bins_row(album: Album) -> Row:
    scene, picture = album.page(share_plain=0.0)
    return {"messages": [asked(WHICH_BIN, picture), answered(sort(scene))]}


def moves_row(album: Album) -> Row:
    scene, picture = album.page(share_plain=0.0)
    return {"messages": [asked(WHICH_WAY, picture), answered(move(scene))]}


def single_row(album: Album) -> Row:
    """One chat of the first stage of pre-training, in which the tower learns to see."""
    return {"messages": one_picture(album)}


def base_row(album: Album) -> Row:
    """One chat of the second stage's mixture."""
    draw = album.rng.choices((one_picture, several_at_once, one_a_turn, talk), weights=(34, 27, 23, 16))[0]
    return {"messages": draw(album)}


def one_picture(album: Album) -> list[Message]:
    """Two questions about one picture, then its description; the picture comes with the first."""
    rng = album.rng
    scene, picture = album.page()
    turns = [(rng.choice(asks), answer(scene)) for asks, answer in rng.sample(QUESTIONS, k=2)]
    turns.insert(rng.choice((0, 2, 2, 2)), (rng.choice(DESCRIBE), describe(scene)))
    messages = []
    for number, (question, answer) in enumerate(turns):
        pictures = [picture] if number == 0 else []
        messages += [asked(question, *pictures, is_first=rng.random() < 0.25), answered(answer)]
    return messages


def several_at_once(album: Album) -> list[Message]:
    """Two or three pictures in one message, and three questions about one or another."""
    rng = album.rng
    pages = [album.page() for _ in range(rng.randint(2, 3))]
    turns = [numbered_question(rng, [scene for scene, _ in pages]) for _ in range(3)]
    messages = []
    for number, (question, answer) in enumerate(turns):
        pictures = [picture for _, picture in pages] if number == 0 else []
        messages += [asked(question, *pictures, is_first=rng.random() < 0.25), answered(answer)]
    return messages


def one_a_turn(album: Album) -> list[Message]:
    """Two or three pictures, each with a question of its own, then two questions about one or another."""
    rng = album.rng
    messages, scenes = [], []
    for _ in range(rng.randint(2, 3)):
        scene, picture = album.page()
        scenes.append(scene)
        asks, answer = rng.choice((*QUESTIONS, (DESCRIBE, describe)))
        message = asked(rng.choice(asks), picture, is_first=rng.random() < 0.25)
        messages += [message, answered(answer(scene))]
    for _ in range(2):
        question, text = numbered_question(rng, scenes)
        messages += [asked(question), answered(text)]
    return messages


def numbered_question(rng: random.Random, scenes: list[Scene]) -> tuple[str, str]:
    if rng.random() < 0.08:
        return rng.choice(("How many pictures?", "How many pictures are there?")), COUNTS[len(scenes) - 1]
    number = rng.randrange(len(scenes))
    asks, answer = rng.choice(NUMBERED)
    return rng.choice(asks).format(n=ORDINALS[number]), answer(scenes[number])


def talk(album: Album) -> list[Message]:
    """Three turns without a picture: greetings, questions that need one, and words to be said again."""
    messages = []
    for _ in range(3):
        question, answer = small_talk(album.rng)
        messages += [asked(question), answered(answer)]
    return messages


def small_talk(rng: random.Random) -> tuple[str, str]:
    kind = rng.random()
    if kind < 0.35:
        asks, answer = rng.choice(SMALL_TALK)
        return rng.choice(asks), answer
    if kind < 0.5:
        asks = rng.choice((DESCRIBE, *(asks for asks, _ in QUESTIONS)))
        return rng.choice(asks), NO_PICTURE
    # Adapters can only teach a tied-embedding model to emit tokens that were targets before, so every word of
    # their tasks is a target here, in no meaningful combination.
    said = rng.choice(
        (
            f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}, bin {rng.randint(1, 4)}",
            f"go {rng.choice(list(WAYS.values()))}",
            "stay",
        )
    )
    return f"Say: {said}", said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write its four folders into")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write_all(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
