"""Rewards: what they give, and what they say when they cannot be had or give nonsense."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from serve.errors import ConfigError, DataError, TrainingError
from serve.settings import load_yaml
from train.data.rows import Rules, parse_row
from train.objectives.rewards import Answer, Scorer
from train.recipe.grpo import GRPOConfig
from train.recipe.recipe import DatasetSource, Recipe

CODE = """
def brevity(completions, **columns):
    return [1 / (1 + len(text)) for text in completions]

def is_customer(completions, prompts, customer):
    return [float(name in turns[0]["content"]) for turns, name in zip(completions, customer)]

def columns_seen(completions, prompts, completion_ids, customer, product="?", **rest):
    return [len(completion_ids[0]) + 10 * len(rest)] * len(prompts)

def only_long(completions):
    return [None if len(text) < 4 else 1.0 for text in completions]

def raises(completions):
    raise KeyError("colour")

def too_few(completions):
    return [1.0]

def not_a_number(completions):
    return [1.0, float("nan")]

def words(completions):
    return ["good"] * len(completions)

def about_nothing(prompts):
    return [0.0] * len(prompts)

answer = 42
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(CODE)
    return path


def scorer(*rewards: dict) -> Scorer:
    return Scorer(GRPOConfig.model_validate({"rewards": rewards}).rewards)


def of(path: Path, *names: str, **more: object) -> Scorer:
    return scorer(*({"kind": "function", "name": f"{path}:{name}", **more} for name in names))


def answers(*texts: str, **fields: object) -> list[Answer]:
    return [Answer("Say it.", text, (1, 2, 3), fields, f"rows.jsonl:{i + 1}") for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("pattern", "text", "field", "expected"),
    [
        (r"\d+", "it is 42", None, 1.0),
        (r"^\d+$", "it is 42", None, 0.0),
        (r"it is (\d+)", "it is 42", "right", 1.0),
        (r"it is (\d+)", "it is 43", "right", 0.0),
        (r"(is) (?P<answer>\d+)", "it is 42", "right", 1.0),
        (r"\d+", "42", "right", 1.0),
        (r"no", "42", "right", 0.0),
        (r"(x)?\d+", "42", "right", 0.0),
    ],
)
def test_a_pattern_is_found_and_its_group_compared(pattern, text, field, expected):
    reward = scorer({"kind": "regex", "pattern": pattern, "field": field})
    assert reward.score(answers(text, right=42)).tolist() == [[expected]]


SCHEMA = {"type": "object", "properties": {"team": {"enum": ["a", "b"]}}, "required": ["team"]}


@pytest.mark.parametrize(
    ("reward", "text", "expected"),
    [
        ({}, '{"team": 1}', 1.0),
        ({}, "team", 0.0),
        ({}, '```json\n{"team": 1}\n```', 1.0),
        ({"required": ["team"]}, '{"team": 1}', 1.0),
        ({"required": ["team"]}, '["team"]', 0.0),
        ({"required": ["team", "who"]}, '{"team": 1}', 0.0),
        ({"json_schema": SCHEMA}, '{"team": "a"}', 1.0),
        ({"json_schema": SCHEMA}, '{"team": "c"}', 0.0),
        ({"equals": {"team": "right", "n": "number"}}, '{"team": "a", "n": 3}', 1.0),
        ({"equals": {"team": "right", "n": "number"}}, '{"team": "b", "n": 3}', 0.5),
        ({"equals": {"team": "right", "n": "number"}}, '{"n": "3"}', 0.5),
        ({"equals": {"team": "right"}}, '"a"', 0.0),
    ],
)
def test_json_answers_are_worth_the_share_that_is_right(reward, text, expected):
    found = scorer({"kind": "json", **reward}).score(answers(text, right="a", number=3))
    assert found.tolist() == [[expected]]


def test_functions_are_called_as_trl_calls_them(code):
    text = of(code, "brevity", "columns_seen").score(answers("abc", "", customer="Ana", colour="red"))
    assert text.tolist() == [[0.25, 13.0], [1.0, 13.0]]
    asked = [{"role": "user", "content": "Who?"}]
    chat = [Answer(asked, "It is Ana.", fields={"customer": "Ana", "unused": 1})]
    assert of(code, "is_customer").score(chat).tolist() == [[1.0]]


