"""Laws of `lathe data show`: what it marks is what loss counts, and each row says where it stands."""

from __future__ import annotations

import io
import json
import re
from datetime import date
from pathlib import Path

import pytest
from rich.console import Console

import lathe
from serve.errors import ConfigError
from serve.model.loading import load_tokenizer
from serve.model.template import ChatTemplate
from train.data.rules import TokenRules
from train.data.show import show
from train.data.sources import read
from train.data.tokens import tokenize
from train.foresee import preflight
from train.recipe.recipe import Recipe

MODEL = str(Path(__file__).resolve().parents[2] / "data" / "tickets")
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "It left.\nOn Monday 🙂"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "On its way."},
]


@pytest.fixture
def shown(tmp_path):
    def print_rows(rows: list[dict], *, colour: bool = False, options=None, **knobs) -> str:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = Recipe(model=MODEL, datasets=[{"path": str(file)}], **knobs)
        out = io.StringIO()
        console = Console(
            file=out, width=100, force_terminal=colour, color_system="standard" if colour else None
        )
        show(recipe, console, **(options or {}))
        return out.getvalue().replace(str(tmp_path) + "/", "")

    return print_rows


def marked(text: str) -> str:
    """What stands between brackets, as it was before it was made visible."""
    _legend, _, rows = text.partition("\n")
    inside = "".join(re.findall(r"⟦(.*?)⟧", rows, re.DOTALL))
    return inside.replace("⏎\n    ", "\n")


def test_what_is_marked_is_what_loss_counts(shown, tmp_path):
    text = shown([{"messages": CHAT}])
    assert marked(text) == "It left.\nOn Monday 🙂<|im_end|>On its way.<|im_end|>"
    tokenizer = load_tokenizer(MODEL)
    recipe = Recipe(model=MODEL, datasets=[{"path": str(tmp_path / "rows.jsonl")}])
    (row,), _ = tokenize(
        read(recipe, "train"), ChatTemplate(tokenizer), TokenRules.of_recipe(recipe, date(2026, 1, 1))
    )
    assert marked(text) == tokenizer.decode(row.token_ids[row.is_target].tolist())
    assert f"{len(row)} tokens, {row.num_targets} of them count" in text


def test_each_turn_has_its_role_and_its_tokens_add_up(shown):
    text = shown([{"messages": CHAT}])
    turns = re.findall(r"^  (\w+)  (\d+) tokens(?:, (\d+) count)?$", text, re.MULTILINE)
    assert [role for role, _, _ in turns] == [m["role"] for m in CHAT]
    total, counted = re.search(r"(\d+) tokens, (\d+) of them count", text).groups()
    assert sum(int(count) for _, count, _ in turns) == int(total)
    assert sum(int(count or 0) for _, _, count in turns) == int(counted)
    assert "rows.jsonl:1  train row 1 of 1" in text


def test_on_a_terminal_colour_marks_and_special_tokens_have_their_own(shown):
    text = shown([{"messages": CHAT}], colour=True)
    assert "⟦" not in text
    assert "\x1b[1;4;32mOn its way." in text
    assert "\x1b[36m<|im_start|>" in text


def test_pairs_show_both_answers_and_feedback_its_label(shown):
    text = shown([{"prompt": "Hi", "chosen": "Hello you", "rejected": "Go away"}], objective="dpo")
    assert marked(text) == "Hello you<|im_end|>Go away<|im_end|>"
    assert text.index("chosen: ") < text.index("Hello you") < text.index("rejected: ") < text.index("Go away")
    text = shown([{"prompt": "Hi", "completion": "Go away", "label": False}], objective="kto")
    assert "label: this answer is not wanted" in text


def test_what_is_cut_off_stands_behind_scissors_and_is_not_marked(shown):
    text = shown([{"text": "0123456789" * 9}], max_seq_length=20)
    kept, _, rest = text.partition("    ")[2].partition("✂")
    assert "are beyond max_seq_length 20" in text
    assert re.sub("[⟦⟧]", "", kept) + rest.strip().removesuffix("<|im_end|>") == "0123456789" * 9
    assert "⟦" not in rest


