"""Laws of duplicates: known by content, told with their places, never on both sides of a validation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve.errors import DataError
from train.data.duplicates import content_key, report
from train.data.example import Example
from train.data.sources import read, read_corpus
from train.recipe.recipe import Recipe


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def recipe_of(path: Path, **knobs) -> Recipe:
    return Recipe(model="m", datasets=[{"path": str(path)}], **knobs)


def test_content_is_words_and_not_spacing_or_composition_or_place():
    same = [Example("a", 1, text="caf\u00e9 au  lait"), Example("b", 9, text=" cafe\u0301 au\nlait ")]
    assert content_key(same[0]) == content_key(same[1])
    others = [
        Example("a", 1, text="Café au lait"),
        Example("a", 1, prompt="café", completion="au lait"),
        Example("a", 1, prompt="café au lait", completion="x", label=True),
        Example("a", 1, prompt="café au lait", completion="x", label=False),
    ]
    assert len({content_key(row) for row in [same[0], *others]}) == 5


def test_repeats_and_leaks_are_counted_and_their_first_places_named():
    train = [Example("t", n, text=text) for n, text in enumerate("abacaab", 1)]
    valid = [Example("v", n, text=text) for n, text in enumerate("xc", 1)]
    found = report(train, valid)
    assert found.num_repeats == 4
    assert found.groups == (("t:1", "t:3", "t:5"), ("t:2", "t:7"))
    assert (found.num_leaked, found.leaks) == (1, (("t:4", "v:2"),))


def test_duplicates_are_kept_and_told_unless_the_recipe_leaves_them_out(tmp_path):
    write(tmp_path / "d" / "train.jsonl", list("abacx"))
    write(tmp_path / "d" / "valid.jsonl", ["x"])
    kept = read_corpus(recipe_of(tmp_path / "d"))
    assert ([e.text for e in kept.train], kept.duplicates.removed) == (list("abacx"), False)
    assert (kept.duplicates.num_repeats, kept.duplicates.num_leaked) == (1, 1)
    cleaned = read_corpus(recipe_of(tmp_path / "d", dataset_exact_deduplication=True))
    assert [e.text for e in cleaned.train] == ["a", "b", "c"]
    assert [e.text for e in cleaned.valid] == ["x"]
    assert cleaned.duplicates.removed


def test_duplicates_are_found_across_sources_but_rows_repeated_by_weight_are_none(tmp_path):
    one, two = write(tmp_path / "1.jsonl", ["a", "b"]), write(tmp_path / "2.jsonl", ["b", "c"])
    entries = [{"path": str(one), "weight": 2}, {"path": str(two)}]
    corpus = read_corpus(Recipe(model="m", datasets=entries, dataset_exact_deduplication=True))
    assert corpus.duplicates.groups == ((f"{one}:2", f"{two}:1"),)
    assert [e.text for e in corpus.train] == ["a", "b", "a", "b", "c"]


def test_nothing_left_to_train_on_is_an_error(tmp_path):
    write(tmp_path / "d" / "train.jsonl", ["x"])
    write(tmp_path / "d" / "valid.jsonl", ["x"])
    with pytest.raises(DataError, match="leaves no training rows"):
        read_corpus(recipe_of(tmp_path / "d", dataset_exact_deduplication=True))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("size", [0.2, 10])
def test_no_content_stands_on_both_sides_of_a_split_and_no_row_is_lost(tmp_path, seed, size):
    texts = [str(n) for n in range(20)] + ["twin"] * 2 + ["crowd"] * 15 + [str(n) for n in range(5)]
    recipe = recipe_of(write(tmp_path / "a.jsonl", texts), val_set_size=size, seed=seed)
    train, valid = read(recipe, "train"), read(recipe, "valid")
    assert not {e.text for e in train} & {e.text for e in valid}
    assert sorted(e.line for e in train + valid) == list(range(1, len(texts) + 1))
    assert 0 < len(valid) <= (10 if size == 10 else round(0.2 * len(texts)))


def test_rows_that_all_say_the_same_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match="have the same content"):
        read(recipe_of(write(tmp_path / "a.jsonl", ["x"] * 9), val_set_size=2), "train")
