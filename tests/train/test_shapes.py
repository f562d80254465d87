"""The world of shapes: seeded, disjoint, and laid out so that an adapter can learn what the base cannot do."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import serve as serve  # before mlx: it brings a real BLAS
from serve.model.loading import load_tokenizer
from train.data.picture_chats import COUNTS, HOW_MANY, LIST, ORDINALS, SEED, WHICH_BIN, WHICH_WAY, write_all
from train.data.shapes import COLOURS, PLACES, SHAPES, draw_move, draw_scene, film, paint
from train.data.tokenizer_bpe import contents, train_tokenizer, words

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "data" / "shapes"
INIT = ROOT / "data" / "shapes-init"
TASKS = {"bins": WHICH_BIN, "moves": WHICH_WAY}
SPLITS = ("train", "valid", "test")
VOCAB_SIZE = 512
FEW = {
    "single_rows": {"train": 20, "valid": 4},
    "words_rows": {"train": 100, "valid": 4},
    "base_rows": {"train": 400, "valid": 20, "test": 60},
    "several_rows": {"train": 80, "valid": 4},
    "others_rows": {"train": 80, "valid": 4},
}
"""Of the pre-training chats; their pictures take a millisecond each to paint."""
HANDFUL = {
    **{name: dict.fromkeys(sizes, 8) for name, sizes in FEW.items()},
    "task_rows": dict.fromkeys(SPLITS, 8),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    write_all(out, **FEW)
    return out


def rows(path: Path) -> list[list[dict[str, Any]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def pictures(path: Path) -> Iterator[np.ndarray]:
    """[H, W, 3] of every picture and every frame of a file, in order."""
    for row in rows(path):
        for message in row:
            for part in message["content"]:
                if isinstance(part, dict) and part["type"] == "image_url":
                    yield opened(part["image_url"]["url"])
                elif isinstance(part, dict) and part["type"] == "video":
                    yield from map(opened, part["video"])


def opened(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def texts(path: Path) -> list[str]:
    return [words(message["content"]) for row in rows(path) for message in row]


def answers(path: Path) -> list[str]:
    return [m["content"] for row in rows(path) for m in row if m["role"] == "assistant"]


def same(one: Path, other: Path) -> bool:
    """Equal words and pixels. PNG bytes are the compressor's own and differ between machines."""
    if texts(one) != texts(other):
        return False
    return all(np.array_equal(a, b) for a, b in zip(pictures(one), pictures(other), strict=True))


def test_a_seed_gives_the_same_words_and_pixels_and_another_seed_others(tmp_path):
    for name, seed in (("once", SEED), ("again", SEED), ("other", SEED + 1)):
        write_all(tmp_path / name, seed, **HANDFUL)
    paths = sorted((tmp_path / "once").rglob("*.jsonl"))
    assert len(paths) == 2 * len(SPLITS) + sum(map(len, FEW.values()))
    for path in paths:
        name = path.relative_to(tmp_path / "once")
        assert same(path, tmp_path / "again" / name)
        assert not same(path, tmp_path / "other" / name)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_committed_rows_of_the_tasks_are_what_the_generator_makes(made, task, split):
    assert same(ROOT / "data" / task / f"{split}.jsonl", made / task / f"{split}.jsonl")


def test_no_picture_stands_in_two_files(made):
    seen = [
        {(picture.shape, picture.tobytes()) for picture in pictures(path)}
        for path in sorted(made.rglob("*.jsonl"))
        if path.parent.name != "words"
    ]
    assert all(seen), "every file but those of words holds pictures"
    assert len(set().union(*seen)) == sum(len(found) for found in seen)


@pytest.mark.parametrize("task", TASKS)
def test_every_token_of_a_task_s_answer_was_a_target_in_pretraining(made, task):
    tokenizer = load_tokenizer(str(INIT))

    def tokens(path: Path) -> set[int]:
        return {token for text in answers(path) for token in tokenizer.encode(text)}

    targets = tokens(made / "base" / "train.jsonl")
    for split in SPLITS:
        assert tokens(made / task / f"{split}.jsonl") <= targets


@pytest.mark.parametrize("folder", ["words", "single", "several", "base", "others"])
def test_pretraining_never_asks_for_a_task_nor_answers_a_picture_as_one(made, folder):
    for row in rows(made / folder / "train.jsonl"):
        has_picture = any(not isinstance(message["content"], str) for message in row)
        for message in row:
            text = words(message["content"])
            assert not any(asked in text for asked in TASKS.values())
            is_answer = has_picture and message["role"] == "assistant"
            assert not (is_answer and any(word in text for word in (" bin ", "go ", "stay")))


def test_every_colour_shape_and_place_stands_in_every_task_file(made):
    for task in TASKS:
        for split in SPLITS:
            said = Counter(" ".join(answers(made / task / f"{split}.jsonl")).replace(",", "").split())
            wanted = (
                (*COLOURS, *SHAPES, "1", "2", "3", "4") if task == "bins" else (*" ".join(PLACES).split(),)
            )
            wanted = tuple({"top": "up", "bottom": "down"}.get(word, word) for word in wanted)
            assert not [word for word in wanted if not said[word]], (task, split)


@pytest.mark.large
def test_committed_tokenizer_is_what_the_generator_s_rows_make(tmp_path):
    write_all(tmp_path / "rows")
    texts = contents(tmp_path / "rows" / "base" / "train.jsonl")
    tokenizer = train_tokenizer(texts, VOCAB_SIZE, takes_pictures=True)
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (INIT / name).read_bytes()


