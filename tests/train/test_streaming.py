"""Laws of streams: a batch follows from its number alone, windows are bounded, nothing is read twice or skipped."""

from __future__ import annotations

import json
from datetime import date
from itertools import islice
from pathlib import Path

import datasets
import pytest

from serve.errors import ConfigError, DataError
from serve.model.loading import load_tokenizer
from serve.model.template import ChatTemplate
from train.data.batches import WINDOW_BATCHES
from train.data.duplicates import content_key
from train.data.rules import TokenRules
from train.data.sources import read, stream_examples
from train.data.stream import StreamedRows, StreamPlan
from train.data.tokens import tokenize
from train.foresee.preflight import prepare
from train.recipe.recipe import Recipe, load_recipe
from train.run import run

MODEL = str(Path(__file__).resolve().parents[2] / "data" / "tickets")
WINDOW = WINDOW_BATCHES * 2


def write(path: Path, count: int, name: str = "row", words=lambda n: "word " * (n * 7 % 23 + 1)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{name} {n}: {words(n)}"}) + "\n" for n in range(count)))
    return path


def recipe_of(*paths: Path, weights=(1, 1, 1), **knobs) -> Recipe:
    entries = [{"path": str(p), "streaming": True, "weight": w} for p, w in zip(paths, weights, strict=False)]
    knobs = {"batch_size": 2, "adapter_path": str(paths[0].parent / "run"), **knobs}
    return Recipe(model=MODEL, datasets=entries, **knobs)


def own_template() -> ChatTemplate:
    return ChatTemplate(load_tokenizer(MODEL))


def rules_of(recipe: Recipe) -> TokenRules:
    return TokenRules.of_recipe(recipe, date(2026, 1, 1))


@pytest.fixture
def plan_of():
    def make(recipe: Recipe, **more) -> tuple[StreamPlan, StreamedRows]:
        rows = StreamedRows(recipe, rules_of(recipe), own_template, WINDOW, **more)
        return StreamPlan(rows, 2, recipe.seed), rows

    return make


def lines(rows: StreamedRows, plan: StreamPlan, batches) -> list[list[int]]:
    found = []
    for index in batches:
        row_ids = plan.rows(index)
        found.append([rows[row].line for row in row_ids])
    return found


def test_each_row_of_a_stream_is_trained_once_a_pass_in_windows_of_its_order(tmp_path, plan_of):
    plan, rows = plan_of(recipe_of(write(tmp_path / "a.jsonl", 3 * WINDOW)))
    for window in range(3):
        batches = lines(rows, plan, range(window * WINDOW_BATCHES, (window + 1) * WINDOW_BATCHES))
        expected = range(window * WINDOW + 1, (window + 1) * WINDOW + 1)
        assert sorted(line for batch in batches for line in batch) == list(expected)
        assert [line for batch in batches for line in batch] != list(expected)
    assert lines(rows, plan, range(3 * WINDOW_BATCHES, 3 * WINDOW_BATCHES + 5))  # the file starts over


def test_any_batch_can_be_asked_for_at_any_time(tmp_path, plan_of):
    recipe = recipe_of(write(tmp_path / "a.jsonl", 700))
    asked = [0, 130, 300, 127, 3]
    plan, rows = plan_of(recipe)
    jumping = [(plan.batch(rows, index).tokens.tolist(), plan.rows(index)) for index in asked]
    for index, found in zip(asked, jumping, strict=True):
        fresh, its_rows = plan_of(recipe)
        assert (fresh.batch(its_rows, index).tokens.tolist(), fresh.rows(index)) == found


def test_batches_of_a_window_go_by_length_and_a_seed_changes_their_order(tmp_path, plan_of):
    file = write(tmp_path / "a.jsonl", WINDOW)
    plan, rows = plan_of(recipe_of(file))
    assert plan.padding_share < 0.15
    other, its_rows = plan_of(recipe_of(file, seed=1))
    assert lines(rows, plan, range(20)) != lines(its_rows, other, range(20))


def test_no_more_than_a_few_windows_are_in_memory_and_the_file_is_read_no_further(tmp_path, plan_of):
    file = write(tmp_path / "a.jsonl", 20 * WINDOW)
    plan, rows = plan_of(recipe_of(file))
    for window in range(6):
        plan.rows(window * WINDOW_BATCHES)
    assert len(rows._windows) <= 3
    with pytest.raises(IndexError):
        rows[0]
    ahead = rows._ahead.result()  # the thread reads one window ahead and then waits
    assert max(row.line for row in ahead.rows) == 7 * WINDOW


@pytest.mark.parametrize("weights", [(1, 1, 1), (3, 1, 1), (0.5, 2, 0.25)])
def test_sources_take_turns_by_weight_from_the_first_row_on(tmp_path, weights):
    files = [write(tmp_path / f"{name}.jsonl", 40, name) for name in "abc"]
    found = [e.source for e in islice(stream_examples(recipe_of(*files, weights=weights)), 200)]
    for count in (20, 50, 200):
        for file, weight in zip(files, weights, strict=True):
            expected = count * weight / sum(weights)
            assert abs(found[:count].count(str(file)) - expected) <= 2


def test_the_first_rows_validate_and_are_never_trained_on_also_when_the_stream_starts_over(tmp_path):
    texts = [f"row {n}" for n in range(100)] + ["row 3"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flight = prepare(recipe_of(file, val_set_size=10, iters=300))
    assert [e.text for e in flight.valid.examples] == texts[:10]
    held_out = {content_key(e) for e in flight.valid.examples}
    assert len(held_out) == 10
    trained = {flight.name_row(r) for i in range(200) for r in flight.batch_at(i).row_ids}
    assert trained == {f"{file}:{n}" for n in range(11, 101)}  # line 101 says what line 4 does
    assert any("stands in the validation rows too" in note for note in flight.train.rows.take_notes())
    assert flight.train.rows.take_notes() == []


def test_a_folders_own_validation_rows_are_used_whole(tmp_path):
    write(tmp_path / "d" / "train.jsonl", 60)
    write(tmp_path / "d" / "valid.jsonl", 7, "held")
    flight = prepare(recipe_of(tmp_path / "d", iters=3))
    assert len(flight.valid.rows) == 7


def test_a_stream_shorter_than_a_window_repeats_and_one_that_gives_nothing_ends(tmp_path, plan_of):
    plan, rows = plan_of(recipe_of(write(tmp_path / "a.jsonl", 3)))
    assert sorted({line for batch in lines(rows, plan, range(WINDOW_BATCHES)) for line in batch}) == [1, 2, 3]
    (tmp_path / "b.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no training rows in"):
        plan_of(recipe_of(tmp_path / "b.jsonl"))[1].window(0)
    empty = recipe_of(write(tmp_path / "c.jsonl", 3), max_seq_length=2, excess_length_strategy="drop")
    with pytest.raises(DataError, match="gave nothing to train on: longer than max_seq_length"):
        plan_of(empty, max_barren_rows=50)[1].window(0)


def test_a_broken_row_ends_a_run_before_it_starts_and_is_left_out_and_told_after(tmp_path, plan_of):
    file = write(tmp_path / "a.jsonl", 2 * WINDOW)
    rows = file.read_text().splitlines()
    rows[WINDOW + 5] = '{"text": '
    file.write_text("\n".join(rows))
    plan, streamed = plan_of(recipe_of(file))
    assert len(lines(streamed, plan, [0, WINDOW_BATCHES])) == 2
    (note,) = streamed.take_notes()
    assert note.startswith(
        f"stream: 1 rows left out, not usable as it stands; first: {file}:{WINDOW + 6}: not JSON"
    )
    file.write_text("\n".join(['{"text": ', *rows]))
    with pytest.raises(DataError, match=r"a\.jsonl:1: not JSON"):
        plan_of(recipe_of(file))[1].window(0)


def test_parquet_and_csv_stream_as_jsonl_does(tmp_path):
    texts = [{"text": f"row {n}"} for n in range(3000)]
    datasets.Dataset.from_list(texts).to_parquet(str(tmp_path / "a.parquet"))
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"{row['text']}\n" for row in texts))
    for name in ("a.parquet", "a.csv"):
        found = [e.text for e in islice(stream_examples(recipe_of(tmp_path / name)), 3001)]
        assert found == [*(row["text"] for row in texts), "row 0"]


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ("epochs: 1", "epochs: a stream has no known end"),
        ("val_set_size: 0.1", "a share of a stream is not known"),
        ("dataset_exact_deduplication: true", "needs all rows at once"),
        ("sample_packing: true", "which a stream does not know"),
    ],
)
def test_what_needs_all_rows_is_refused_with_the_reason(tmp_path, knobs, words):
    file = tmp_path / "r.yaml"
    file.write_text(f"model: m\ndatasets: [{{path: a, streaming: true}}]\n{knobs}\n")
    with pytest.raises(ConfigError, match=words):
        load_recipe(file)


