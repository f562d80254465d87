"""Laws of rows with pictures on their way to batches: read once and again, kept on disk, refused by their place."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from vlm_families import picture

from serve.errors import DataError
from train.data.show import show
from train.data.tokens import CUT_MEDIA, TokenizedExample
from train.foresee import preflight
from train.foresee.preflight import Preflight
from train.recipe.recipe import Recipe

FAMILY = "qwen3_vl"
"""Its pictures take as many tokens as they are large; its rows have positions of their own."""


def saved(folder: Path, name: str, seed: int, width: int = 64, height: int = 64) -> str:
    picture(seed, width, height).save(folder / name)
    return name


def chat(answer: str, *names: object) -> dict:
    return {
        "messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": answer}],
        "images": list(names),
    }


@pytest.fixture
def read(vlm_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Preflight]:
    """read(rows, **keys of the recipe) → what a run would start from; pictures lie in tmp_path."""

    def make(rows: Sequence[dict], console: Console | None = None, **keys) -> Preflight:
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        recipe = Recipe(
            model=str(vlm_folder(FAMILY)),
            datasets=[{"path": str(tmp_path)}],
            adapter_path=str(tmp_path / "out"),
            **{"val_batches": 0, "dataset_prepared_path": str(tmp_path / "kept"), **keys},
        )
        flight = preflight.prepare(recipe, Console(quiet=True))
        if console is not None:
            preflight.show(flight, console, with_recipe=True)
        return flight

    return make


def shown(row: TokenizedExample) -> dict[str, np.ndarray]:
    """Everything of a row but where its pixels come from, and its pixels."""
    found = {"ids": row.token_ids, "targets": row.is_target}
    if row.media is not None:
        for number, piece in enumerate(row.media.media):
            found[f"{number}.key"] = np.frombuffer(piece.key.encode(), np.uint8)
            found[f"{number}.positions"] = piece.positions
            found |= {f"{number}.{name}": value for name, value in piece.inputs.items()}
        assert row.media.rope is not None
        found["rope"] = row.media.rope.positions
        found["delta"] = np.array(row.media.rope.delta)
    return found


def assert_same(one: TokenizedExample, other: TokenizedExample) -> None:
    left, right = shown(one), shown(other)
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name], right[name]) for name in left)


def test_placeholders_are_never_targets_and_stand_for_the_picture(read, tmp_path):
    row = read([chat("red", saved(tmp_path, "a.png", 1))], mask_prompt=False).train.rows[0]
    places = row.media.placeholders
    assert len(places) == 4  # 64 pixels, patches of 16, two by two merged
    assert not row.is_target[places].any()
    assert row.is_target.sum() == len(row) - len(places) - 1


def test_rows_with_pictures_come_back_from_disk_as_they_were(read, tmp_path):
    rows = [
        chat("one", saved(tmp_path, "a.png", 1)),
        chat("two", saved(tmp_path, "b.png", 2, 96, 64), "a.png"),
        {"messages": chat("none")["messages"]},
    ]
    first = read(rows).train
    again = read(rows).train
    assert any("kept in" in note for note in first.notes)
    assert any("taken from" in note for note in again.notes)
    for one, other in zip(first.rows, again.rows, strict=True):
        assert_same(one, other)


def test_kept_rows_are_made_again_when_a_picture_or_its_settings_change(read, tmp_path):
    rows = [chat("one", saved(tmp_path, "a.png", 1))]
    read(rows)
    larger = read(rows, image={"resize": [96, 128]}).train.rows[0]
    assert larger.media.num_placeholders == 12
    saved(tmp_path, "a.png", 2, 96, 64)
    assert read(rows).train.rows[0].media.num_placeholders == 6


def test_the_same_pixels_are_one_picture_wherever_they_come_from(read, tmp_path):
    name = saved(tmp_path, "a.png", 1)
    encoded = io.BytesIO()
    picture(1, 64, 64).save(encoded, format="BMP")
    uri = f"data:image/bmp;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    other = saved(tmp_path, "b.png", 2)
    keys = [
        row.media.media[0].key
        for row in read([chat("x", source) for source in (name, uri, other)]).train.rows
    ]
    assert keys[0] == keys[1] != keys[2]


def test_a_picture_that_changes_under_a_run_is_named(read, tmp_path):
    row = read([chat("one", saved(tmp_path, "a.png", 1))]).train.rows[0]
    saved(tmp_path, "a.png", 2)
    inputs = row.media.media[0].inputs
    inputs._reader._made.clear()  # as when others took its room
    inputs._reader._bytes.clear()
    with pytest.raises(DataError, match=r"images\.0 .*a\.png.* holds something else now"):
        inputs["pixel_values"]


def test_broken_and_missing_pictures_are_all_named_before_anything_starts(read, tmp_path):
    good = saved(tmp_path, "a.png", 1)
    (tmp_path / "text.png").write_text("no picture")
    whole = (tmp_path / good).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    rows = [chat("x", good), chat("x", "text.png"), chat("x", good, "half.png")]
    with pytest.raises(DataError) as caught:
        read(rows)
    said = str(caught.value).splitlines()
    source = tmp_path / "train.jsonl"
    assert len(said) == 2
    assert said[0].startswith(f"{source}:2: images.0")
    assert said[1].startswith(f"{source}:3: images.1")
    with pytest.raises(DataError, match=r":4: images\.0: no file"):
        read([*rows, chat("x", "nowhere.png")])
    kept = read([*rows, chat("x", "nowhere.png")], on_bad_row="drop").train
    assert len(kept.rows) == 1
    assert sum(kept.report.dropped.values()) == 2


def test_a_picture_is_never_cut(read, tmp_path):
    small, large = saved(tmp_path, "a.png", 1), saved(tmp_path, "b.png", 2, 128, 128)
    console = Console(file=io.StringIO(), width=160)
    flight = read(
        [chat("yes " * 30, small), chat("yes", large, large), chat("yes", small, large, large)],
        console,
        max_seq_length=32,
    )
    (row,) = flight.train.rows
    assert (row.line, len(row), row.media.num_placeholders) == (1, 32, 4)
    assert flight.train.report.dropped == {CUT_MEDIA: 2}
    told = console.file.getvalue()
    assert CUT_MEDIA in told
    assert "image tokens" in told


def test_boxes_follow_the_size_that_the_tower_sees(read, tmp_path):
    name = saved(tmp_path, "a.png", 1, 256, 128)
    rows = [chat('{"bbox_2d": [128, 64, 256, 128]}', name)]
    keys = {"image": {"resize": [64, 128], "coordinates": {"rows": "pixels", "model": "pixels"}}}
    flight = read(rows, **keys)
    row = flight.train.rows[0]
    learned = flight.template.tokenizer.decode(row.token_ids[row.is_target].tolist())
    assert '{"bbox_2d": [64, 32, 128, 64]}' in learned


def test_a_model_without_eyes_refuses_pictures_by_their_row(model_folder, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(chat("x", saved(tmp_path, "a.png", 1))))
    recipe = Recipe(model=str(model_folder), datasets=[{"path": str(tmp_path)}], val_batches=0)
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: images\.0: found media \(image\).*reads text alone"
    ):
        preflight.prepare(recipe, Console(quiet=True))


def test_a_row_is_shown_with_its_pictures_tokens_counted(read, tmp_path):
    flight = read([chat("red", saved(tmp_path, "a.png", 1, 96, 64))])
    console = Console(file=io.StringIO(), width=160)
    show(flight.recipe, console)
    assert "<|vision_start|><|image_pad|>*6<|vision_end|>what?" in console.file.getvalue()
