"""Laws of row formats: each kind is known by its keys, gives the turns it says, and is refused where it is no use."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import datasets
import pytest

from serve.errors import ConfigError, DataError
from train.data.rows import Rules, parse_row
from train.data.sources import read
from train.recipe.objectives import OBJECTIVES
from train.recipe.recipe import DatasetSource, Recipe, load_recipe

ASK, SAY = {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "It left."}
OTHER = {"role": "assistant", "content": "No idea."}
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def parse(row: dict, objective: str = "sft", roles=("assistant",), **entry):
    return parse_row(row, Rules(DatasetSource(path="p", **entry), objective, roles), "f", 3)


def problem_of(row: dict, objective: str = "sft", **entry) -> str:
    with pytest.raises(DataError) as caught:
        parse(row, objective, **entry)
    assert str(caught.value).startswith("f:3: ")
    return str(caught.value)


def turns(example) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in example.as_messages()]


# Conversations


def test_sharegpt_turns_become_messages_and_its_system_line_the_first():
    row = {
        "conversations": [
            {"from": "human", "value": "Where is it?"},
            {"from": "function_call", "value": '{"name": "track", "arguments": {"id": 7}}'},
            {"from": "observation", "value": "left Monday"},
            {"from": "gpt", "value": "It left."},
        ],
        "system": "Be brief.",
        "tools": '[{"name": "track"}]',
    }
    example = parse(row)
    assert turns(example) == [
        ("system", "Be brief."),
        ("user", "Where is it?"),
        ("assistant", ""),
        ("tool", "left Monday"),
        ("assistant", "It left."),
    ]
    (call,) = example.messages[2]["tool_calls"]
    assert call["function"] == {"name": "track", "arguments": {"id": 7}}
    assert example.tools == ({"name": "track"},)


def test_conversations_may_be_spelled_with_role_and_content_too():
    assert turns(parse({"conversations": [ASK, SAY]})) == turns(parse({"messages": [ASK, SAY]}))


def test_alpaca_joins_instruction_and_input_and_its_system_is_a_turn():
    assert turns(parse({"instruction": "Add.", "input": "2 3", "output": "5"})) == [
        ("user", "Add.\n\n2 3"),
        ("assistant", "5"),
    ]
    assert turns(parse({"instruction": "Hi", "input": "", "output": "Ho"})) == [
        ("user", "Hi"),
        ("assistant", "Ho"),
    ]
    with_system = parse({"instruction": "Hi", "output": "Ho", "system": "Rhyme."})
    assert turns(with_system)[0] == ("system", "Rhyme.")


def test_mlx_lms_order_decides_between_text_and_alpaca_and_type_overrides_it():
    row = {"instruction": "a", "output": "b", "text": "whole"}
    assert parse(row).text == "whole"
    assert turns(parse(row, type="alpaca")) == [("user", "a"), ("assistant", "b")]


def test_a_completion_of_turns_is_learned_from_and_the_turns_of_its_prompt_are_not():
    example = parse({"prompt": [ASK, SAY, ASK], "completion": [OTHER]})
    assert [m["content"] for m in example.messages] == [
        "Where is it?",
        "It left.",
        "Where is it?",
        "No idea.",
    ]
    assert example.untrained == (0, 1, 2)


@pytest.mark.parametrize("mark", [{"train": False}, {"training": False}, {"weight": 0}])
def test_a_turn_may_say_that_it_is_not_to_be_learned_from(mark):
    example = parse({"messages": [ASK, {**SAY, **mark}, ASK, OTHER]})
    assert example.untrained == (1,)
    assert set(example.messages[1]) == {"role", "content"}
    assert "marked as not to be trained on" in problem_of({"messages": [ASK, {**SAY, **mark}]})
    with pytest.raises(DataError, match="needs mask_prompt: true"):
        parse({"messages": [ASK, {**SAY, **mark}]}, roles=())


def test_thoughts_and_calls_are_kept_and_a_turn_may_consist_of_them():
    thinking = {"role": "assistant", "content": None, "reasoning_content": "easy"}
    assert parse({"messages": [ASK, thinking]}).messages[1] == thinking
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert parse({"messages": [ASK, SAY], "tools": json.dumps(tools)}).tools == tuple(tools)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"conversations": [{"from": "humn", "value": "x"}]},
            "conversations.0.from: found a string ('humn'); expected",
        ),
        (
            {"conversations": [{"from": "gpt", "value": 3}]},
            "conversations.0.value: found a number (3); expected a string",
        ),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "expected a call as JSON"),
        ({"messages": []}, "messages: found an empty list"),
        ({"messages": [ASK, {**SAY, "thinking": 3}]}, "messages.1.thinking: found a number (3)"),
        ({"messages": [ASK, {**SAY, "weight": 2}]}, "messages.1.weight: found a number (2); expected 0 or 1"),
        ({"messages": [ASK, {**SAY, "train": "no"}]}, "expected true or false"),
        ({"messages": [ASK, {"role": "assistant", "content": None}]}, "messages.1.content: found nothing"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input: found a number (3); expected a string"),
        ({"instruction": "a", "output": ""}, "output: found an empty string"),
        (
            {"prompt": [ASK], "completion": "x"},
            "completion: found a string ('x'); expected a list of messages",
        ),
    ],
)
def test_what_is_wrong_with_a_conversation_is_named_by_its_key(row, words):
    assert words in problem_of(row)


# Preferences


def test_a_pair_of_strings_is_two_answers_to_a_users_turn():
    example = parse({"prompt": "Where is it?", "chosen": "It left.", "rejected": "No idea."}, "dpo")
    assert turns(example) == [("user", "Where is it?")]
    assert (example.chosen, example.rejected) == ((SAY,), (OTHER,))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [SAY], "rejected": [OTHER]},
        {"chosen": [ASK, SAY], "rejected": [ASK, OTHER]},
        {"prompt": "Where is it?", "chosen": [ASK, SAY], "rejected": [ASK, OTHER]},
        {"messages": [ASK], "chosen": [SAY], "rejected": [OTHER]},
        {
            "conversations": [{"from": "human", "value": "Where is it?"}],
            "chosen": {"from": "gpt", "value": "It left."},
            "rejected": {"from": "gpt", "value": "No idea."},
        },
    ],
)
def test_every_spelling_of_a_pair_is_the_same_pair(row):
    example = parse(row, "orpo")
    assert (example.messages, example.chosen, example.rejected) == ((ASK,), (SAY,), (OTHER,))


def test_the_common_beginning_of_two_conversations_is_the_prompt_with_earlier_answers_in_it():
    example = parse({"chosen": [ASK, SAY, ASK, SAY], "rejected": [ASK, SAY, ASK, OTHER]}, "dpo")
    assert example.messages == (ASK, SAY, ASK)


def test_two_equal_conversations_are_a_pair_without_a_difference_not_an_error():
    example = parse({"chosen": [ASK, SAY], "rejected": [ASK, SAY]}, "dpo")
    assert example.chosen == example.rejected == (SAY,)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "chosen": "c"}, "rejected: found nothing; expected a string"),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "chosen: found an empty string; expected text"),
        ({"chosen": "c", "rejected": "r"}, "prompt: found nothing; expected the prompt of both answers"),
        (
            {"prompt": "p", "chosen": "c", "rejected": [OTHER]},
            "chosen: found a string ('c'); expected a list",
        ),
        (
            {"chosen": [ASK], "rejected": [ASK, SAY]},
            "chosen: found no answer after the turns both begin with",
        ),
        ({"chosen": [ASK, SAY], "rejected": [OTHER]}, "begin with different turns"),
        (
            {"prompt": [ASK, SAY], "chosen": [SAY], "rejected": [OTHER]},
            "the prompt ends with the assistant's turn",
        ),
        (
            {"prompt": "Who?", "chosen": [ASK, SAY], "rejected": [ASK, OTHER]},
            "prompt: its words are not in the",
        ),
        ({"chosen": [ASK, SAY, ASK], "rejected": [ASK, OTHER]}, "found turns of assistant, user; expected"),
        (
            {"text": "t"},
            "objective dpo needs chosen and rejected, after a prompt; rows of text are for objective sft",
        ),
    ],
)
def test_what_is_wrong_with_a_pair_is_named(row, words):
    assert words in problem_of(row, "dpo")


# Feedback


def test_feedback_is_an_answer_and_a_label_however_spelled():
    plain = parse({"prompt": "Where is it?", "completion": "It left.", "label": True}, "kto")
    assert (plain.prompt, plain.completion, plain.label) == ("Where is it?", "It left.", True)
    chat = parse({"messages": [ASK, SAY, ASK, OTHER], "label": False}, "kto")
    assert (chat.label, chat.untrained) == (False, (0, 1, 2))
    listed = parse({"prompt": [ASK], "completion": [SAY], "label": "True"}, "kto")
    assert (listed.label, listed.messages, listed.untrained) == (True, (ASK, SAY), (0,))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p", "completion": "c", "label": 2}, "label: found a number (2); expected true or false"),
        (
            {"prompt": "p", "completion": "c", "label": "yes"},
            "label: found a string ('yes'); expected true or false",
        ),
        ({"prompt": "p", "completion": "c"}, "objective kto needs prompt, completion and label"),
        (
            {"messages": [SAY, ASK], "label": True},
            "the last turn is of user; expected the assistant's answer",
        ),
    ],
)
def test_what_is_wrong_with_feedback_is_named(row, words):
    assert words in problem_of(row, "kto")


def test_answers_that_may_be_unwanted_are_not_learned_by_accident():
    row = {"prompt": "p", "completion": "c", "label": False}
    said = problem_of(row)
    assert "write objective: kto, or type: completion" in said
    assert parse(row, type="completion").completion == "c"
    assert parse({**row, "label": "billing"}).completion == "c"  # a column of that name which is no feedback


# Prompts


def test_a_prompt_row_keeps_its_other_columns_for_the_reward():
    example = parse({"prompt": "2+2?", "answer": "4", "level": 1}, "grpo")
    assert (example.prompt, example.fields) == ("2+2?", {"answer": "4", "level": 1})
    asked = parse({"question": "2+2?", "answer": "4"}, "grpo", prompt_feature="question")
    assert (asked.prompt, asked.fields) == ("2+2?", {"answer": "4"})
    chat = parse({"messages": [ASK], "answer": 4}, "grpo")
    assert (chat.messages, chat.fields) == ((ASK,), {"answer": 4})


def test_a_row_for_a_drafter_is_what_is_asked_whatever_was_answered():
    system, again = {"role": "system", "content": "s"}, {"role": "user", "content": "and?"}
    rows = [
        ((ASK,), [{"messages": [ASK]}, {"messages": [ASK, SAY]}, {"messages": [ASK, SAY, SAY]}]),
        ((system, ASK, SAY, again), [{"messages": [system, ASK, SAY, again, SAY], "tag": "x"}]),
    ]
    for asked, written in rows:
        for row in written:
            example = parse(row, "draft")
            assert (example.messages, example.fields) == (asked, {})
    told = parse({"instruction": "add", "input": "2 and 2", "output": "4"}, "draft")
    assert "add" in told.prompt
    assert "4" not in told.prompt
    assert (parse({"prompt": "p", "completion": "c"}, "draft").completion) is None
    assert "found nothing" in problem_of({"messages": [SAY]}, "draft")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"question": "q", "answer": "a"},
            "objective grpo needs prompt, or messages that end with the user's turn",
        ),
        ({"prompt": ""}, "prompt: found an empty string"),
        ({"messages": [ASK, SAY]}, "the prompt ends with the assistant's turn"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_named(row, words):
    assert words in problem_of(row, "grpo")


# Objectives and kinds


SAMPLES = {
    "chat": {"messages": [ASK, SAY]},
    "completion": {"prompt": "p", "completion": "c"},
    "text": {"text": "t"},
    "alpaca": {"instruction": "a", "output": "b"},
    "sharegpt": {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    "preference": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "unpaired": {"prompt": "p", "completion": "c", "label": True},
    "prompt": {"prompt": "p"},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", SAMPLES)
def test_an_objective_takes_its_own_kinds_of_rows_and_says_what_it_needs_for_the_others(objective, kind):
    row = SAMPLES[kind]
    answers_anew = OBJECTIVES[objective].answers_anew and kind in ("chat", "sharegpt", "alpaca")
    is_prompt = OBJECTIVES[objective].asks and "prompt" in row
    if kind in OBJECTIVES[objective].kinds or is_prompt or answers_anew:
        assert parse(row, objective).line == 3
    elif objective == "grpo" and kind in ("chat", "sharegpt"):
        assert "the prompt ends with the assistant's turn" in problem_of(row, objective)
    else:
        assert f"objective {objective} needs" in problem_of(row, objective)


def test_a_type_that_an_objective_cannot_use_is_refused_in_the_recipe(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: m\nobjective: dpo\ndatasets: [{path: a, type: chat}]\n")
    with pytest.raises(ConfigError, match=r"datasets.0.type: found chat; objective dpo needs rows of chosen"):
        load_recipe(file)


# Files


def test_csv_and_gzipped_rows_are_those_of_jsonl(tmp_path):
    rows = [{"prompt": f"a, {n}", "completion": 'two\n"lines"'} for n in range(3)]
    jsonl, packed, table = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz", tmp_path / "c.csv"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion", "note"])
        writer.writeheader()
        writer.writerows(rows)
    found = {
        path: read(Recipe(model="m", datasets=[{"path": str(path)}]), "train")
        for path in (jsonl, packed, table)
    }
    said = [[(e.prompt, e.completion) for e in examples] for examples in found.values()]
    assert said[0] == said[1] == said[2]
    assert [e.line for e in found[packed]] == [1, 2, 3]
    assert [e.line for e in found[table]] == [2, 4, 6]  # where each row starts, its cells having lines


def test_csv_labels_are_words_and_messages_json(tmp_path):
    table = tmp_path / "c.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["messages", "label"], [json.dumps([ASK, SAY]), "False"]])
    (example,) = read(Recipe(model="m", objective="kto", datasets=[{"path": str(table)}]), "train")
    assert (example.messages, example.label) == ((ASK, SAY), False)


def test_a_folder_may_hold_any_of_the_formats(tmp_path):
    (tmp_path / "train.csv").write_text("text\nhello\n")
    datasets.Dataset.from_list([{"text": "valid"}]).to_parquet(str(tmp_path / "valid.parquet"))
    recipe = Recipe(model="m", data=str(tmp_path))
    assert [read(recipe, split)[0].text for split in ("train", "valid")] == ["hello", "valid"]


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs the public data in {SHARED}")
def test_public_data_is_read_as_it_stands():
    wikisql = read(Recipe(model="m", data=str(SHARED / "wikisql")), "train")
    assert len(wikisql) == 1000
    assert wikisql[0].text.startswith("table: ")
    gsm8k = {
        "path": str(SHARED / "gsm8k" / "test.jsonl"),
        "prompt_feature": "question",
        "completion_feature": "answer",
    }
    answered = read(Recipe(model="m", datasets=[gsm8k]), "train")
    grpo = {"rewards": [{"kind": "regex", "pattern": "####"}]}
    asked = read(Recipe(model="m", objective="grpo", batch_size=8, grpo=grpo, datasets=[gsm8k]), "train")
    assert len(answered) == len(asked) == 1319
    assert answered[0].completion == asked[0].fields["answer"]


# Keys beside the turns that change what a row means

HI, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
SPELLINGS = {
    "messages": {"messages": [HI, YES]},
    "conversations": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
    "prompt and completion": {"prompt": "hi", "completion": "yes"},
    "alpaca": {"instruction": "hi", "output": "yes"},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_system_beside_the_turns_is_the_first_of_them_however_they_are_spelled(spelling):
    example = parse({**SPELLINGS[spelling], "system": "Be kind."})
    assert turns(example) == [("system", "Be kind."), ("user", "hi"), ("assistant", "yes")]
    assert turns(parse({**SPELLINGS[spelling], "system": ""})) == turns(parse(SPELLINGS[spelling]))
    assert "system: found a number (3)" in problem_of({**SPELLINGS[spelling], "system": 3})


def test_a_system_beside_a_pair_or_a_prompt_is_before_its_prompt():
    pair = parse({"prompt": "hi", "chosen": "yes", "rejected": "no", "system": "Be kind."}, "dpo")
    assert [turn["role"] for turn in pair.messages] == ["system", "user"]
    prompt = parse({"prompt": "hi", "system": "Be kind.", "gold": "x"}, "grpo", roles=())
    assert ([turn["role"] for turn in prompt.messages], prompt.fields) == (["system", "user"], {"gold": "x"})


def test_turns_marked_as_context_stay_the_same_turns_after_a_system_before_them():
    row = {"messages": [HI, {**YES, "train": False}, HI, YES]}
    first, second = parse(row), parse({**row, "system": "Be kind."})
    assert (first.untrained, second.untrained) == ((1,), (2,))
    feedback = parse({"messages": [HI, YES, HI, YES], "label": True, "system": "Be kind."}, "kto")
    assert feedback.untrained == (1, 2, 3)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_second_system_turn_of_other_words_is_refused(role):
    row = {"messages": [{"role": role, "content": "Be kind."}, HI, YES]}
    assert "other words in the conversation's own" in problem_of({**row, "system": "Be brief."})
    assert turns(parse({**row, "system": " Be kind.\n"})) == turns(parse(row))


def test_alpacas_history_is_the_turns_before_its_question():
    row = {"instruction": "and now?", "output": "yes", "history": [["hi", "hello"], ["sure?", "quite"]]}
    said = ["hi", "hello", "sure?", "quite", "and now?", "yes"]
    assert [words for _, words in turns(parse(row))] == said
    assert turns(parse({**row, "history": []})) == [("user", "and now?"), ("assistant", "yes")]
    assert turns(parse({**row, "history": json.dumps(row["history"])})) == turns(parse(row))
    for pair in (["hi"], ["hi", 3], ["hi", "hello", "and"], "hi"):
        assert "history.1: found" in problem_of({**row, "history": [["hi", "hello"], pair]})
    assert "history: only rows of instruction" in problem_of({"messages": [HI, YES], "history": [["a", "b"]]})


def test_alpacas_history_is_before_a_pairs_question_and_before_one_alone():
    row = {"instruction": "and now?", "history": [["hi", "hello"]]}
    pair = parse({**row, "chosen": "yes", "rejected": "no"}, "dpo")
    assert [turn["content"] for turn in pair.messages] == ["hi", "hello", "and now?"]


def test_openais_earlier_names_of_tools_are_tools():
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    row = {"messages": [HI, called, {"role": "function", "name": "f", "content": "1"}, YES]}
    example = parse({**row, "functions": [{"name": "f", "parameters": {}}]})
    assert example.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert [turn["role"] for turn in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert "functions: found beside tools" in problem_of({**row, "functions": [{}], "tools": [{"name": "f"}]})
    assert parse({**row, "functions": json.dumps([{"name": "f", "parameters": {}}])}).tools == example.tools
    assert "functions: found" in problem_of({**row, "functions": "f"})
    assert "functions: found" in problem_of({**row, "functions": ["f"]})


def test_variables_of_a_row_are_its_own():
    assert parse({"messages": [HI, YES], "chat_template_kwargs": {"a": 1, "b": None}}).variables == {"a": 1}
    assert "chat_template_kwargs: found" in problem_of({"messages": [HI, YES], "chat_template_kwargs": "a"})


def calling(arguments: dict) -> dict:
    return {**YES, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


CALL = "messages.1.tool_calls.0.function.arguments"
PLACES = {  # where it is named -> a row that says the given words there, some inside JSON text
    "messages.1.content": lambda x: {"messages": [HI, {**YES, "content": x}]},
    "messages.1.thinking": lambda x: {"messages": [HI, {**YES, "thinking": x}]},
    "completion": lambda x: {"prompt": "hi", "completion": x},
    "conversations.0.value": lambda x: {
        "conversations": [{"from": "human", "value": x}, {"from": "gpt", "value": "yes"}]
    },
    "instruction": lambda x: {"instruction": x, "output": "yes"},
    "history.0.0": lambda x: {"instruction": "hi", "output": "yes", "history": [[x, "a"]]},
    "text": lambda x: {"text": x},
    "system": lambda x: {"messages": [HI, YES], "system": x},
    "chat_template_kwargs.a": lambda x: {"messages": [HI, YES], "chat_template_kwargs": {"a": x}},
    "a key of chat_template_kwargs": lambda x: {"messages": [HI, YES], "chat_template_kwargs": {x: 1}},
    f"{CALL}.a": lambda x: {"messages": [HI, calling({"a": x})]},
    f"a key of {CALL}": lambda x: {"messages": [HI, calling({x: 1})]},
    "tools.0.name": lambda x: {"messages": [HI, YES], "tools": [{"name": x}]},
    "tools.1.name": lambda x: {"messages": [HI, YES], "tools": json.dumps([{"name": "f"}, {"name": x}])},
    "messages.0.content": lambda x: {"messages": json.dumps([{**HI, "content": x}, YES])},
    f"{CALL}.a.0": lambda x: {
        "conversations": [
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"a": [x]}})},
        ]
    },
}


@pytest.mark.parametrize("shown", [r"\ud83d", r"\udbff", r"\udc00", r"\udfff"])
@pytest.mark.parametrize("place", PLACES)
def test_half_a_surrogate_pair_is_named_by_where_it_stands(place, shown):
    half = json.loads(f'"{shown}"')
    said = problem_of(PLACES[place](f"no {half}"))
    assert (
        said
        == f"f:3: {place}: found half a surrogate pair ({shown}) at character 4; expected whole characters"
    )
    assert parse(PLACES[place]("no 🙂")).line == 3


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_half_a_surrogate_pair_matters_only_in_what_is_used(spelling):
    row = json.loads(json.dumps(SPELLINGS[spelling]).replace('"yes"', '"no \\ud83d"'))
    assert r"(\ud83d)" in problem_of(row)
    assert parse({**SPELLINGS[spelling], "note": "\ud83d"}) == parse(SPELLINGS[spelling])


def test_an_empty_list_of_calls_is_no_call():
    assert turns(parse({"messages": [HI, {**YES, "tool_calls": []}]})) == [
        ("user", "hi"),
        ("assistant", "yes"),
    ]