def test_a_row_that_is_dropped_or_refused_is_shown_with_the_reason(shown):
    text = shown([{"messages": CHAT}], max_seq_length=8)
    assert "not trained on: nothing supervised is left within max_seq_length" in text
    tool = {"messages": [*CHAT[:2], {"role": "tool", "content": "x"}, CHAT[-1]]}
    assert "this model knows the roles system, user and assistant, not tool" in shown([tool])
    same = {"prompt": "Hi", "chosen": "Hello", "rejected": "Hello"}
    text = shown([same], objective="dpo")
    assert "not trained on: chosen and rejected are the same" in text
    assert text.count("Hello") == 2


def test_rows_are_chosen_by_count_number_and_split(shown):
    rows = [{"text": f"row number {n}"} for n in range(1, 9)]
    assert shown(rows, options={"rows": 2}).count("train row") == 2
    text = shown(rows, options={"row": 5})
    assert "rows.jsonl:5  train row 5 of 8" in text
    assert text.count("train row") == 1
    assert shown(rows, options={"split": "valid", "rows": 9}, val_set_size=3).count("valid row") == 3
    with pytest.raises(ConfigError, match="--row 9: train has 8 rows"):
        shown(rows, options={"row": 9})
    with pytest.raises(ConfigError, match="--split valid: the recipe has no such rows"):
        shown(rows, options={"split": "valid"})


def test_a_streams_first_rows_are_shown(tmp_path):
    file = tmp_path / "s.jsonl"
    file.write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(50)))
    recipe = Recipe(model=MODEL, datasets=[{"path": str(file), "streaming": True}], val_set_size=4)
    out = io.StringIO()
    show(recipe, Console(file=out, width=100), rows=2)
    assert "s.jsonl:5  train row 1 of a stream" in out.getvalue()
    assert out.getvalue().count("train row") == 2


def test_what_a_reward_looks_at_is_shown_with_its_prompt(shown):
    grpo = {"rewards": [{"kind": "regex", "pattern": "4"}]}
    text = shown([{"prompt": "2+2?", "answer": "4"}], objective="grpo", batch_size=8, grpo=grpo)
    assert "for the reward: answer = '4'" in text
    assert "⟦" not in text.split("\n", 1)[1]


# The preflight's blocks


def test_the_preflight_tells_counts_reasons_losses_and_duplicates(tmp_path):
    rows = [
        {"messages": CHAT},
        {"messages": CHAT},
        {"prompt": "x " * 80, "completion": "y"},
        {"messages": [CHAT[1], {**CHAT[2], "reasoning_content": "it left on Monday, so I say so"}]},
    ]
    for name, held in (("train", rows), ("valid", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "train.jsonl").write_text('{"text": "a document"}\n')
    recipe = Recipe(
        model=MODEL,
        datasets=[{"path": str(tmp_path)}, {"path": str(tmp_path / "more")}],
        max_seq_length=100,
        iters=1,
    )
    out = io.StringIO()
    preflight.show(preflight.prepare(recipe), Console(file=out, width=300))
    text = out.getvalue().replace(str(tmp_path) + "/", "")
    lines = {re.sub(r"[│ ]+", " ", line).strip() for line in text.splitlines()}
    assert {"rows read 5 1", "sequences 4 1", "truncated 0 0", "dropped 1 0", "without targets 1 0"} <= lines
    assert any(re.fullmatch(r"train.jsonl 4 3 0 1 \d+ \d+", line) for line in lines)
    assert any(re.fullmatch(r"more/train.jsonl 1 1 0 0 \d+ \d+", line) for line in lines)
    assert "train: 1 dropped: nothing supervised is left within max_seq_length; at train.jsonl:3" in text
    assert "train: the chat template leaves out reasoning_content in 1 rows (first: train.jsonl:4)" in text
    assert "train: 1 rows repeat the content of an earlier one (kept" in text
    assert "train.jsonl:1 = train.jsonl:2" in text
    assert "leakage: 2 training rows stand in the validation rows too" in text
    assert "train.jsonl:1 = valid.jsonl:1" in text


def test_the_command_prints_rows_and_refuses_what_it_does_not_know(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": "hello"}\n')
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {MODEL}\ndatasets: [{{path: rows.jsonl}}]\n")
    with pytest.raises(SystemExit) as ended:
        lathe.main(["data", "show", str(file), "--rows", "1"])
    assert ended.value.code == 0
    assert "rows.jsonl:1  train row 1 of 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        lathe.main(["data", "show", str(file), "--split", "tset"])
    assert ended.value.code == 2
    assert "expected train or valid or test" in capsys.readouterr().err
