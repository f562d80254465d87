"""Laws of tokenizing: the mask is exactly the answers, nothing is cut in silence, rows without targets are told."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, TextDataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from serve.errors import DataError
from serve.model.template import ChatTemplate
from serve.model.template_rules import make_template
from train.data.batches import collate
from train.data.example import Example
from train.data.rules import TokenRules
from train.data.tokens import ENDLESS, tokenize
from train.recipe.recipe import Recipe

CHATML = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last or m.role == 'user' else '…' }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None) -> TokenizerWrapper:
    """One token a byte."""
    special = ["<|im_start|>", "<|im_end|>"]
    vocab = {token: n for n, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, eos_token="<|im_end|>")
    return TokenizerWrapper(fast)


TOKENIZER = make_tokenizer(CHATML)
BARE = make_tokenizer(None)


def recipe(**knobs) -> Recipe:
    return Recipe(model="m", data="d", **knobs)


def conversation(*contents: str, line: int = 1) -> Example:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[i % 2], "content": content} for i, content in enumerate(contents))
    return Example("rows.jsonl", line, messages=messages)


def run(examples, tokenizer=TOKENIZER, **knobs):
    rules = TokenRules.of_recipe(recipe(**knobs), date(2026, 1, 1))
    return tokenize(examples, make_template(tokenizer, rules.template), rules)


def targets(row, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode(row.token_ids[row.is_target].tolist())


def test_the_mask_is_every_answer_with_its_end_and_not_one_token_more():
    (row,), _ = run([conversation("hi", "hello", "and?", "bye")])
    assert targets(row) == "hello<|im_end|>bye<|im_end|>"
    assert row.token_ids.dtype == np.int32
    after_answer = [t for t in range(1, len(row)) if row.is_target[t - 1] and not row.is_target[t]]
    assert [TOKENIZER.decode([int(row.token_ids[t])]) for t in after_answer] == ["\n", "\n"]


def test_with_mask_prompt_off_every_token_but_the_first_counts():
    (row,), report = run([conversation("hi", "hello")], mask_prompt=False)
    assert row.is_target.tolist() == [False] + [True] * (len(row) - 1)
    assert report.num_targets == report.num_tokens - 1


def test_tokens_are_those_of_mlx_lm():
    chat, pair = conversation("hi", "hello"), Example("f", 1, prompt="p?", completion="c.")
    text = Example("f", 1, text="Once upon a time")
    ours = [run([example])[0][0].token_ids.tolist() for example in (chat, pair, text)]
    messages = {"messages": [dict(m) for m in chat.messages]}
    theirs = [
        ChatDataset([], TOKENIZER).process(messages)[0],
        CompletionsDataset([], TOKENIZER, "prompt", "completion", True).process(
            {"prompt": "p?", "completion": "c."}
        )[0],
        TextDataset([], TOKENIZER).process({"text": "Once upon a time"})[0],
    ]
    assert ours == theirs


def test_prompt_and_completion_are_a_turn_each_where_there_is_a_template_and_plain_where_not():
    pair = Example("f", 1, prompt="2+2=", completion="4")
    (row,), _ = run([pair])
    assert targets(row) == "4<|im_end|>"
    assert TOKENIZER.decode(row.token_ids.tolist()).startswith("<|im_start|>user\n2+2=<|im_end|>")
    (plain,), _ = run([pair], BARE)
    assert BARE.decode(plain.token_ids.tolist()) == "2+2=4<|im_end|>"
    assert targets(plain, BARE) == "4<|im_end|>"
    (open_end,), _ = run([pair], BARE, train_on_eos="none")
    assert targets(open_end, BARE) == "4"


def test_text_is_supervised_whole_and_ends_with_one_end_token():
    (row,), _ = run([Example("f", 1, text="abc")])
    assert TOKENIZER.decode(row.token_ids.tolist()) == "abc<|im_end|>"
    assert row.is_target.tolist() == [False, True, True, True]


def test_a_prompt_longer_than_the_limit_is_dropped_and_told_never_kept_without_targets():
    rows, report = run([conversation("x" * 200, "y"), conversation("hi", "hello", line=7)], max_seq_length=64)
    assert [row.line for row in rows] == [7]
    assert report.dropped == {"nothing supervised is left within max_seq_length": 1}
    assert report.dropped_places == ("rows.jsonl:1",)


def test_excess_length_is_truncated_dropped_or_raised_as_asked():
    examples = [conversation("hi", "y" * 100), conversation("hi", "hello", line=2)]
    rows, report = run(examples, max_seq_length=50)
    assert [len(row) for row in rows] == [50, len(rows[1])]
    assert (report.num_truncated, report.dropped) == (1, {})
    rows, report = run(examples, max_seq_length=50, excess_length_strategy="drop")
    assert [row.line for row in rows] == [2]
    assert report.dropped == {"longer than max_seq_length": 1}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: \d+ tokens; max_seq_length is 50"):
        run(examples, max_seq_length=50, excess_length_strategy="raise")


def test_a_row_that_fits_exactly_is_not_touched():
    (row,), _ = run([conversation("hi", "hello")])
    exactly = {"max_seq_length": len(row), "excess_length_strategy": "drop"}
    (again,), report = run([conversation("hi", "hello")], **exactly)
    assert again.token_ids.tolist() == row.token_ids.tolist()
    assert report.num_truncated == 0


def test_a_row_with_no_turn_to_learn_from_is_dropped_and_told():
    rows, report = run([conversation("hi", "hello")], roles_to_train=("tool",))
    assert rows == []
    assert report.dropped == {"nothing in it is supervised": 1}


def test_a_template_that_rewrites_history_gives_a_sequence_a_turn():
    tokenizer = make_tokenizer(REWRITES)
    rows, report = run([conversation("a", "first", "b", "second")], tokenizer)
    assert [targets(row, tokenizer) for row in rows] == ["first<|im_end|>", "second<|im_end|>"]
    assert (report.num_read, report.num_sequences) == (1, 2)


def test_rows_the_template_refuses_are_named_all_at_once():
    bad = [Example("f", line, messages=({"role": "tool", "content": "x"},)) for line in (3, 9)]
    with pytest.raises(DataError) as caught:
        run(bad, roles_to_train=("tool",))
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == ["f:3:", "f:9:"]


def test_the_report_adds_up():
    rows, report = run([conversation("hi", "y" * n, line=n) for n in range(1, 60)])
    assert report.num_read == report.num_sequences == len(rows) == 59
    assert report.num_tokens == sum(len(row) for row in rows)
    assert report.num_targets == sum(row.num_targets for row in rows) == sum(n + 1 for n in range(1, 60))
    assert sum(count for _, count in report.histogram) == 59
    assert report.longest == max(len(row) for row in rows)
    assert all(bound & (bound - 1) == 0 for bound, _ in report.histogram)


def test_no_rows_give_an_empty_report():
    rows, report = run([])
    assert (rows, report.num_sequences, report.longest, report.histogram) == ([], 0, 0, ())


# Objectives

ASK, SAY, OTHER = (
    {"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("assistant", "no"))
)
KNOWS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pair(line: int = 1, before=(ASK,), chosen=(SAY,), rejected=(OTHER,)) -> Example:
    return Example("f", line, messages=before, chosen=chosen, rejected=rejected)


def test_documents_are_supervised_whole_and_split_so_that_each_token_is_predicted_once():
    text = "".join(chr(97 + n % 26) for n in range(100))
    rows, report = run([Example("f", 1, text=text)], objective="cpt", max_seq_length=16)
    assert max(len(row) for row in rows) == 16
    whole = "".join(TOKENIZER.decode(row.token_ids[row.is_target].tolist()) for row in rows)
    assert whole == text[1:] + "<|im_end|>"
    assert report.num_truncated == 0
    (cut,), report = run(
        [Example("f", 1, text=text)], objective="cpt", max_seq_length=16, excess_length_strategy="truncate"
    )
    assert (len(cut), report.num_truncated) == (16, 1)


@pytest.mark.parametrize("length", [15, 16, 17, 30, 31, 32])
def test_splitting_leaves_no_piece_without_targets(length):
    rows, _ = run([Example("f", 1, text="x" * (length - 1))], objective="cpt", max_seq_length=16)
    assert all(row.num_targets for row in rows)
    assert sum(row.num_targets for row in rows) == length - 1


def test_conversations_under_cpt_are_rendered_and_supervised_whole():
    (row,), _ = run([conversation("hi", "hello")], objective="cpt")
    assert row.is_target.tolist() == [False] + [True] * (len(row) - 1)
    assert TOKENIZER.decode(row.token_ids.tolist()).startswith("<|im_start|>user")


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_a_pair_is_two_answers_after_one_prompt_and_only_they_count(objective):
    (row,), report = run([pair(before=(ASK, SAY, ASK))], objective=objective)
    assert (targets(row), targets(row.rejected)) == ("yes<|im_end|>", "no<|im_end|>")
    start = int(np.argmax(row.is_target))
    assert row.token_ids[:start].tolist() == row.rejected.token_ids[:start].tolist()
    assert row.length == max(len(row), len(row.rejected))
    assert report.num_tokens == len(row) + len(row.rejected)
    assert report.num_targets == len("yes") + len("no") + 2


def test_a_pair_of_strings_has_the_tokens_of_its_conversation_and_none_of_a_template_where_there_is_none():
    strings = Example("f", 1, prompt="hi", chosen=(SAY,), rejected=(OTHER,))
    (row,), (same,) = run([strings], objective="dpo")[0], run([pair()], objective="dpo")[0]
    assert row.token_ids.tolist() == same.token_ids.tolist()
    (plain,), _ = run([strings], BARE, objective="dpo")
    assert (targets(plain, BARE), targets(plain.rejected, BARE)) == ("yes<|im_end|>", "no<|im_end|>")


def test_a_pair_without_a_difference_is_dropped_and_told_also_when_only_the_cut_makes_it_so():
    same = pair(1, chosen=(SAY,), rejected=(SAY,))
    long = [{"role": "assistant", "content": "x" * 60 + end} for end in "ab"]
    late = pair(2, chosen=(long[0],), rejected=(long[1],))
    rows, report = run([same, late, pair(3)], objective="dpo", max_seq_length=60)
    assert [row.line for row in rows] == [3]
    assert report.dropped == {"chosen and rejected are the same, so nothing is preferred": 2}
    assert report.places == {"chosen and rejected are the same, so nothing is preferred": ("f:1", "f:2")}


def test_a_pair_is_cut_on_both_sides_and_dropped_if_one_side_keeps_nothing():
    long = {"role": "assistant", "content": "x" * 90}
    (row,), report = run([pair(rejected=(long,))], objective="dpo", max_seq_length=40)
    assert (len(row.rejected), report.num_truncated) == (40, 1)
    assert len(row) < 40
    rows, report = run(
        [pair(before=({"role": "user", "content": "q" * 99},))], objective="dpo", max_seq_length=40
    )
    assert (rows, report.num_without_targets) == ([], 1)


def test_feedback_counts_its_last_answer_alone_and_carries_its_label():
    row = Example("f", 1, messages=(ASK, SAY, ASK, OTHER), untrained=(0, 1, 2), label=False)
    (found,), _ = run([row], objective="kto")
    assert (targets(found), found.label) == ("no<|im_end|>", False)


def test_a_prompt_for_rollouts_is_as_served_and_never_cut():
    row = Example("f", 1, prompt="2+2?", fields={"answer": "4"})
    grpo = {"objective": "grpo", "batch_size": 8, "grpo": {"rewards": [{"kind": "regex", "pattern": "4"}]}}
    (found,), _ = run([row], **grpo)
    assert tuple(found.token_ids) == ChatTemplate(TOKENIZER).render(row.as_messages())
    assert not found.is_target.any()
    assert found.fields == {"answer": "4"}
    rows, report = run([row], **grpo, max_seq_length=8)
    assert rows == []
    assert list(report.dropped) == ["a prompt longer than max_seq_length, and no prompt once cut"]


def test_what_the_template_leaves_out_is_told_once_with_the_first_place():
    thinking = {**SAY, "reasoning_content": "they greet me"}
    call = {**SAY, "tool_calls": [{"function": {"name": "wave", "arguments": {}}}]}
    rows = [
        Example("f", 1, messages=(ASK, SAY)),
        Example("f", 2, messages=(ASK, thinking)),
        Example("f", 3, messages=(ASK, thinking)),
        Example("f", 4, messages=(ASK, call), tools=({"name": "wave"},)),
    ]
    _, report = run(rows)
    assert report.lost == {"reasoning_content": (2, "f:2"), "tool_calls": (1, "f:4"), "tools": (1, "f:4")}
    (row,), report = run(rows[1:2], make_tokenizer(KNOWS_THOUGHTS))
    assert report.lost == {}
    assert "(they greet me)yes" in TOKENIZER.decode(row.token_ids[row.is_target].tolist())


def test_a_template_that_reads_thoughts_under_one_name_gets_them_from_rows_with_another():
    knows = make_tokenizer(KNOWS_THOUGHTS)
    named = [
        run([Example("f", 1, messages=(ASK, {**SAY, name: "hm"}))], knows)
        for name in ("thinking", "reasoning_content")
    ]
    assert named[0][0][0].token_ids.tolist() == named[1][0][0].token_ids.tolist()


def test_control_tokens_in_messages_are_words_and_in_texts_are_tokens_unless_the_recipe_says_so():
    said = "a<|im_end|>\n<|im_start|>system\nb"
    (words,), _ = run([conversation(said, "hello<|im_end|>")])
    (control,), _ = run([conversation(said, "hello<|im_end|>")], special_tokens_in_messages="control")
    (text,), _ = run([Example("f", 1, text=said)])
    end = TOKENIZER.eos_token_id
    assert [row.token_ids.tolist().count(end) for row in (words, control, text)] == [2, 4, 2]
    # A quoted end token that is a token ends the turn: the engine would stop there.
    assert (targets(words), targets(control)) == ("hello<|im_end|><|im_end|>", "hello<|im_end|>")
    assert words.token_ids[words.is_target].tolist().count(end) == 1
    served = ChatTemplate(TOKENIZER).render(conversation(said).messages)
    assert words.token_ids.tolist()[: len(served)] == list(served)


# Traps of other trainers


def test_every_answer_counts_not_only_the_last():
    (row,), _ = run([conversation("a", "first", "b", "second", "c", "third")])
    assert targets(row) == "first<|im_end|>second<|im_end|>third<|im_end|>"


def test_turns_marked_as_context_do_not_count():
    messages = conversation("a", "first", "b", "second").messages
    (row,), _ = run([Example("f", 1, messages=messages, untrained=(1,))])
    assert targets(row) == "second<|im_end|>"


def test_no_padding_is_ever_a_target_and_the_last_token_of_each_row_is():
    rows, _ = run([conversation("hi", "y" * n, line=n) for n in (1, 9, 30)], train_on_eos="turn")
    batch = collate(rows, (0, 1, 2))
    for place, row in enumerate(rows):
        last = int(np.flatnonzero(batch.is_target[place]).max())
        assert last == int(np.flatnonzero(row.is_target).max()) < len(row)
        assert not batch.is_target[place, len(row) :].any()
    assert batch.num_targets == sum(row.num_targets for row in rows)


def test_counts_of_sources_add_up_to_the_report():
    rows = [Example(f"{n % 2}.jsonl", n, messages=conversation("hi", "y" * n).messages) for n in range(1, 30)]
    _, report = run(rows, max_seq_length=40)
    for name in ("num_read", "num_sequences", "num_truncated", "num_tokens", "num_targets"):
        assert sum(getattr(counts, name) for counts in report.sources.values()) == getattr(report, name)
    assert set(report.sources) == {"0.jsonl", "1.jsonl"}


# What comes once, and what is the template's to say

BEGINS = "<|im_start|>"


def beginning(template: str | None) -> TokenizerWrapper:
    """A tokenizer that begins every text with a token of its own."""
    fast = make_tokenizer(template)._tokenizer
    fast.bos_token = BEGINS
    ids = [(BEGINS, fast.bos_token_id)]
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{BEGINS} $A", None, ids)
    return TokenizerWrapper(fast)


def test_a_text_that_brings_its_own_beginning_has_one_and_it_is_told():
    tokenizer = beginning(None)
    plain, brought = Example("f", 1, text="abc"), Example("f", 2, text=f"{BEGINS}abc")
    (one, other), report = run([plain, brought], tokenizer)
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.token_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert [where for _, where in report.notes.values()] == ["f:2"]
    (pair,), report = run([Example("f", 3, prompt=f"{BEGINS}2+2=", completion="4")], tokenizer)
    assert pair.token_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert len(report.notes) == 1


@pytest.mark.parametrize("end", ["<|im_end|>", "<|im_end|>\n", "<|im_end|> \n\n"])
def test_a_text_that_closes_itself_gets_no_second_end(end):
    rows, _ = run(
        [Example("f", 1, text=f"abc{end}"), Example("f", 2, prompt="a", completion=f"b{end}")], BARE
    )
    assert [row.token_ids.tolist().count(BARE.eos_token_id) for row in rows] == [1, 1]


def test_an_empty_list_of_calls_is_no_call_to_the_template():
    strict = make_tokenizer(
        CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls is defined %}CALLS{% endif %}")
    )
    (row,), _ = run([Example("f", 1, messages=(ASK, {**SAY, "tool_calls": []}))], strict)
    assert targets(row, strict) == "yes<|im_end|>"


def test_a_call_that_the_template_drops_is_a_problem_of_its_row_also_where_the_tools_list_its_name():
    lists_tools = make_tokenizer("{{ tools | tojson if tools }}" + CHATML)
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "wave", "arguments": {}}}],
    }
    row = Example("f", 7, messages=(ASK, call), tools=({"name": "wave"},))
    with pytest.raises(
        DataError, match=r"f:7: messages\.1\.tool_calls: .* does not render the call of 'wave'"
    ):
        run([row], lists_tools)
    said = Example("f", 8, messages=(ASK, {**call, "content": "Hello."}), tools=row.tools)
    _, report = run([said], lists_tools)
    assert report.lost == {"tool_calls": (1, "f:8")}


def test_half_a_surrogate_pair_inside_a_calls_json_is_a_problem_of_its_row():
    call = {"function": {"name": "f", "arguments": r'{"a": "\ud83d"}'}}
    row = Example("f", 7, messages=(ASK, {**SAY, "tool_calls": [call]}))
    with pytest.raises(DataError, match=r"f:7: messages\.1\.tool_calls\.0\.function\.arguments: found half"):
        run([row])


def test_variables_of_a_row_reach_the_template_and_unknown_ones_are_refused_by_name():
    tokenizer = make_tokenizer("{% if mood %}({{ mood }}){% endif %}" + CHATML)
    (row,), _ = run([Example("f", 1, messages=(ASK, SAY), variables={"mood": "calm"})], tokenizer)
    assert TOKENIZER.decode(row.token_ids.tolist()).startswith("(calm)")
    with pytest.raises(DataError, match=r"f:2: chat_template_kwargs: found 'mode'.*: mood"):
        run([Example("f", 2, messages=(ASK, SAY), variables={"mode": 1})], tokenizer)


def opening(switch: str) -> TokenizerWrapper:
    """A tokenizer that knows the marks of thoughts, and a prompt that opens one unless the variable says no."""
    opens = "assistant\n{{ '<think>' if " + f"{switch} is not defined or {switch}" + " }}{% endif %}"
    source = CHATML.replace("assistant\n{% endif %}", opens).replace(
        "{{ m.content }}", "{{ m.thinking }}{{ m.content }}"
    )
    inner = make_tokenizer(source)._tokenizer
    inner.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    return TokenizerWrapper(inner)


def told_lines(report) -> dict[str, tuple[int, str]]:
    return {note: where for note, where in report.notes.items() if note.startswith("rendered with ")}


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_rows_without_thoughts_are_rendered_with_thinking_off_where_the_prompt_opens_one(switch):
    tokenizer = opening(switch)
    template = ChatTemplate(tokenizer)
    assert template.write([ASK]).text.endswith("<think>")
    quiet = [Example("f", n, messages=(ASK, SAY)) for n in (1, 2)]
    thinking = Example("f", 3, messages=(ASK, {**SAY, "thinking": "<think>hm</think>"}))
    rows, report = run([*quiet, thinking], tokenizer)
    assert [targets(row, tokenizer) for row in rows] == [*["yes<|im_end|>"] * 2, "hm</think>yes<|im_end|>"]
    assert report.told == {switch: False}
    (line,) = told_lines(report).items()
    assert line == (f"rendered with {switch}: false, as only then prompt and answer agree", (2, "f:1"))
    prompts = [template.render([ASK], variables={switch: is_on}) for is_on in (False, False, True)]
    for row, prompt in zip(rows, prompts, strict=True):
        assert tuple(row.token_ids[: len(prompt)]) == prompt


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_what_few_rows_were_told_is_not_what_serving_is_told(switch):
    quiet = Example("f", 1, messages=(ASK, SAY))
    thinking = [Example("f", n, messages=(ASK, {**SAY, "thinking": "<think>hm</think>"})) for n in (2, 3)]
    _, report = run([quiet, *thinking], opening(switch))
    assert report.told == {}
    assert list(told_lines(report).values()) == [(1, "f:1")]
    assert run([quiet, thinking[0]], opening(switch))[1].told == {}
    with pytest.raises(DataError, match=r"f:1: .*opens a thought \(<think>\)"):
        run([replace(quiet, variables={switch: True})], opening(switch))
    pair = Example("f", 4, messages=(ASK,), chosen=(SAY,), rejected=(thinking[0].messages[1],))
    with pytest.raises(DataError, match="f:4: one answer has thoughts and the other has none"):
        run([pair], opening(switch), objective="dpo")


def test_variables_of_a_row_reach_the_template_whatever_is_learned_from_it():
    tokenizer = make_tokenizer("{{ mood }}" + CHATML)
    talk, pair = {"messages": (ASK, SAY)}, {"messages": (ASK,), "chosen": (SAY,), "rejected": (OTHER,)}
    grpo = {"grpo": {"rewards": [{"kind": "regex", "pattern": "a"}]}, "batch_size": 8}
    ways = [
        (talk, {}),
        (talk, {"mask_prompt": False}),
        (talk, {"objective": "cpt"}),
        ({**talk, "untrained": (1,)}, {"mask_prompt": False}),
        (pair, {"objective": "dpo"}),
        ({**talk, "label": True}, {"objective": "kto", "batch_size": 2}),
        ({"prompt": "hi", "completion": "yes"}, {}),
        ({"prompt": "hi", "fields": {}}, {"objective": "grpo", **grpo}),
    ]
    for keys, knobs in ways:
        (row,), _ = run([Example("f", 1, **keys, variables={"mood": "(calm)"})], tokenizer, **knobs)
        for sequence in row.sequences:
            assert TOKENIZER.decode(sequence.token_ids.tolist()).startswith("(calm)<|im_start|>")
    with pytest.raises(DataError, match=r"f:1: chat_template_kwargs: found in a row, .* no chat template"):
        run([Example("f", 1, prompt="hi", completion="yes", variables={"mood": "(calm)"})], BARE)


def test_answers_that_end_with_no_token_are_told_before_anything_is_learned():
    endless = make_tokenizer(CHATML.replace("<|im_end|>", "").replace("<|im_start|>", "> "))
    rows, report = run([conversation("hi", "hello", line=4)], endless)
    assert targets(rows[0], endless) == "hello"
    assert [(note, first) for note, (_, first) in report.notes.items()] == [(ENDLESS, "rows.jsonl:4")]
    assert run([conversation("hi", "hello")])[1].notes == {}
    assert run([conversation("hi", "hello")], endless, train_on_eos="none")[1].notes == {}
