"""Laws of templates from files: the text is as if they were the tokenizer's own; variables, the day, refusals."""

from __future__ import annotations

from datetime import date, datetime
from importlib.resources import files

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from serve.errors import ConfigError, RequestError
from serve.model.template import ChatTemplate
from serve.model.template_rules import TemplateRules, make_template

HI = {"role": "user", "content": "hi"}
TALK = (HI, {"role": "assistant", "content": "hello"}, HI)
DAY = date(2020, 2, 29)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
PUBLIC = {
    path.name.removesuffix(".jinja"): path.read_text()
    for path in files("trl").joinpath("chat_templates").iterdir()
    if path.name.endswith(".jinja")
}
"""Chat templates of real models, which nobody here wrote."""


class OwnMethod(PreTrainedTokenizerFast):
    """A tokenizer whose template is code."""

    def apply_chat_template(self, conversation, tokenize=True, **_):
        return "".join(f"({message['content']})" for message in conversation)


def tokenizer_of(template: object = None, kind: type = PreTrainedTokenizerFast, **more) -> TokenizerWrapper:
    """One token a byte."""
    vocab = {token: n for n, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.add_special_tokens(SPECIAL)
    fast = kind(tokenizer_object=inner, chat_template=template, bos_token="<s>", eos_token="</s>")
    return TokenizerWrapper(fast, **more)


OTHERS = {
    "none": lambda: tokenizer_of(),
    "another": lambda: tokenizer_of("{{ messages[0].content }}"),
    "several by name": lambda: tokenizer_of({"default": "a", "tool_use": "b"}),
    "a method": lambda: tokenizer_of(kind=OwnMethod),
    "a function of mlx-lm's": lambda: tokenizer_of(chat_template=lambda messages, **_: "c"),
}


def written(template: ChatTemplate) -> str:
    try:
        return template.write(TALK).text
    except RequestError as error:
        return str(error)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_template_from_a_file_renders_and_is_hashed_as_if_it_were_the_tokenizers_own(name):
    own = make_template(tokenizer_of(PUBLIC[name]), TemplateRules(today=DAY))
    given = make_template(tokenizer_of(), TemplateRules(source=PUBLIC[name], today=DAY))
    assert written(given) == written(own)
    assert (given.hash, given.variables, given.day) == (own.hash, own.variables, own.day)
    assert given.end_ids == own.end_ids
    assert given.day == ("2020-02-29" if "strftime_now" in PUBLIC[name] else "")


def test_there_are_public_templates_and_some_print_the_day():
    assert len(PUBLIC) > 50
    assert 2 < sum("strftime_now" in source for source in PUBLIC.values()) < len(PUBLIC)


@pytest.mark.parametrize("kind", OTHERS)
def test_whatever_template_a_tokenizer_has_the_one_from_a_file_is_used_and_its_own_stays(kind):
    tokenizer = OTHERS[kind]()
    before = ChatTemplate(tokenizer)
    given = make_template(
        tokenizer, TemplateRules(source="{{ messages[0].role }}: {{ messages[0].content }}")
    )
    assert given.write([HI]).text == "user: hi"
    assert given.render([HI]) == tuple(tokenizer.encode("user: hi", add_special_tokens=False))
    assert ChatTemplate(tokenizer).hash == before.hash != given.hash
    assert ChatTemplate(tokenizer).exists == before.exists == (kind != "none")


def test_variables_are_set_where_a_request_does_not_say_otherwise():
    template = make_template(
        tokenizer_of("{{ style }}{{ loud }}"), TemplateRules(variables={"style": "short", "loud": False})
    )
    assert template.write([HI]).text == "shortFalse"
    assert template.write([HI], variables={"style": "long"}).text == "longFalse"
    plain = make_template(tokenizer_of("{{ style }}{{ loud }}"))
    assert template.render([HI]) == plain.render([HI], variables={"style": "short", "loud": False})


def test_thinking_can_be_turned_off_for_good():
    source = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}"
    assert make_template(tokenizer_of(source)).write([HI]).text == "hi<think>"
    off = make_template(tokenizer_of(source), TemplateRules(variables={"enable_thinking": False}))
    assert off.write([HI]).text == "hi"
    assert off.write([HI], variables={"enable_thinking": True}).text == "hi<think>"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (TemplateRules(variables={"stile": 1}), "chat_template_kwargs: found 'stile'; .* reads .*: style"),
        (TemplateRules(source="a\n{% for %}"), "chat_template: not a Jinja template, line 2"),
        (TemplateRules(source="a", variables={"style": 1}), "found 'style'; .* reads these variables: none"),
    ],
    ids=["a variable that is not read", "no Jinja", "a variable that the other template does not read"],
)
def test_what_would_do_nothing_is_refused_by_name(rules, message):
    with pytest.raises(ConfigError, match=message):
        make_template(tokenizer_of("{{ style }}"), rules)


def test_a_frozen_day_is_printed_and_without_one_it_is_the_real_day():
    tokenizer = tokenizer_of("{% macro now(f) %}{{ strftime_now(f) }}{% endmacro %}{{ now('%d %b %Y') }}")
    assert make_template(tokenizer, TemplateRules(today=DAY)).write([HI]).text == "29 Feb 2020"
    before = datetime.now()
    found = make_template(tokenizer).write([HI]).text
    assert found in {moment.strftime("%d %b %Y") for moment in (before, datetime.now())}
