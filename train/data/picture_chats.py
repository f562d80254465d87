"""Seeded chats about pictures of shapes: a number in, JSONL folders out, the same pixels and words each time.

`words/`, `single/`, `several/`, `base/` and `others/` hold what the embedded vision model is pre-trained on in three
stages, `bins/` and `moves/` the tasks left for adapters to learn. Pictures and the frames of clips stand in the
rows as data URIs, as clients send them. Run as `python -m train.data.picture_chats OUT`. It knows nothing of
tokenizers, templates or models.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from train.data.shapes import (
    COLOURS,
    PLACES,
    SHAPES,
    Move,
    Scene,
    data_uri,
    draw_move,
    draw_scene,
    film,
    paint,
)
from train.data.tickets import write_rows
from train.data.tokenizer_bpe import words

SEED = 11
SINGLE_ROWS = {"train": 4800, "valid": 60}
WORDS_ROWS = {"train": 12000, "valid": 100}
SEVERAL_ROWS = {"train": 3200, "valid": 60}
OTHERS_ROWS = {"train": 2400, "valid": 60}
BASE_ROWS = {"train": 6400, "valid": 100, "test": 300}
TASK_ROWS = {"train": 240, "valid": 50, "test": 100}
ORDINALS = ("first", "second", "third", "fourth", "fifth")
COUNTS = ("one", "two", "three", "four", "five")
SHARE_PLAIN = 0.12
SHARE_PLAIN_OF_SEVERAL = 0.25
SHARE_SENTENCES = 0.4
"""Of scenes told in words."""
MANY = (2, 3, 3, 4, 5)
"""How many pictures a chat about several shows."""

Part = dict[str, Any]
Message = dict[str, Any]
Row = dict[str, list[Message]]
Answer = Callable[[Scene], str]
Numbered = tuple[tuple[str, ...], Answer]
"""Ways to ask about one of several, with a place for its ordinal, and the answer."""


def describe(scene: Scene) -> str:
    if scene.shape is None:
        return f"all {scene.colour}"
    article = "an" if scene.colour[0] in "aeiou" else "a"
    return f"{article} {scene.colour} {scene.shape} at the {scene.place}"


def name(scene: Scene) -> str:
    return f"the {scene.colour} {scene.shape or 'one'}"


def describe_clip(move: Move) -> str:
    article = "an" if move.colour[0] in "aeiou" else "a"
    return f"{article} {move.colour} {move.shape} from the {move.begin} to the {move.end}"


def list_all(scenes: Sequence[Scene]) -> str:
    return ", ".join(f"{ordinal} {name(scene)}" for ordinal, scene in zip(ORDINALS, scenes, strict=False))


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

# The same about one of several; {n} is an ordinal.
NUMBERED: tuple[Numbered, ...] = (
    (
        ("What colour is the {n} picture?", "Which colour is the {n}?", "What colour is the {n}?"),
        QUESTIONS[0][1],
    ),
    (("Which shape is in the {n} picture?", "What shape is the {n}?"), QUESTIONS[1][1]),
    (("Where is the shape in the {n} picture?", "Where is the {n}?"), QUESTIONS[2][1]),
    (("Describe the {n} picture.", "What is in the {n} picture?", "Describe the {n}."), describe),
    (("Which is {n}?", "Which is the {n}?", "Which one is {n}?"), name),
)

OF_PLACES = (*NUMBERED, *NUMBERED[2:4])
"""The same, with places asked about twice as often: they are what is learned last."""

# About all of them, in order.
LIST = ("List the pictures.", "List them.", "What is in the pictures?", "Which pictures do you see?")
HOW_MANY = ("How many pictures?", "How many pictures are there?")

# About a clip.
CLIP_QUESTIONS: tuple[tuple[tuple[str, ...], Callable[[Move], str]], ...] = (
    (QUESTIONS[0][0], lambda move: move.colour),
    (QUESTIONS[1][0], lambda move: move.shape),
    (("Where does it begin?", "Where does it come from?"), lambda move: move.begin),
    (("Where does it end?", "Where does it go to?"), lambda move: move.end),
)
DESCRIBE_CLIP = ("Describe the clip.", "What happens?", "What happens in the clip?", "Describe it.")

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
    words_rows: Mapping[str, int] = WORDS_ROWS,
    base_rows: Mapping[str, int] = BASE_ROWS,
    several_rows: Mapping[str, int] = SEVERAL_ROWS,
    others_rows: Mapping[str, int] = OTHERS_ROWS,
    task_rows: Mapping[str, int] = TASK_ROWS,
) -> None:
    """Write a folder each task and each stage's rows under `out`, a file each split; no picture is shared."""
    seen: set[str] = set()
    tasks = {
        "bins": (task_rows, bins_row),
        "moves": (task_rows, moves_row),
        "single": (single_rows, single_row),
        "words": (words_rows, words_row),
        "base": (base_rows, base_row),
        "several": (several_rows, several_row),
        "others": (others_rows, others_row),
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

    def clip(self) -> tuple[Move, Part]:
        """A new clip: what moves in it, and the part that carries its frames."""
        while True:
            move = draw_move(self.rng)
            uris = [data_uri(frame) for frame in film(self.rng, move)]
            if not self.seen & set(uris):
                self.seen |= set(uris)
                return move, {"type": "video", "video": uris}


class Told:
    """Tells in words what an album would show: one chat's scenes, numbered as the chat template numbers pictures.

    Words in any order make a reader look for what a word means, not where it stands, as in a picture's tokens.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self._number = 0

    def page(self, share_plain: float = SHARE_PLAIN) -> tuple[Scene, Part]:
        """A scene, and the part that tells it: as a sentence, or as words in any order."""
        scene = draw_scene(self.rng, share_plain)
        said = [word for word in (scene.colour, scene.shape, scene.place) if word]
        self.rng.shuffle(said)
        text = describe(scene) if self.rng.random() < SHARE_SENTENCES else " ".join(said)
        self._number += 1
        return scene, {"type": "text", "text": f"#{self._number} {text}"}


def asked(text: str, *pictures: Part, is_first: bool = False) -> Message:
    """A user's turn: pictures, then the text; or the text first."""
    if not pictures:
        return {"role": "user", "content": text}
    said = {"type": "text", "text": text}
    return {"role": "user", "content": [said, *pictures] if is_first else [*pictures, said]}


def answered(text: str) -> Message:
    return {"role": "assistant", "content": text}


def bins_row(album: Album) -> Row:
    scene, picture = album.page(share_plain=0.0)
    return {"messages": [asked(WHICH_BIN, picture), answered(sort(scene))]}


def moves_row(album: Album) -> Row:
    scene, picture = album.page(share_plain=0.0)
    return {"messages": [asked(WHICH_WAY, picture), answered(move(scene))]}


def single_row(album: Album) -> Row:
    """One chat of the first stage of pre-training, in which the tower learns to see: of a chat about one picture its
    description alone, so that there is little but the picture to read."""
    messages = one_picture(album)
    picture = next(part for part in messages[0]["content"] if part["type"] != "text")
    question, description = next(
        (asks["content"], answer["content"])
        for asks, answer in pairwise(messages)
        if words(asks["content"]) in DESCRIBE
    )
    return {"messages": [asked(words(question), picture), answered(description)]}


def words_row(album: Album) -> Row:
    """One chat of the first stage: as `several_row`, with words in the pictures' places. What is learned here, at
    little cost, is to find the second of several things; the stages after it show pictures where the words were."""
    return {"messages": several_at_once(Told(album.rng))}


def several_row(album: Album) -> Row:
    """One chat of the stages after it about several pictures, of which the last one's mixture has too few."""
    return {"messages": several_at_once(album, OF_PLACES)}


def others_row(album: Album) -> Row:
    """One chat of the last stage of the kinds that are learned last, of which its mixture has too few as well."""
    draw = album.rng.choices((counted, one_a_turn, one_clip, talk), weights=(20, 15, 35, 30))[0]
    return {"messages": draw(album)}


def base_row(album: Album) -> Row:
    """One chat of the last stage's mixture."""
    kinds = (one_picture, several_at_once, one_a_turn, one_clip, talk)
    draw = album.rng.choices(kinds, weights=(20, 36, 18, 12, 14))[0]
    return {"messages": draw(album)}


def one_picture(album: Album) -> list[Message]:
    """Two questions about one picture, then its description; the picture comes with the first."""
    rng = album.rng
    scene, picture = album.page()
    turns = [(rng.choice(asks), answer(scene)) for asks, answer in rng.sample(QUESTIONS, k=2)]
    turns.insert(rng.choice((0, 2, 2, 2)), (rng.choice(DESCRIBE), describe(scene)))
    return chat(rng, turns, [picture])


def one_clip(album: Album) -> list[Message]:
    """Two questions about a clip, and what happens in it."""
    rng = album.rng
    moved, clip = album.clip()
    turns = [(rng.choice(asks), answer(moved)) for asks, answer in rng.sample(CLIP_QUESTIONS, k=2)]
    turns.insert(rng.choice((0, 2)), (rng.choice(DESCRIBE_CLIP), describe_clip(moved)))
    return chat(rng, turns, [clip])


def several_at_once(album: Album | Told, of_one: Sequence[Numbered] = NUMBERED) -> list[Message]:
    """Two to five pictures in one message, all of them listed, and four questions about one or another."""
    rng = album.rng
    pages = [album.page(SHARE_PLAIN_OF_SEVERAL) for _ in range(rng.choice(MANY))]
    scenes = [scene for scene, _ in pages]
    turns = [numbered_question(rng, scenes, of_one) for _ in range(4)]
    turns.insert(rng.randint(0, 4), (rng.choice(LIST), list_all(scenes)))
    return chat(rng, turns, [picture for _, picture in pages])


def chat(rng: random.Random, turns: Sequence[tuple[str, str]], shown: Sequence[Part]) -> list[Message]:
    """Questions and answers, with what they are about in the first of them."""
    messages = []
    for number, (question, answer) in enumerate(turns):
        parts = shown if number == 0 else []
        messages += [asked(question, *parts, is_first=rng.random() < 0.25), answered(answer)]
    return messages


def one_a_turn(album: Album) -> list[Message]:
    """Two to five pictures, each with a question of its own, then three questions about one or another."""
    rng = album.rng
    messages, scenes = [], []
    for _ in range(rng.choice(MANY)):
        scene, picture = album.page(SHARE_PLAIN_OF_SEVERAL)
        scenes.append(scene)
        asks, answer = rng.choice((*QUESTIONS, (DESCRIBE, describe)))
        messages += chat(rng, [(rng.choice(asks), answer(scene))], [picture])
    turns = [numbered_question(rng, scenes) for _ in range(3)]
    if rng.random() < 0.5:
        turns.append((rng.choice(LIST), list_all(scenes)))
    return messages + chat(rng, turns, [])


def counted(album: Album) -> list[Message]:
    """Two to five pictures, at once or one a turn, and how many they are."""
    rng = album.rng
    messages = rng.choice((several_at_once, one_a_turn))(album)
    contents = [message["content"] for message in messages]
    number = sum(
        part["type"] == "image_url" for parts in contents if isinstance(parts, list) for part in parts
    )
    return [*messages, asked(rng.choice(HOW_MANY)), answered(COUNTS[number - 1])]


def numbered_question(
    rng: random.Random, scenes: list[Scene], of_one: Sequence[Numbered] = NUMBERED
) -> tuple[str, str]:
    if rng.random() < 0.05:
        return rng.choice(HOW_MANY), COUNTS[len(scenes) - 1]
    number = rng.randrange(len(scenes))
    asks, answer = rng.choice(of_one)
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
    parser.add_argument("out", type=Path, help="folder to write its folders into")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    write_all(arguments.out, arguments.seed)


if __name__ == "__main__":
    main()
