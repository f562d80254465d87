"""Rows that cannot be used: named all together and refused, or left out, counted and named. Whatever their format."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from rich.console import Console

from serve.errors import DataError
from train.data.bad_rows import MAX_PROBLEMS, BadRows
from train.foresee.preflight import adam_lines, prepare, show
from train.recipe.recipe import Recipe

GRPO = {"grpo": {"rewards": [{"kind": "regex", "pattern": "a"}]}, "batch_size": 8}
GOOD_AND_BAD: dict[str, tuple[str, dict, dict, str]] = {
    "chat": (
        "sft",
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "q"}]},
        "messages: ",
    ),
    "completion": (
        "sft",
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "completion": ""},
        "completion: ",
    ),
    "text": ("cpt", {"text": "words"}, {"text": 3}, "text: found a number"),
    "alpaca": (
        "sft",
        {"instruction": "i", "output": "o"},
        {"instruction": "i", "output": "o", "input": 3},
        "input: found a number",
    ),
    "sharegpt": (
        "sft",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversations": "q"},
        "conversations: ",
    ),
    "preference": (
        "dpo",
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": ""},
        "rejected: found an empty string",
    ),
    "unpaired": (
        "kto",
        {"prompt": "p", "completion": "c", "label": True},
        {"prompt": "p", "completion": "c", "label": "perhaps"},
        "label: found a string",
    ),
    "prompt": ("grpo", {"prompt": "p"}, {"prompt": ""}, "prompt: found an empty string"),
    "a reward's column": (
        "grpo needing team",
        {"prompt": "p", "team": "red"},
        {"prompt": "p", "colour": "red"},
        "no column team, which the reward regex needs; found colour",
    ),
    "not an object": ("sft", {"prompt": "p", "completion": "c"}, ["p", "c"], "expected an object"),
    "half a character": (
        "sft",
        {"prompt": "p", "completion": "c"},
        '{"prompt": "p", "completion": "\\ud83d"}',
        r"completion: found half a surrogate pair (\ud83d)",
    ),
    "not JSON": ("sft", {"prompt": "p", "completion": "c"}, "{", "JSON"),
}


@pytest.fixture
def write(tmp_path, model_folder) -> Callable[..., Recipe]:
    """write(objective, rows, **keys) → a recipe over a file of them; a string is a line as it stands."""

    def make(objective: str, rows: list, **keys: object) -> Recipe:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "train.jsonl").write_text("".join(line + "\n" for line in lines))
        return Recipe.model_validate(
            {
                "model": str(model_folder),
                "data": str(tmp_path),
                "objective": objective,
                "iters": 2,
                **(GRPO if objective == "grpo" else {}),
                **keys,
            }
        )

    return make


@pytest.mark.parametrize("form", GOOD_AND_BAD)
def test_a_bad_row_of_any_form_is_refused_or_left_out_by_name(form, write):
    objective, good, bad, reason = GOOD_AND_BAD[form]
    objective, _, column = objective.partition(" needing ")
    keys = {"grpo": {"rewards": [{"kind": "regex", "pattern": "a", "field": column}]}} if column else {}
    rows = [good, bad, good, bad, good]
    with pytest.raises(DataError, match=r"train\.jsonl:2: .*(\n.*)*train\.jsonl:4: ") as refused:
        prepare(write(objective, rows, **keys))
    assert reason in str(refused.value)
    flight = prepare(write(objective, rows, on_bad_row="drop", **keys))
    assert [row.line for row in flight.train.rows] == [1, 3, 5]
    console = Console(file=io.StringIO(), width=200)
    show(flight, console)
    told = [line for line in console.file.getvalue().splitlines() if line.startswith("train:")]
    assert told[0] == "train: 2 bad rows left out (on_bad_row: drop)"
    assert reason in told[1]
    assert "2 of them: " in told[1]
    assert "train.jsonl:2, " in told[1]


def test_rows_that_a_template_refuses_are_left_out_too(write, tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    short, long = ({"messages": [{**turns[0], "content": "q" * n}, turns[1]]} for n in (3, 300))
    keys = {"max_seq_length": 100, "excess_length_strategy": "raise"}
    with pytest.raises(DataError, match=r"train\.jsonl:2: .* max_seq_length is 100"):
        prepare(write("sft", [short, long, short], **keys))
    flight = prepare(write("sft", [short, long, short], on_bad_row="drop", **keys))
    assert [row.line for row in flight.train.rows] == [1, 3]
    assert sum(flight.train.report.dropped.values()) == 1


def test_where_all_rows_are_bad_there_is_nothing_to_train_on_and_the_reasons_stand_there(write):
    with pytest.raises(DataError, match=r"no training rows(.*\n)+.*completion: found an empty string"):
        prepare(write("sft", [{"prompt": "p", "completion": ""}] * 3, on_bad_row="drop"))


def test_a_stream_leaves_bad_rows_out_from_the_first_on(write, tmp_path):
    good, bad = {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""}
    source = [{"path": str(tmp_path / "train.jsonl"), "streaming": True}]
    rows, keys = [good, bad, good], {"data": None, "datasets": source, "val_batches": 0}
    with pytest.raises(DataError, match="empty string"):
        prepare(write("sft", rows, **keys))
    flight = prepare(write("sft", rows, on_bad_row="drop", **keys))
    assert {row.line for row in flight.train.rows} == {1, 3}
    assert any("left out, not usable as it stands" in note for note in flight.take_notes())


@pytest.mark.parametrize("split", ["valid", "test"])
def test_bad_rows_of_the_other_splits_are_refused_or_left_out_too(split, write, tmp_path):
    good, bad = {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""}
    (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good)))
    keys = {"test": split == "test", "val_batches": 1}
    with pytest.raises(DataError, match=rf"{split}\.jsonl:2: completion: found an empty string"):
        prepare(write("sft", [good] * 3, **keys))
    flight = prepare(write("sft", [good] * 3, on_bad_row="drop", **keys))
    assert [row.line for row in getattr(flight, split).rows] == [1, 3]
    console = Console(file=io.StringIO(), width=200)
    show(flight, console)
    assert f"{split}: 1 bad rows left out (on_bad_row: drop)" in console.file.getvalue().splitlines()


def test_a_streams_first_rows_validate_without_the_bad_ones(write, tmp_path):
    good, bad = {"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""}
    source = [{"path": str(tmp_path / "train.jsonl"), "streaming": True}]
    rows = [good, bad, *({**good, "prompt": f"{n}"} for n in range(6))]
    keys = {"data": None, "datasets": source, "val_set_size": 3, "batch_size": 2}
    with pytest.raises(DataError, match=r"train\.jsonl:2: completion: found an empty string"):
        prepare(write("sft", rows, **keys))
    flight = prepare(write("sft", rows, on_bad_row="drop", **keys))
    assert [row.line for row in flight.valid.rows] == [1, 3]
    assert "valid: 1 bad rows left out (on_bad_row: drop)" in flight.valid.notes


def test_problems_are_raised_when_there_are_many_and_reasons_are_few_where_rows_are_left_out():
    raised = BadRows("raise")
    for line in range(MAX_PROBLEMS - 1):
        raised.add(DataError(f"f:{line}: wrong"))
    with pytest.raises(DataError, match="perhaps more"):
        raised.add(DataError(f"f:{MAX_PROBLEMS}: wrong"))
    assert raised.count == MAX_PROBLEMS
    dropped = BadRows("drop")
    for line in range(100):
        dropped.add(DataError(f"f:{line}: wrong in way {line % 30}\nf:{line}: and in another"))
    dropped.finish()
    lines = list(dropped.lines("valid"))
    assert lines[0] == "valid: 100 bad rows left out (on_bad_row: drop)"
    assert lines[1] == "valid:   4 of them: wrong in way 0; and in another; first: f:0, f:30, f:60"
    assert lines[-1] == "valid:   22 more reasons"


# Labels of single answers


@pytest.mark.parametrize(("label", "wanted"), [(1, True), (0, False), (1.0, True), (0.0, False), ("1", True)])
def test_labels_may_be_numbers(label, wanted, write):
    row = {"prompt": "p", "completion": "c", "label": label}
    assert [row.label for row in prepare(write("kto", [row])).train.rows] == [wanted]


@pytest.mark.parametrize("label", [2, -1, 0.5, "2", "yes", [1], None])
def test_no_other_number_is_a_label(label, write):
    with pytest.raises(DataError, match=r"label|unpaired|kto"):
        prepare(write("kto", [{"prompt": "p", "completion": "c", "label": label}]))


def test_labels_of_a_table_are_numbers_in_words(tmp_path, model_folder):
    with (tmp_path / "train.csv").open("w") as file:
        csv.writer(file).writerows([["prompt", "completion", "label"], ["p", "c", "1"], ["p", "d", "0"]])
    source = [{"path": str(tmp_path / "train.csv")}]
    keys = {"model": str(model_folder), "datasets": source, "objective": "kto", "iters": 2}
    assert [row.label for row in prepare(Recipe.model_validate(keys)).train.rows] == [True, False]


def test_a_number_beside_an_answer_is_no_label_for_other_objectives(write):
    row = {"prompt": "p", "completion": "c", "label": 1}
    assert len(prepare(write("sft", [row])).train.rows) == 1


# What is told of Adam


ADAM = r"adamw? runs without bias correction and without warm-up: its first updates are up to 6\.\d times"


@pytest.mark.parametrize(
    ("keys", "is_told"),
    [
        ({}, True),
        ({"optimizer": "adamw"}, True),
        ({"optimizer": "muon"}, True),
        ({"warmup_ratio": 0.1}, False),
        ({"lr_schedule": {"name": "cosine_decay", "warmup": 5}}, False),
        ({"optimizer_config": {"adam": {"bias_correction": True}}}, False),
        ({"optimizer": "adamw", "optimizer_config": {"adam": {"bias_correction": True}}}, True),
        ({"optimizer_config": {"adam": {"betas": [0.0, 0.0]}}}, False),
        ({"optimizer": "sgd"}, False),
        ({"optimizer": "adafactor"}, False),
    ],
)
def test_adam_without_bias_correction_and_warm_up_is_told_before_the_first_step(keys, is_told, write):
    flight = prepare(write("sft", [{"prompt": "p", "completion": "c"}] * 8, **{"iters": 100, **keys}))
    console = Console(file=io.StringIO(), width=300)
    show(flight, console)
    shown = console.file.getvalue()
    assert ("bias correction" in shown) == bool(re.search(ADAM, shown)) == is_told


@pytest.mark.parametrize("num_steps", [3, 40])
def test_the_number_told_is_what_mlx_does(num_steps):
    weight, optimizer, sizes = {"w": mx.zeros((1,))}, optim.Adam(1.0), []
    optimizer.init(weight)
    for _ in range(num_steps):
        moved = optimizer.apply_gradients({"w": mx.ones((1,))}, weight)
        sizes.append(float(weight["w"][0] - moved["w"][0]))
        weight = moved
    (line,) = adam_lines(Recipe.model_validate({"model": "m", "data": "d"}), num_steps)
    assert f"up to {max(sizes):.1f} times learning_rate (step {1 + sizes.index(max(sizes))})" in line
