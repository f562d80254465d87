"""Laws of stop ids: they are what ended the answers that were trained, and nothing that a cut left at their end."""

from __future__ import annotations

from datetime import date

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serve.model.template_rules import make_template
from train.data.example import Example
from train.data.rules import TokenRules
from train.data.stops import stop_ids
from train.data.tokens import tokenize
from train.recipe.recipe import Recipe

SPECIAL = [
    *("</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"),
    *("<tool>", "</tool>"),
]
PLAIN = ["<think>", "</think>", "[END]"]
"""Tokens that are not called special."""
OPENS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chat(end: str, after: str = "\n") -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        + end
        + after
        + "{% endfor %}"
        + OPENS
    )


def tokenizer_of(template: str | None) -> TokenizerWrapper:
    """One token a byte; the base's own end token is </s>."""
    names = [*SPECIAL, *PLAIN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    inner.add_tokens([AddedToken(token, normalized=False) for token in PLAIN])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, eos_token="</s>")
    return TokenizerWrapper(fast)


def conversation(*contents: str, line: int = 1) -> Example:
    roles = ("user", "assistant")
    return Example(
        "r", line, messages=tuple({"role": roles[i % 2], "content": c} for i, c in enumerate(contents))
    )


TALK = [conversation("hi", "hello", "and?", "bye"), conversation("a", "b", line=2)]
PAIR = [
    Example(
        "r",
        1,
        messages=({"role": "user", "content": "hi"},),
        chosen=({"role": "assistant", "content": "hello"},),
        rejected=({"role": "assistant", "content": "no"},),
    )
]
LABELLED = [Example("r", n, prompt="hi", completion=word, label=bool(n)) for n, word in enumerate(("a", "b"))]

ASKED = [Example("r", 1, prompt="hi", fields={})]
GRPO = {
    "objective": "grpo",
    "batch_size": 4,
    "grpo": {"num_generations": 4, "rewards": [{"kind": "regex", "pattern": "a"}]},
}


def ends_of(template: str | None, examples: list[Example], **knobs) -> set[str]:
    tokenizer = tokenizer_of(template)
    rules = TokenRules.of_recipe(Recipe(model="m", data="d", **knobs), date(2026, 1, 1))
    made = make_template(tokenizer, rules.template)
    rows, _ = tokenize(examples, made, rules)
    assert rows
    return set(tokenizer.convert_ids_to_tokens(list(stop_ids(rows, made, rules))))


@pytest.mark.parametrize("after", ["", "\n", " \n\n"])
@pytest.mark.parametrize("end", ["</s>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "[END]"])
def test_what_ends_a_templates_turns_is_the_stop_id_whatever_follows_it(end, after):
    assert ends_of(chat(end, after), TALK) == {end}


@pytest.mark.parametrize(
    ("template", "examples", "knobs", "expected"),
    [
        (chat("<|im_end|>"), TALK, {"mask_prompt": False}, {"<|im_end|>"}),
        (chat("<|im_end|>"), TALK, {"train_on_eos": "last"}, {"<|im_end|>"}),
        (chat("<|im_end|>"), TALK, {"train_on_eos": "none"}, set()),
        (chat("<|im_end|>"), TALK, {"roles_to_train": ("user", "assistant")}, {"<|im_end|>"}),
        (chat("<|im_end|>"), PAIR, {"objective": "dpo"}, {"<|im_end|>"}),
        (chat("<|im_end|>"), LABELLED, {"objective": "kto", "batch_size": 2}, {"<|im_end|>"}),
        (chat("<|im_end|>"), ASKED, GRPO, {"<|im_end|>"}),
        (None, ASKED, GRPO, set()),
        (chat("", "\n"), TALK, {}, {"<|im_start|>"}),
        (chat("", "\n").replace("<|im_start|>", "# "), TALK, {}, set()),
        (None, [Example("r", 1, text="words")], {}, {"</s>"}),
        (None, [Example("r", 1, prompt="a", completion="b")], {}, {"</s>"}),
        (chat("<|im_end|>"), [Example("r", 1, text="words")], {"objective": "cpt"}, set()),
    ],
    ids=[
        *("prompts too", "the last end", "no end", "two roles", "pairs", "labels", "rollouts"),
        *(
            "rollouts of texts",
            "the next turn's marker",
            "no end in the template",
            "text",
            "a completion",
            "documents",
        ),
    ],
)
def test_stop_ids_are_what_the_rows_teach(template, examples, knobs, expected):
    assert ends_of(template, examples, **knobs) == expected


@pytest.mark.parametrize("mark", ["<tool>", "</think>", "<|eot_id|>"])
@pytest.mark.parametrize("eos", ["turn", "last"])
def test_a_token_that_a_cut_left_at_the_end_is_no_stop_id(mark, eos):
    """Control tokens come into answers by the template: here before each word of the last."""
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for word in m.content.split() %}"
        + mark
        + "{{ word }}{% endfor %}<|im_end|>\n{% endfor %}"
        + OPENS
    )
    for limit in range(25, 45):
        found = ends_of(
            source, [conversation("hi", "a b c d e f g h")], max_seq_length=limit, train_on_eos=eos
        )
        assert found <= {"<|im_end|>"}, limit
    assert ends_of(source, [conversation("hi", "a b c")], train_on_eos=eos) == {"<|im_end|>"}