def test_streams_and_files_do_not_mix(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ndatasets: [{path: a, streaming: true}, {path: b}]\n")
    with pytest.raises(ConfigError, match=r"datasets.1.streaming: another source is streamed"):
        load_recipe(file)


def test_a_run_on_a_stream_resumes_to_the_same_weights(tmp_path):
    file = write(tmp_path / "a.jsonl", 400)
    knobs = {
        "val_batches": 0,
        "num_layers": 1,
        "lora_parameters": {"rank": 2, "keys": ("self_attn.q_proj",)},
        "save_every": 2,
        "max_seq_length": 16,
        "learning_rate": 1e-2,
    }
    whole = recipe_of(file, iters=4, adapter_path=str(tmp_path / "whole"), **knobs)
    run(whole)
    parts = whole.model_copy(update={"adapter_path": str(tmp_path / "parts")})
    run(parts.model_copy(update={"iters": 2}))
    run(parts, resume=True)
    weights = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_checkpoint_of_another_stream_is_refused(tmp_path):
    streams = [prepare(recipe_of(write(tmp_path / f"{n}.jsonl", 300 + n), iters=3)) for n in range(2)]
    same = prepare(recipe_of(tmp_path / "0.jsonl", iters=3))
    assert streams[0].data_hash == same.data_hash != streams[1].data_hash


def test_what_datasets_can_stream_is_streamed_by_it_and_gives_the_rows_it_gives_at_once(tmp_path):
    file = write(tmp_path / "a.jsonl", 20)
    entry = {"path": "json", "config": {"data_files": {"train": str(file)}}}
    recipe = Recipe(model=MODEL, datasets=[{**entry, "streaming": True}], batch_size=2)
    streamed = [e.text for e in islice(stream_examples(recipe), 20)]
    assert streamed == [e.text for e in read(Recipe(model=MODEL, datasets=[entry]), "train")]
    assert [e.place for e in islice(stream_examples(recipe), 2)] == ["json[train]:1", "json[train]:2"]


def test_what_windows_are_made_of_is_written_down_and_a_resumed_run_goes_straight_there(tmp_path, plan_of):
    file, marks = write(tmp_path / "a.jsonl", 5 * WINDOW), tmp_path / "run" / "stream.json"
    recipe = recipe_of(file, objective="cpt", max_seq_length=24)  # a document may end in the next window
    plan, rows = plan_of(recipe, marks=marks)
    plan.rows(0)
    assert not marks.exists()  # a dry run leaves nothing behind
    asked = [WINDOW_BATCHES * window + 3 for window in (1, 2, 4)]
    expected = [(plan.batch(rows, index).tokens.tolist(), lines(rows, plan, [index])) for index in asked]
    for index, found in zip(asked, expected, strict=True):
        fresh, its_rows = plan_of(recipe, marks=marks)
        fresh.rows(0)
        assert (fresh.batch(its_rows, index).tokens.tolist(), lines(its_rows, fresh, [index])) == found

    # Rows before the place are not looked at any more, which shows when they are broken.
    text = file.read_text().splitlines(keepends=True)
    text[5:200] = ["?" * (len(line.encode()) - 1) + "\n" for line in text[5:200]]
    file.write_text("".join(text))
    fresh, its_rows = plan_of(recipe, marks=marks)
    found = (fresh.batch(its_rows, asked[-1]).tokens.tolist(), lines(its_rows, fresh, asked[-1:]))
    assert found == expected[-1]
    assert its_rows.take_notes() == []


@pytest.mark.parametrize("damage", ["of other knobs", "of another file", "not JSON", "too short"])
def test_marks_that_do_not_fit_are_not_used(tmp_path, plan_of, damage):
    file, marks = write(tmp_path / "a.jsonl", 4 * WINDOW), tmp_path / "stream.json"
    made_of = recipe_of(file, objective="cpt", max_seq_length=24 if damage == "of other knobs" else 48)
    recipe = recipe_of(file, objective="cpt", max_seq_length=48)
    plan_of(made_of, marks=marks)[0].rows(2 * WINDOW_BATCHES)
    said = json.loads(marks.read_text())
    if damage == "of another file":
        file.write_text(json.dumps({"text": "word " * 200}) + "\n" + file.read_text())
    elif damage == "too short":
        marks.write_text(json.dumps({**said, "ends": said["ends"][:1]}))
    elif damage == "not JSON":
        marks.write_text(marks.read_text()[:-9])
    expected, plain_rows = plan_of(recipe)
    found, found_rows = plan_of(recipe, marks=marks)
    index = 2 * WINDOW_BATCHES
    assert lines(found_rows, found, [index]) == lines(plain_rows, expected, [index])


def test_a_stream_holds_the_sequences_of_tokenizing_all_its_rows_in_order(tmp_path, plan_of):
    recipe = recipe_of(write(tmp_path / "a.jsonl", 2 * WINDOW), objective="cpt", max_seq_length=24)
    _, rows = plan_of(recipe)
    found = [row.token_ids.tolist() for window in range(3) for row in rows.window(window)]
    examples = [e for e in islice(stream_examples(recipe), 2 * WINDOW) if not isinstance(e, DataError)]
    whole, _ = tokenize(examples, own_template(), rules_of(recipe))
    assert found == [row.token_ids.tolist() for row in whole][: 3 * WINDOW]
    assert len(found) == 3 * WINDOW < len(whole)


def test_validation_rows_are_passed_over_without_a_word(tmp_path):
    flight = prepare(recipe_of(write(tmp_path / "a.jsonl", 3 * WINDOW), val_set_size=10, iters=3))
    flight.batch_at(0)
    assert flight.train.rows[0].line == 11
    assert flight.take_notes() == []
