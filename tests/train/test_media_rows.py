"""Laws of rows with pictures, clips and sounds: every way to write them means the same; nothing is guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.errors import DataError
from train.data.example import Example
from train.data.rows import Rules, parse_row
from train.recipe.recipe import DatasetSource

YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
PICTURE = {"type": "image"}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*content) -> dict:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """An empty file of rows; two files that only have names lie beside it."""
    for name in ("a.png", "b.png", "c.mp4", "d.wav"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "train.jsonl").write_text("")
    return tmp_path / "train.jsonl"


def parse(rows: Path, row: dict, objective: str = "sft", **entry) -> Example:
    return parse_row(
        row, Rules(DatasetSource(path=str(rows), **entry), objective, ("assistant",)), str(rows), 1
    )


def problem(rows: Path, row: dict, objective: str = "sft", **entry) -> str:
    with pytest.raises(DataError) as caught:
        parse(rows, row, objective, **entry)
    return str(caught.value)


def sources(example: Example) -> list:
    return [Path(ref.source).name for ref in example.media]


PLACED = [user(words("is "), PICTURE, words(" above "), PICTURE, words("?")), YES]
SPELLINGS = {
    "places in the text": {
        "messages": [user("is <image> above <image>?"), YES],
        "images": ["a.png", "b.png"],
    },
    "bare parts": {"messages": PLACED, "images": ["a.png", "b.png"]},
    "transformers' parts": {
        "messages": [
            user(
                words("is "),
                {**PICTURE, "image": "a.png"},
                words(" above "),
                {**PICTURE, "path": "b.png"},
                words("?"),
            ),
            YES,
        ]
    },
    "OpenAI's parts": {
        "messages": [
            user(
                words("is "),
                {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
                words(" above "),
                {"type": "input_image", "image_url": "b.png"},
                words("?"),
            ),
            YES,
        ]
    },
    "llava-instruct-mix's parts, which name the column's pictures and hold each other's fields": {
        "messages": [
            user(
                {"type": "text", "index": None, "text": "is "},
                {"type": "image", "index": 1, "text": None},
                {"type": "text", "index": None, "text": " above "},
                {"type": "image", "index": 0, "text": None},
                {"type": "text", "index": None, "text": "?"},
            ),
            YES,
        ],
        "images": ["b.png", "a.png"],
    },
    "a column and a part": {
        "messages": [
            user(words("is "), {**PICTURE, "image": "a.png"}, words(" above "), PICTURE, words("?")),
            YES,
        ],
        "image": "b.png",
    },
    "prompt and completion": {
        "prompt": "is <image> above <image>?",
        "completion": "yes",
        "images": ["a.png", "b.png"],
    },
    "mlx-vlm's question and answer": {
        "question": "is <image> above <image>?",
        "answer": "yes",
        "image": ["a.png", "b.png"],
    },
    "ShareGPT's": {
        "conversations": [
            {"from": "human", "value": "is <image> above <image>?"},
            {"from": "gpt", "value": "yes"},
        ],
        "images": ["a.png", "b.png"],
    },
    "hub structs": {
        "messages": PLACED,
        "images": [{"path": "a.png", "bytes": None}, {"path": "b.png", "bytes": None}],
    },
    "file addresses": {"messages": PLACED, "images": ["{root}/a.png", "file://{root}/b.png"]},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_way_to_write_pictures_means_the_same(rows, spelling):
    row = json.loads(json.dumps(SPELLINGS[spelling]).replace("{root}", str(rows.parent)))
    example = parse(rows, row)
    assert list(example.messages) == PLACED
    assert [ref.source for ref in example.media] == [str(rows.parent / "a.png"), str(rows.parent / "b.png")]


PAIRS = {
    "texts": {"prompt": "q", "chosen": "yes", "rejected": "no"},
    "turns": {"prompt": [user(PICTURE, words("q"))], "chosen": [YES], "rejected": [NO]},
    "conversations": {
        "chosen": [user(PICTURE, words("q")), YES],
        "rejected": [user(PICTURE, words("q")), NO],
    },
}


@pytest.mark.parametrize("spelling", PAIRS)
def test_a_pairs_pictures_stand_in_its_prompt(rows, spelling):
    example = parse(rows, {**PAIRS[spelling], "images": ["a.png"]}, "dpo")
    assert list(example.messages) == [user(PICTURE, words("q"))]
    assert (example.chosen, example.rejected, sources(example)) == ((YES,), (NO,), ["a.png"])


def test_feedback_and_prompts_have_pictures_too(rows):
    example = parse(rows, {"prompt": "q", "completion": "yes", "label": True, "images": ["a.png"]}, "kto")
    assert (list(example.messages), sources(example)) == ([user(PICTURE, words("q")), YES], ["a.png"])
    example = parse(rows, {"prompt": "q", "images": ["a.png"], "gold": "yes"}, "grpo")
    assert (list(example.messages), sources(example)) == ([user(PICTURE, words("q"))], ["a.png"])
    assert example.fields == {"gold": "yes"}


def test_without_places_pictures_stand_before_the_first_question(rows):
    turns = [{"role": "system", "content": "be brief"}, user("q"), YES, user("r"), YES]
    example = parse(rows, {"messages": turns, "images": ["a.png", "b.png"]})
    assert example.messages[1] == user(PICTURE, PICTURE, words("q"))
    assert sources(example) == ["a.png", "b.png"]


def test_pictures_of_several_turns_are_in_their_order(rows):
    turns = [user(PICTURE, words("q")), YES, user(words("r"), PICTURE), YES]
    assert sources(parse(rows, {"messages": turns, "images": ["b.png", "a.png"]})) == ["b.png", "a.png"]


def test_a_system_beside_the_turns_moves_no_picture(rows):
    example = parse(rows, {"prompt": "q", "completion": "yes", "image": "a.png", "system": "be brief"})
    assert example.messages[0]["role"] == "system"
    assert example.messages[1] == user(PICTURE, words("q"))


def test_places_are_words_where_no_column_fills_them(rows):
    example = parse(rows, {"messages": [user("write <image> here"), YES]})
    assert example.messages[0] == user("write <image> here")
    turns = [user({**PICTURE, "image": "a.png"}, words("write <image>")), YES]
    assert parse(rows, {"messages": turns}).messages[0]["content"][1] == words("write <image>")


def test_clips_are_files_or_frames_and_sounds_are_files(rows):
    example = parse(rows, {"messages": [user("q"), YES], "videos": ["c.mp4"], "audio": "d.wav"})
    assert [ref.kind for ref in example.media] == ["video", "audio"]
    turns = [user({"type": "video", "video": ["a.png", "b.png"]}, words("q")), YES]
    (clip,) = parse(rows, {"messages": turns}).media
    assert clip.source == (str(rows.parent / "a.png"), str(rows.parent / "b.png"))


def test_paths_begin_where_the_recipe_says(rows, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "e.png").write_bytes(b"e")
    row = {"messages": [user("q"), YES], "image": "e.png"}
    assert "no file" in problem(rows, row)
    assert sources(parse(rows, row, media_root=str(tmp_path / "pictures"))) == ["e.png"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [user("q"), YES], "images": ["nope.png"]}, "images.0: no file"),
        ({"messages": [user({**PICTURE, "image": "no.png"}), YES]}, "messages.0.content.0: no file"),
        ({"messages": [user("q <image>"), YES], "images": ["a.png", "b.png"]}, "found 2 images and 1 places"),
        ({"messages": [user("<image><image>"), YES], "images": ["a.png"]}, "found more <image> in the text"),
        ({"messages": [user(PICTURE, words("q")), YES]}, "found 1 places for images and 0 images"),
        (
            {"messages": [user({**PICTURE, "index": 1}, words("q")), YES], "images": ["a.png"]},
            "messages.0.content.0: found index 1, and 1 image in the row's column",
        ),
        ({"messages": [user("q"), YES], "images": [3]}, "images.0: found int; expected a path"),
        (
            {"messages": [user("q"), YES], "images": ["a.png"], "image": "b.png"},
            "image: found beside another",
        ),
        ({"text": "q", "images": ["a.png"]}, "beside a text, which has no place for it"),
        (
            {"messages": [user({**PICTURE, "image": "a.png", "max_pixels": 9}), YES]},
            "messages.0.content.0: found max_pixels",
        ),
        (
            {"messages": [user("q"), {"role": "assistant", "content": [{**PICTURE, "image": "a.png"}]}]},
            "in the assistant's turn; answers are words",
        ),
    ],
)
def test_what_is_wrong_with_a_picture_is_named(rows, row, said):
    found = problem(rows, row)
    assert said in found
    assert all(line.startswith(f"{rows}:1: ") for line in found.splitlines())


def test_a_picture_is_known_by_what_its_file_holds_now(rows):
    row = {"messages": [user("q"), YES], "images": ["a.png"]}
    (before,), (again,) = parse(rows, row).media, parse(rows, row).media
    assert before.identity == again.identity
    (rows.parent / "a.png").write_bytes(b"other content")
    (after,) = parse(rows, row).media
    assert after.identity != before.identity
