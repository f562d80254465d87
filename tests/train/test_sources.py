"""Laws of reading rows: every problem named by file and line, splits deterministic, nothing guessed."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import datasets
import pytest

from serve.errors import DataError
from serve.model.loading import load_tokenizer
from serve.model.template import ChatTemplate
from train.data.sources import read
from train.recipe.recipe import Recipe


def chat(number: int) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    }


def write_rows(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def recipe_for(*paths: Path, **knobs) -> Recipe:
    return Recipe(model="m", datasets=[{"path": str(path)} for path in paths], **knobs)


def problems_of(recipe: Recipe, split="train") -> list[str]:
    with pytest.raises(DataError) as caught:
        read(recipe, split)
    return str(caught.value).splitlines()


def test_a_broken_line_is_named_with_the_json_error(tmp_path):
    rows = [chat(n) for n in range(16)] + ['{"messages": [}', chat(17)]
    file = write_rows(tmp_path / "a.jsonl", rows)
    (problem,) = problems_of(recipe_for(file))
    assert problem == f"{file}:17: not JSON: Expecting value at column 15"


def test_all_problems_of_all_files_come_at_once(tmp_path):
    one = write_rows(
        tmp_path / "one.jsonl",
        [
            chat(0),
            {"messages": [{"role": "user", "content": "x"}]},
            {"messages": "hello"},
            {"messages": [{"role": "user", "content": 3}, {"role": "assistant", "content": "a"}]},
            [1, 2],
            "",
            {"prompt": "p", "completion": ["c"]},
            {"prompt": "p", "answer": "c"},
            {"conversations": [{"from": "human", "value": "x"}]},
            {"messages": [{"from": "human", "content": "x"}, {"role": "assistant", "content": "a"}]},
            {"mesages": [], "id": 1},
            {"text": ""},
            {**chat(1), "tools": "get_weather"},
        ],
    )
    two = write_rows(tmp_path / "two.jsonl", [{"text": None, "completion": "x"}])
    said = problems_of(recipe_for(one, two))
    for expected in (
        f"{one}:2: messages: no turn of assistant to learn from; found user",
        f"{one}:3: messages: found a string ('hello'); expected a list of messages",
        f"{one}:4: messages.0.content: found a number (3); expected a string",
        f"{one}:5: found a list ([1, 2]); expected an object with keys",
        f"{one}:7: completion: found a list (['c']); expected a string",
        f"{one}:9: conversations: no turn of assistant to learn from; found user",
        f"{one}:10: messages.0.value: found nothing; expected a string",
        f"{one}:12: text: found an empty string; expected text",
        f"{one}:13: tools: found a string ('get_weather'); expected a list of objects",
    ):
        assert expected in said
    assert any(line.startswith(f"{one}:8: found keys prompt, answer; objective sft needs") for line in said)
    assert any(line.startswith(f"{one}:11:") and "did you mean messages by mesages?" in line for line in said)
    assert any(line.startswith(f"{two}:1:") for line in said)
    assert not any(line.startswith(f"{one}:1:") for line in said)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".csv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_in_another_encoding_is_told_as_such_once_and_with_what_to_do(tmp_path, suffix, encoding):
    text = {".json": json.dumps([chat(0)]), ".csv": "prompt,completion\na,b\n"}.get(
        suffix, json.dumps(chat(0)) + "\n"
    )
    raw = text.encode(encoding)
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
    (problem,) = problems_of(recipe_for(path))
    assert f"is UTF-{'32' if '32' in encoding else '16'}" in problem
    assert "not UTF-8; save it as UTF-8, for example by: iconv -f UTF-" in problem
    assert problem.startswith(str(path))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("count", [1, 3])
def test_a_json_array_in_a_jsonl_file_is_told_as_such(tmp_path, indent, count):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps([chat(n) for n in range(count)], indent=indent) + "\n")
    (problem,) = problems_of(recipe_for(path))
    assert "holds one JSON array" in problem
    assert "name it rows.json" in problem
    path.rename(tmp_path / "rows.json")
    assert len(read(recipe_for(tmp_path / "rows.json"), "train")) == count


def test_rows_over_several_lines_and_lines_in_a_json_file_are_told_with_the_way_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(chat(n), indent=2) + "\n" for n in range(3)))
    (problem,) = problems_of(recipe_for(path))
    assert "its rows go over several lines" in problem
    lines = write_rows(tmp_path / "lines.json", [chat(0), chat(1)])
    (problem,) = problems_of(recipe_for(lines))
    assert "a file of one row a line is named .jsonl" in problem


@pytest.mark.parametrize("mark", [b"\x1f\x8b\x08rest", b"PAR1rest", b"PK\x03\x04rest"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_file_that_is_not_what_its_name_says_is_told(tmp_path, mark, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(mark)
    (problem,) = problems_of(recipe_for(path))
    assert "whatever its name says" in problem


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "a", "prompt": "b", "completion": "c"}',
        '{"messages": [{"role": "user", "role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"prompt": "a", "completion": "c", "meta": {"x": [{"y": {"y": 1, "z": 2, "y": 3}}]}}',
    ],
)
def test_a_key_that_stands_twice_is_a_problem_of_its_row(tmp_path, row):
    lines = write_rows(tmp_path / "a.jsonl", [chat(0), row, chat(1)])
    (problem,) = problems_of(recipe_for(lines))
    assert problem.startswith(f"{lines}:2: the key ")
    assert "stands twice in one object" in problem
    (tmp_path / "a.json").write_text(f"[{json.dumps(chat(0))}, {row}]")
    (problem,) = problems_of(recipe_for(tmp_path / "a.json"))
    assert "stands twice in one object" in problem


def test_no_more_than_some_twenty_problems_are_told(tmp_path):
    said = problems_of(recipe_for(write_rows(tmp_path / "a.jsonl", ["{"] * 500)))
    assert len(said) == 21
    assert said[-1].startswith("… and perhaps more")


def test_lines_and_tools_survive_and_blank_lines_are_counted_not_read(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    file = write_rows(tmp_path / "a.jsonl", [chat(0), "", {**chat(1), "tools": tools}])
    first, second = read(recipe_for(file), "train")
    assert (first.place, second.place) == (f"{file}:1", f"{file}:3")
    assert second.tools == tuple(tools)
    assert first.tools is None


def test_prompt_and_completion_win_over_messages_as_in_mlx_lm_and_type_decides_otherwise(tmp_path):
    row = {**chat(0), "prompt": "p", "completion": "c", "text": "t"}
    file = write_rows(tmp_path / "a.jsonl", [row])
    assert read(recipe_for(file), "train")[0].prompt == "p"
    kinds = {}
    for kind in ("chat", "completion", "text"):
        recipe = Recipe(model="m", datasets=[{"path": str(file), "type": kind}])
        (example,) = read(recipe, "train")
        kinds[kind] = (example.messages is not None, example.prompt, example.text)
    assert kinds == {"chat": (True, None, None), "completion": (False, "p", None), "text": (False, None, "t")}


def test_features_name_the_keys(tmp_path):
    file = write_rows(tmp_path / "d" / "train.jsonl", [{"q": "p", "a": "c"}])
    recipe = Recipe(model="m", data=str(file.parent), prompt_feature="q", completion_feature="a")
    (example,) = read(recipe, "train")
    assert (example.prompt, example.completion) == ("p", "c")
    assert [m["role"] for m in example.as_messages()] == ["user", "assistant"]


def test_a_folder_gives_its_train_valid_and_test_files(tmp_path):
    for number, name in enumerate(("train", "valid", "test")):
        write_rows(tmp_path / "d" / f"{name}.jsonl", [chat(number)])
    recipe = Recipe(model="m", data=str(tmp_path / "d"))
    for number, name in enumerate(("train", "valid", "test")):
        (example,) = read(recipe, name)
        assert example.messages[0]["content"] == f"question {number}"


def test_validation_rows_given_in_two_ways_are_refused(tmp_path):
    for name in ("train", "valid"):
        write_rows(tmp_path / "d" / f"{name}.jsonl", [chat(n) for n in range(10)])
    (problem,) = problems_of(Recipe(model="m", data=str(tmp_path / "d"), val_set_size=0.5))
    assert "holds validation rows already" in problem


@pytest.mark.parametrize(("size", "count"), [(0.25, 10), (7, 7), (0.001, 1)])
def test_val_set_size_divides_the_rows_without_losing_or_sharing_any(tmp_path, size, count):
    file = write_rows(tmp_path / "a.jsonl", [chat(n) for n in range(40)])
    recipe = recipe_for(file, val_set_size=size)
    train, valid = read(recipe, "train"), read(recipe, "valid")
    assert len(valid) == count
    assert sorted(e.line for e in train + valid) == list(range(1, 41))
    assert [e.line for e in read(recipe, "valid")] == [e.line for e in valid]
    if count > 1:
        other = read(recipe.model_copy(update={"seed": 1}), "valid")
        assert [e.line for e in other] != [e.line for e in valid]


def test_val_set_size_that_takes_everything_is_refused(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [chat(0), chat(1)])
    (problem,) = problems_of(recipe_for(file, val_set_size=2))
    assert "leaves none to train on" in problem


def test_weight_repeats_and_thins_training_rows_the_same_way_each_time(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", [chat(n) for n in range(8)])
    two = write_rows(tmp_path / "two.jsonl", [chat(n) for n in range(8)])
    entries = [{"path": str(one), "weight": 2.5}, {"path": str(two), "weight": 0.25}]
    rows = read(Recipe(model="m", datasets=entries), "train")
    counts = {path: sum(e.source == str(path) for e in rows) for path in (one, two)}
    assert counts == {one: 20, two: 2}
    assert rows == read(Recipe(model="m", datasets=entries), "train")


def test_json_and_parquet_files_hold_the_same_rows_as_jsonl(tmp_path):
    rows = [chat(n) for n in range(3)]
    jsonl = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    expected = [e.messages for e in read(recipe_for(jsonl), "train")]
    for name in ("a.json", "a.parquet"):
        assert [e.messages for e in read(recipe_for(tmp_path / name), "train")] == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", '{"x": 1}', "expected a list of rows"),
        ("a.json", "[1,\n2,,]", "a.json:2: not JSON"),
        ("a.txt", "a,b", "expected .jsonl, .jsonl.gz, .json, .parquet or .csv"),
        ("a.jsonl.gz", "nonsense", "not readable as gzip"),
        ("a.csv", "", "no training rows"),
        ("a.csv", "a,b", "no training rows"),
        ("a.csv", "a,b\n1,2", "a.csv: its columns are no use: found keys a, b; objective sft needs"),
        ("a.csv", "text,text\n1,2", "a.csv:1: found the header 'text', 'text'; expected a different name"),
        ("a.csv", "text,\n1,2", "expected a different name for each column"),
        ("a.csv", "id,text\n1,x\n2", "a.csv:3: found 1 cells; the header has 2"),
        ("a.csv", 'id,text\n1,"x', "not readable as CSV"),
        ("a.parquet", "nonsense", "not readable as parquet"),
        ("a.jsonl", "", "no training rows"),
    ],
)
def test_an_unreadable_file_is_a_data_error_that_names_it(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    (problem,) = problems_of(recipe_for(tmp_path / name))
    assert words in problem
    assert name in problem


def test_no_test_rows_is_an_error_and_no_validation_rows_is_not(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [chat(0)])
    assert "no test rows" in problems_of(recipe_for(file), "test")[0]
    assert read(recipe_for(file), "valid") == []


def test_bytes_that_are_no_text_are_named_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps(chat(0)).encode() + b'\n{"text": "\xff"}\n')
    (problem,) = problems_of(recipe_for(tmp_path / "a.jsonl"))
    assert f"{tmp_path / 'a.jsonl'}:2: not UTF-8" in problem


def test_missing_files_folders_and_splits_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no such file or folder" in problems_of(recipe_for(tmp_path / "no.jsonl"))[0]
    assert "expected train.jsonl" in problems_of(recipe_for(tmp_path / "empty"))[0]
    file = write_rows(tmp_path / "a.jsonl", [chat(0)])
    recipe = Recipe(model="m", datasets=[{"path": str(file), "valid_split": "valid"}])
    assert "a single file has no splits" in problems_of(recipe)[0]


def test_with_mask_prompt_off_a_conversation_needs_no_assistant(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    assert len(read(recipe_for(file, mask_prompt=False), "train")) == 1


def test_a_text_longer_than_the_tokenizer_counts_on_is_not_warned_of(model_folder):
    """transformers would say that it "will result in indexing errors"."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear, logger = Ear(), logging.getLogger("transformers")
    logger.addHandler(ear)
    try:
        tokenizer = load_tokenizer(str(model_folder))
        tokenizer.model_max_length = 8
        assert len(ChatTemplate(tokenizer).render([{"role": "user", "content": "long " * 50}])) > 8
        assert len(tokenizer.encode("long " * 50)) > 8
    finally:
        logger.removeHandler(ear)
    assert not said
