"""Pictures of tables and of hub data sets: they stay files' bytes until somebody looks at them."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from train.data.files import _as_stored
from train.data.sources import read
from train.recipe.recipe import Recipe

TURNS = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]


def encoded(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, format="PNG")
    return file.getvalue()


def test_a_hub_splits_pictures_are_not_decoded_as_rows_are_read():
    features = datasets.Features(
        {"image": datasets.Image(), "images": datasets.List(datasets.Image()), "n": datasets.Value("int64")}
    )
    stored = {"bytes": encoded("red"), "path": None}
    rows = datasets.Dataset.from_dict({"image": [stored], "images": [[stored, stored]], "n": [1]}, features)
    (row,) = list(_as_stored(rows))
    assert row == {"image": stored, "images": [stored, stored], "n": 1}


def test_a_parquet_files_pictures_are_bytes_of_their_rows(tmp_path: Path):
    stored = [{"bytes": encoded(colour), "path": f"{colour}.png"} for colour in ("red", "blue")]
    table = pa.table({"messages": [TURNS, TURNS], "images": [[stored[0]], stored]})
    pq.write_table(table, tmp_path / "train.parquet")
    examples = read(Recipe(model="m", datasets=[{"path": str(tmp_path)}]), "train")
    assert [ref.source for ref in examples[1].media] == [encoded("red"), encoded("blue")]
    assert examples[0].media[0].identity == examples[1].media[0].identity != examples[1].media[1].identity