def test_rewards_are_weighted_and_a_none_counts_for_nothing(code):
    reward = scorer(
        {"kind": "function", "name": f"{code}:only_long", "weight": 2.0},
        {"kind": "regex", "pattern": "b", "weight": -0.5},
        {"kind": "regex", "pattern": "a"},
    )
    scores = reward.score(answers("abcd", "ab"))
    assert reward.names == ("only_long", "regex", "regex_2")
    assert math.isnan(scores[1, 0])
    assert reward.total(scores).tolist() == [2.5, 0.5]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raises", "raises raised KeyError: 'colour', on answers to rows.jsonl:1, rows.jsonl:2"),
        ("too_few", "too_few gave 1 numbers for 2 answers"),
        ("not_a_number", "not_a_number gave nan for an answer to rows.jsonl:2"),
        ("words", "words gave 'good' for an answer to rows.jsonl:1"),
        ("only_long", "no reward scored the answer to rows.jsonl:2"),
    ],
)
def test_a_reward_that_fails_is_named_with_the_row(name, said, code):
    with pytest.raises(TrainingError) as caught:
        of(code, name).score(answers("abcd", "a"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing.py:f", "nothing.py: no such file"),
        ("{code}:brevety", "no function brevety; found brevity, is_customer"),
        ("{code}:answer", "no function answer"),
        ("{code}:about_nothing", "takes prompts; expected completions"),
        ("no.such.module:f", "importing no.such.module raised ModuleNotFoundError"),
        ("{broken}:f", "raised ZeroDivisionError"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused_by_name(name, said, code, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(ConfigError) as caught:
        scorer({"kind": "function", "name": name.format(code=code, broken=broken)})
    assert said in str(caught.value)


def test_rows_without_a_column_that_a_reward_needs_are_named_before_training(code):
    reward = scorer(
        {"kind": "regex", "pattern": "x", "field": "team"},
        {"kind": "json", "equals": {"a": "team"}},
        {"kind": "function", "name": f"{code}:is_customer"},
    )
    rules = Rules(DatasetSource(path="rows.jsonl"), "grpo", needs=reward.needs)
    parse_row({"prompt": "p", "team": 1, "customer": 2}, rules, "rows.jsonl", 1)
    with pytest.raises(DataError) as caught:
        parse_row({"prompt": "p", "colour": 1}, rules, "rows.jsonl", 2)
    lines = str(caught.value).splitlines()
    assert lines[0] == "rows.jsonl:2: no column team, which the reward regex needs; found colour"
    assert len(lines) == 3


BASE = "model: m\ndata: d\nbatch_size: 8\n"
STREAM = "data: null\ndatasets: [{path: d, streaming: true}]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("objective: grpo", "grpo: missing; objective grpo needs"),
        ("dpo: {beta: 0.2}", "dpo: has no effect with objective: sft; write objective: dpo"),
        ("objective: dpo\nkto: {}", "kto: has no effect with objective: dpo"),
        ("objective: dpo\ndpo: {loss_type: ipo, label_smoothing: 0.1}", "no effect with ipo"),
        (
            "objective: dpo\ndpo: {loss_type: robust}",
            "label_smoothing: found 0, with which robust is sigmoid",
        ),
        (
            "objective: dpo\nfine_tune_type: full",
            "full changes the weights that the reference of dpo is made of",
        ),
        ("objective: kto\nbatch_size: 1", "expected 2 or more"),
        ("objective: dpo\nmetric: {name: exact_match}", "look at rewards/accuracies or rewards/margins"),
        ("objective: dpo\nsample_packing: true", "packing is for sft and cpt"),
        (
            "objective: orpo\nmetric_for_best_model: reward",
            "found reward, which objective orpo does not measure",
        ),
        ("objective: grpo\ngrpo: {num_generations: 3, rewards: [{kind: json}]}", "expected a multiple of"),
        ("objective: grpo\ngrpo: {epsilon: 0.2, rewards: [{kind: json}]}", "nothing is clipped"),
        ("objective: grpo\ngrpo: {num_iterations: 2, rewards: [{kind: json}]}", "expected 1"),
        ("objective: grpo\ngrpo: {rewards: [{kind: regex, pattern: '('}]}", "not a regular expression"),
        ("objective: grpo\ngrpo: {rewards: [{kind: json, json_schema: {type: 3}}]}", "not a JSON Schema"),
        ("objective: grpo\ngrpo: {rewards: [{kind: regx}]}", "rewards.0.kind: found 'regx'; expected one of"),
        (
            "objective: grpo\ngrpo: {rewards: [{pattern: x}]}",
            "rewards.0.kind: found nothing; expected one of",
        ),
        (
            "objective: grpo\ngrpo: {rewards: [{kind: function, name: f}]}",
            "rewards.0.name: found 'f'; expected",
        ),
        ("objective: grpo\ngrpo: {rewards: []}", "grpo.rewards"),
        (STREAM + "objective: grpo\ngrpo: {rewards: [{kind: json}]}", "which a stream does not keep"),
        ("rl: dpo", "rl: unknown key; write objective"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_by_key(text, said):
    lines = [line for line in BASE.splitlines() if f"\n{line.split(':')[0]}: " not in f"\n{text}"]
    whole = "\n".join([*lines, text])
    with pytest.raises(ConfigError) as caught:
        load_yaml(whole, Recipe, foreign={"rl": "write objective"})
    assert said in str(caught.value)


def test_an_objective_has_its_own_block_and_no_other():
    recipe = load_yaml(BASE + "objective: dpo", Recipe)
    assert recipe.dpo is not None
    assert recipe.dpo.beta == 0.1
    assert (recipe.orpo, recipe.kto, recipe.grpo) == (None, None, None)
    assert load_yaml(
        BASE + "objective: grpo\ngrpo: {num_iterations: 1, rewards: [{kind: json}]}", Recipe
    ).grpo
