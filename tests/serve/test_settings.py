"""Laws of the strict YAML reader, on a small configuration of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from serve.errors import ConfigError
from serve.settings import Strict, dump, load_yaml


class Inner(Strict):
    path: str
    """Where it is."""
    share: float = Field(default=0.5, ge=0, le=1)


class Outer(Strict):
    rate: float = 1e-3
    rows: int = Field(default=4, ge=1)
    is_fast: bool = False
    kind: Literal["plain", "fancy"] = "plain"
    name: str = "x"
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    pair: tuple[float, float] | None = None


def problems_of(text: str, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load_yaml(text, Outer, **options)
    return str(caught.value)


def test_a_float_without_a_dot_is_a_float():
    assert load_yaml("rate: 1e-5\n", Outer).rate == 1e-5
    assert load_yaml("rate: 1E+2\n", Outer).rate == 100.0
    assert load_yaml("rate: 3\n", Outer).rate == 3.0


@pytest.mark.parametrize("word", ["no", "on", "yes", "off", "010", "1:30", "2024-01-01", "y", "1e5x"])
def test_a_word_that_yaml_1_1_would_convert_stays_a_word(word):
    assert load_yaml(f"name: {word}\n", Outer).name == word


def test_a_word_in_place_of_a_boolean_is_told_what_to_write():
    assert problems_of("is_fast: yes\n") == (
        "<text>:1: is_fast: found 'yes'; expected boolean; write true (only true and false are booleans here)"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rows: '3'\n", "rows: found '3'; expected integer"),
        ("rows: true\n", "rows: found True; expected integer"),
        ("rows: 2.0\n", "rows: found 2.0; expected integer"),
        ("is_fast: 1\n", "is_fast: found 1; expected boolean"),
        ("name: 3\n", "name: found 3; expected string"),
        ("rate: .nan\n", "rate: found nan"),
        ("rows: 0\n", "greater than or equal to 1"),
        ("inner: 3\n", "inner: found 3"),
        ("pair: [1]\n", "pair"),
    ],
)
def test_a_wrong_type_is_refused_never_converted(text, words):
    assert words in problems_of(text)


def test_a_repeated_key_is_refused_with_both_lines():
    text = "rate: 1\nrows: 2\nrate: 3\ninner:\n  path: a\n  path: b\n"
    said = problems_of(text)
    assert "<text>:3: rate: written twice, first on line 1; keep one" in said
    assert "<text>:6: inner.path: written twice, first on line 5; keep one" in said


def test_all_problems_are_told_at_once_in_order_each_with_its_line(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("rows: 0\nrat: 1\nkind: fanzy\nmany:\n  - path: a\n    share: 2\n  - pth: b\n")
    with pytest.raises(ConfigError) as caught:
        load_yaml(file, Outer)
    assert [line.strip() for line in str(caught.value).splitlines()] == [
        f"{file} has 6 problems:",
        f"{file}:1: rows: found 0; expected greater than or equal to 1",
        f"{file}:2: rat: unknown key; did you mean rate?",
        f"{file}:3: kind: found 'fanzy'; expected 'plain' or 'fancy'; did you mean fancy?",
        f"{file}:6: many.0.share: found 2; expected less than or equal to 1",
        f"{file}:7: many.1.path: missing; expected: Where it is.",
        f"{file}:7: many.1.pth: unknown key; did you mean path?",
    ]


def test_null_counts_as_not_written_but_not_for_an_unknown_key():
    assert load_yaml("rows: null\ninner: ~\n", Outer) == Outer()
    assert "rwos: unknown key" in problems_of("rwos: null\n")


def test_overrides_win_and_reach_into_mappings_and_lists():
    text = "rows: 1\nmany:\n  - path: a\n"
    got = load_yaml(text, Outer, ["rows=7", "inner.path=b", "many.0.share=1e-1", "kind=fancy"])
    expected = Outer(rows=7, kind="fancy", inner=Inner(path="b"), many=(Inner(path="a", share=0.1),))
    assert got == expected


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rows", "expected key=value"),
        ("rows=many", "--set rows=many: rows: found 'many'; expected integer"),
        ("rows.x=1", "rows is 1, which has no key x"),
        ("many.5.path=a", "many has 1 items"),
        ("rwos=1", "--set rwos=1: rwos: unknown key; did you mean rows?"),
    ],
)
def test_an_override_that_cannot_be_is_named(override, words):
    assert words in problems_of("rows: 1\nmany:\n  - path: a\n", overrides=[override])


def test_an_alias_is_the_knob_itself_and_both_spellings_are_refused():
    aliases = {"lines": "rows", "folder": "inner.path"}
    assert load_yaml("lines: 3\nfolder: a\n", Outer, aliases=aliases) == Outer(rows=3, inner=Inner(path="a"))
    assert load_yaml("rows: 3\n", Outer, ["lines=4"], aliases=aliases).rows == 4
    assert "<text>:2: lines: the same knob as rows" in problems_of("rows: 3\nlines: 4\n", aliases=aliases)
    assert "<text>:1: rows: found 'a'" in problems_of("lines: a\n", aliases=aliases)


def test_a_foreign_key_is_refused_with_what_to_write():
    assert problems_of("lr: 1\n", foreign={"lr": "write rate"}) == "<text>:1: lr: unknown key; write rate"


def test_dump_reads_back_to_an_equal_model_and_dumps_the_same():
    config = Outer(
        rate=1e-5, name="1e-5", inner=Inner(path="on"), many=(Inner(path="010"), Inner(path="null"))
    )
    assert load_yaml(dump(config), Outer) == config
    assert dump(load_yaml(dump(config), Outer)) == dump(config)


def test_merged_and_shared_nodes_are_read():
    text = "inner: &base\n  path: a\nmany:\n  - <<: *base\n    share: 1\n  - *base\n"
    assert load_yaml(text, Outer).many == (Inner(path="a", share=1.0), Inner(path="a"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rows: [1\n", "not YAML"),
        ("- a\n", "expected a mapping"),
        ("a: !!python/object:os.system {}\n", "not YAML"),
        ("inner: &a\n  path: *a\n", "not YAML"),
        ("[a]: 1\n", "not YAML"),
    ],
)
def test_what_is_no_configuration_at_all_is_a_config_error(text, words):
    assert words in problems_of(text)


def test_a_missing_file_is_a_config_error_that_names_it(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_yaml(tmp_path / "nowhere.yaml", Outer)