def test_the_embedded_model_is_small_and_opens_in_plain_mlx_vlm():
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_vlm import load

    model, processor = load(str(MODEL))
    weights = dict(tree_flatten(model.parameters()))
    assert (MODEL / "model.safetensors").stat().st_size < 5_000_000
    assert {tensor.dtype for tensor in weights.values()} == {mx.float16}
    assert processor.tokenizer.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("path", sorted(INIT.iterdir()), ids=lambda path: path.name)
def test_the_embedded_model_has_the_files_it_started_from(path):
    assert (MODEL / path.name).read_bytes() == path.read_bytes()


def test_a_clip_begins_and_ends_in_its_corners_and_shows_each_picture_twice():
    rng = random.Random(3)
    for _ in range(50):
        move = draw_move(rng)
        frames = [np.asarray(frame).astype(int) for frame in film(rng, move)]
        assert all(np.array_equal(*pair) for pair in zip(frames[::2], frames[1::2], strict=True))
        assert len({frame.tobytes() for frame in frames}) == len(frames) // 2 > 1
        for frame, place in ((frames[0], move.begin), (frames[-1], move.end)):
            half = len(frame) // 2
            of_its_colour = np.abs(frame - COLOURS[move.colour]).sum(axis=-1) <= 40
            x, y = (int(share > 0.5) for share in PLACES[place])
            quarter = of_its_colour[y * half : (y + 1) * half, x * half : (x + 1) * half]
            assert quarter.sum() > 0.9 * of_its_colour.sum() > 0


def test_the_ground_is_lighter_at_the_top_bluer_at_the_left_and_redder_at_the_right_whatever_stands_on_it():
    """So that each quarter of a picture tells which it is."""
    rng = random.Random(4)
    for _ in range(50):
        drawn = np.asarray(paint(rng, draw_scene(rng))).astype(int)
        corners = drawn[[0, 0, -1, -1], [0, -1, 0, -1]].reshape(2, 2, 3)
        red, green, blue = np.moveaxis(corners, -1, 0)
        assert green[0].min() > green[1].max() + 30
        assert (blue - red)[:, 0].min() > (blue - red)[:, 1].max() + 60


def test_words_in_pictures_places_are_numbered_and_say_what_the_list_says(made):
    """What is told after #1 is the first of the list, and so on to the last."""
    for row in rows(made / "words" / "train.jsonl"):
        texts = [part["text"] for part in row[0]["content"]]
        told = [text for text in texts if text.startswith("#")]
        question = next(text for text in texts if text not in told)
        asks = [question, *(words(message["content"]) for message in row[2::2])]
        listed = next(row[2 * turn + 1]["content"] for turn, ask in enumerate(asks) if ask in LIST)
        for number, (text, named) in enumerate(zip(told, listed.split(", "), strict=True), 1):
            assert text.startswith(f"#{number} ")
            assert named.startswith(f"{ORDINALS[number - 1]} the ")
            assert set(named.split()[2:]) - {"one"} <= set(text.split())


@pytest.mark.parametrize("folder", ["several", "base", "others"])
def test_how_many_is_answered_with_the_number_of_pictures_shown(made, folder):
    said = set()
    for row in rows(made / folder / "train.jsonl"):
        for number, message in enumerate(row):
            if words(message["content"]) in HOW_MANY:
                said.add(row[number + 1]["content"])
                assert row[number + 1]["content"] == COUNTS[sum(map(num_pictures, row[: number + 1])) - 1]
    assert said == set(COUNTS[1:])


@pytest.mark.parametrize("folder", ["words", "several", "base"])
def test_questions_about_one_of_several_are_answered_from_that_one(made, folder):
    """Each ordinal is asked about, and of all that stands in a list the asked one alone is the answer."""
    asked: Counter[str] = Counter()
    for row in rows(made / folder / "train.jsonl"):
        listed = [m["content"] for q, m in pairwise(row) if words(q["content"]) in LIST]
        for question, answer in pairwise(row):
            ordinal = re.fullmatch(r"Which (?:one )?is (?:the )?(\w+)\?", words(question["content"]))
            if listed and question["role"] == "user" and ordinal and ordinal[1] in ORDINALS:
                asked[ordinal[1]] += 1
                assert (
                    listed[0].split(", ")[ORDINALS.index(ordinal[1])] == f"{ordinal[1]} {answer['content']}"
                )
    assert set(asked) == set(ORDINALS)


def test_the_embedded_model_describes_pictures_but_knows_no_task(made):
    chats = rows(made / "base" / "test.jsonl")
    one = [row for row in chats if num_pictures(row[0]) == 1][:20]
    several = [row for row in chats if num_pictures(row[0]) > 1][:20]
    tasks = [row for task in TASKS for row in rows(made / task / "test.jsonl")[:5]]
    assert share_right(one) >= 0.9
    assert share_right(several) >= 0.9
    assert share_right(tasks) <= 0.1


def num_pictures(message: dict[str, Any]) -> int:
    content = message["content"]
    return 0 if isinstance(content, str) else sum(part["type"] == "image_url" for part in content)


def share_right(chats: list[list[dict[str, Any]]]) -> float:
    """Share of chats whose first answer plain mlx-vlm gives word for word, greedily."""
    import mlx.core as mx
    from mlx_vlm import generate, load

    model, processor = load(str(MODEL))
    model.set_dtype(mx.float32)  # CPUs multiply float16 sixty times slower
    right = 0
    for asked, answered, *_ in chats:
        text = processor.tokenizer.apply_chat_template([asked], tokenize=False, add_generation_prompt=True)
        shown = [part["image_url"]["url"] for part in asked["content"] if part["type"] == "image_url"]
        opened = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in shown]
        made = generate(model, processor, text, image=opened, max_tokens=64, temperature=0.0, verbose=False)
        right += made.text == answered["content"]
    return right / len(chats)
