"""Laws of prepared rows: cached, in one process or in several, they are the rows tokenizing gives; nothing stale."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import date
from pathlib import Path

import pytest

from serve.errors import DataError
from serve.model.loading import load_tokenizer
from serve.model.template import ChatTemplate
from serve.model.template_rules import TemplateRules, make_template
from train.data import cache, tokens
from train.data.example import Example
from train.data.prepared import prepare_rows
from train.data.rules import TokenRules
from train.data.tokens import Outcome, tokenize
from train.recipe.recipe import Recipe

DAY = date(2026, 1, 1)
MODEL = str(Path(__file__).resolve().parents[2] / "data" / "tickets")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    def run(examples, *, model: str = MODEL, tokenizer=tokenizer, today: date = DAY, **knobs):
        knobs = {"dataset_prepared_path": str(tmp_path / "kept"), "dataset_processes": 1, **knobs}
        recipe = Recipe(model=model, data="d", **knobs)
        rules = TokenRules.of_recipe(recipe, today)
        return prepare_rows("train", examples, recipe, make_template(tokenizer, rules.template), rules)

    return run


def chats(count: int = 12, source: str = "a.jsonl") -> list[Example]:
    return [
        Example(
            source, n, prompt=f"Ticket {n}: the lamp is late.", completion=f"We look into {n}. " * (n % 4 + 1)
        )
        for n in range(1, count + 1)
    ]


def same(one, other) -> bool:
    def plain(row):
        sides = [(s.token_ids.tolist(), s.is_target.tolist(), str(s.token_ids.dtype)) for s in row.sequences]
        return sides, row.source, row.line, row.label, row.fields

    return [plain(row) for row in one.rows] == [
        plain(row) for row in other.rows
    ] and one.report == other.report


KINDS = {
    "sft": (chats(), {}),
    "sft with drops": (
        [*chats(), Example("a", 99, prompt="x " * 99, completion="y")],
        {"max_seq_length": 32},
    ),
    "cpt": (
        [Example("a", n, text="word " * n) for n in range(1, 30)],
        {"objective": "cpt", "max_seq_length": 9},
    ),
    "dpo": (
        [
            Example(
                "a",
                n,
                prompt="Hi",
                chosen=({"role": "assistant", "content": "yes " * n},),
                rejected=({"role": "assistant", "content": "no" if n != 3 else "yes " * n},),
            )
            for n in range(1, 9)
        ],
        {"objective": "dpo"},
    ),
    "kto": (
        [Example("a", n, prompt="Hi", completion="yes", label=n % 2 == 0) for n in range(1, 9)],
        {"objective": "kto"},
    ),
    "grpo": (
        [Example("a", n, prompt=f"{n}?", fields={"answer": n}) for n in range(1, 9)],
        {"objective": "grpo", "batch_size": 8, "grpo": {"rewards": [{"kind": "regex", "pattern": "1"}]}},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_cached_rows_and_their_report_are_those_of_tokenizing(kind, prepare, tokenizer):
    examples, knobs = KINDS[kind]
    fresh, again = prepare(examples, **knobs), prepare(examples, **knobs)
    assert "tokenized in" in fresh.notes[0]
    assert "taken from" in again.notes[0]
    assert same(fresh, again)
    rules = TokenRules.of_recipe(Recipe(model=MODEL, data="d", **knobs), DAY)
    rows, report = tokenize(examples, ChatTemplate(tokenizer), rules)
    assert report == fresh.report
    assert [row.token_ids.tolist() for row in rows] == [row.token_ids.tolist() for row in fresh.rows]


@pytest.mark.parametrize("name", [field.name for field in fields(Outcome) if field.name != "problems"])
def test_all_that_became_of_a_row_is_kept_but_problems_which_no_kept_row_has(name, tokenizer, tmp_path):
    (example,) = chats(1)
    rules = TokenRules.of_recipe(Recipe(model=MODEL, data="d"), DAY)
    became = {
        "rows": tokens.tokenize_row(example, ChatTemplate(tokenizer), rules).rows,
        "num_truncated": 1,
        "dropped": ("too long",),
        "lost": ("tools",),
        "notes": ("were changed",),
        "told": {"thinking": False},
    }
    outcome = Outcome(**{name: became[name]})
    cache.save(tmp_path / "kept", [Outcome(), outcome])
    found = cache.load(tmp_path / "kept", [example, example])[1]
    if name == "rows":
        assert [row.token_ids.tolist() for row in found.rows] == [
            row.token_ids.tolist() for row in outcome.rows
        ]
    else:
        assert found == outcome != Outcome()


def test_places_come_from_the_rows_at_hand_so_a_moved_file_is_still_known(prepare):
    prepare(chats())
    moved = prepare(chats(source="b.jsonl"))
    assert "taken from" in moved.notes[0]
    assert {row.source for row in moved.rows} == {"b.jsonl"}


KNOBS = {
    "max_seq_length": 20,
    "excess_length_strategy": "drop",
    "mask_prompt": False,
    "train_on_eos": "none",
    "roles_to_train": ("user", "assistant"),
    "objective": "cpt",
    "special_tokens_in_messages": "control",
}
OF_TEMPLATES = {"source": "{{ messages }}{{ strftime_now('%d') }}", "variables": {"style": 1}, "today": DAY}


@pytest.mark.parametrize("name", KNOBS)
def test_every_knob_that_tokens_depend_on_makes_another_file(name, prepare):
    prepare(chats())
    assert "tokenized in" in prepare(chats(), **{name: KNOBS[name]}).notes[0]


@pytest.mark.parametrize("name", [*KNOBS, *OF_TEMPLATES])
def test_every_rule_is_in_the_key(name, tokenizer):
    template = TemplateRules(source="{{ style }}{{ strftime_now('%d') }}", today=date(2020, 1, 1))
    rules = TokenRules.of(Recipe(model=MODEL, data="d"), template)
    if name in KNOBS and name != "special_tokens_in_messages":
        other = replace(rules, **{name: KNOBS[name]})
    else:
        other = replace(rules, template=replace(template, **{name: {**KNOBS, **OF_TEMPLATES}[name]}))
    keys = {cache.key_of(chats(), make_template(tokenizer, one.template), one) for one in (rules, other)}
    assert len(keys) == 2


def test_these_are_all_the_rules_and_what_tokenizes_is_given_no_recipe():
    names = {field.name for field in (*fields(TokenRules), *fields(TemplateRules))} - {"template"}
    assert names == {*KNOBS, *OF_TEMPLATES}
    assert "train.recipe.recipe" not in Path(tokens.__file__).read_text()


def test_other_rows_another_tokenizer_and_another_template_make_another_file(prepare, tokenizer):
    rules, template = TokenRules.of_recipe(Recipe(model=MODEL, data="d"), DAY), ChatTemplate(tokenizer)
    before = cache.key_of(chats(), template, rules)
    assert before == cache.key_of(chats(), ChatTemplate(tokenizer), rules)
    changed = [*chats()[:-1], Example("a", 1, prompt="other", completion="words")]
    assert cache.key_of(changed, template, rules) != before
    assert cache.key_of(chats()[::-1], template, rules) != before
    other = load_tokenizer(MODEL)
    other._tokenizer.chat_template = other.chat_template + " "
    assert cache.key_of(chats(), ChatTemplate(other), rules) != before
    more = load_tokenizer(MODEL)
    more._tokenizer.add_tokens(["lamp"])
    assert cache.key_of(chats(), ChatTemplate(more), rules) != before


@pytest.mark.parametrize("damage", ["truncated", "one bit", "emptied", "another's"])
def test_a_damaged_file_is_told_and_made_again(damage, prepare, tmp_path):
    fresh = prepare(chats())
    (file,) = (tmp_path / "kept").glob("*.tokens")
    content = bytearray(file.read_bytes())
    if damage == "one bit":
        content[-3] ^= 1
    elif damage == "another's":
        prepare(chats(5))
        content = next(f for f in (tmp_path / "kept").glob("*.tokens") if f != file).read_bytes()
    file.write_bytes({"truncated": content[:-40], "emptied": b""}.get(damage, content))
    mended = prepare(chats())
    assert "is damaged" in mended.notes[0]
    assert "tokenized in" in mended.notes[1]
    assert same(fresh, mended)
    assert "taken from" in prepare(chats()).notes[0]


def test_nothing_half_written_is_left_and_rows_with_problems_are_not_kept(prepare, tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:2: \d+ tokens"):
        prepare(chats(), max_seq_length=8, excess_length_strategy="raise")
    assert not (tmp_path / "kept").exists()
    prepare(chats())
    assert [file.suffix for file in (tmp_path / "kept").iterdir()] == [".tokens"]


def test_a_folder_that_cannot_be_written_is_told_and_the_run_goes_on(prepare, tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = prepare(chats(), dataset_prepared_path=str(tmp_path / "file" / "kept"))
    assert len(found.rows) == 12
    assert "cannot be kept" in found.notes[-1]


def test_rows_that_stand_twice_are_tokenized_once_and_counted_twice(prepare):
    examples = chats(4)
    found = prepare(examples * 2 + examples[:1])
    assert "4 rows tokenized" in found.notes[0]
    assert [row.line for row in found.rows] == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert found.report.num_read == 9


def test_the_default_folder_keeps_what_was_used_last(tmp_path):
    for number in range(5):
        file = tmp_path / f"{number}.tokens"
        file.write_bytes(b"x" * 10)
        cache.os.utime(file, (number, number))
    cache.prune(tmp_path, max_bytes=30)
    assert sorted(file.stem for file in tmp_path.iterdir()) == ["2", "3", "4"]


def test_several_processes_give_the_rows_of_one_in_order(prepare, tmp_path):
    examples = [*chats(150), Example("a.jsonl", 151, prompt="x " * 99, completion="y")]
    alone = prepare(examples, max_seq_length=64)
    elsewhere = str(tmp_path / "elsewhere")
    spread = prepare(examples, max_seq_length=64, dataset_processes=2, dataset_prepared_path=elsewhere)
    assert "by 2 processes" in spread.notes[0]
    assert same(alone, spread)
