"""Laws of Jinja chat templates: rendered as by transformers, for so long and no longer, with their own variables."""

from __future__ import annotations

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from serve.errors import RequestError
from serve.model.jinja import JinjaTemplate, TooSlowError
from serve.model.renderer import renderer_of
from serve.model.template import ChatTemplate

HI = {"role": "user", "content": "hi\n <b> 'é' 🙂"}
SAID = (HI, {"role": "assistant", "content": "x", "thinking": "hm", "name": None}, HI)
TEMPLATES = {
    "blocks and white space": "  {% for m in messages %}\n    {{ m.content }}\n  {% endfor %}\n\n{# note #}\nend",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ 'é<' | tojson(ensure_ascii=true) }}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
    "{% break %}{% endfor %}",
    "loops": "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.length }}{{ loop.last }}"
    "{{ loop.previtem.role if loop.previtem }}{% else %}none{% endfor %}",
    "loops in loops": "{% for m in messages recursive %}{{ m.role }}{% if m.inner %}{{ loop(m.inner) }}"
    "{% endif %}{% endfor %}",
    "namespaces": "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% endfor %}{{ ns.n }}",
    "macros": "{% macro say(m, end='.') %}{{ m.role }}{{ end }}{{ caller() if caller }}{% endmacro %}"
    "{{ say(messages[0]) }}{% call say(messages[1], end='!') %}inside{% endcall %}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}{% endgeneration %}"
    "{{ x }}{% endfor %}",
    "thoughts": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.reasoning }}"
    "{{ m.name is defined }}{% endfor %}",
    "what is there": "{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}"
    "{{ enable_thinking }}"
    "{{ strftime_now('%Y') }}{{ dict(a=1) }}{{ eos_token is defined }}",
    "filters": "{{ messages | map(attribute='role') | unique | join(',') }}"
    "{{ messages | selectattr('name') | list | length }}"
    "{{ messages[0].content | trim | upper | replace('H', 'J') }}",
}
REFUSED = {
    "its own words": "{{ raise_exception('no system turn') }}",
    "into Python": "{{ messages.__class__.__mro__ }}",
    "a change of what it is given": "{{ messages.append(1) }}",
    "a name into Python": "{% set ns = namespace(_x=1) %}",
    "a name into Python, later": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "a hole": "{{ messages[0].content.nothing.more }}",
    "no template": "{% for %}",
    "a recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
}


def wrapped(template: object, bos: str = "<s>") -> TokenizerWrapper:
    tokenizer = Tokenizer(models.BPE({"<s>": 0}, []))
    return TokenizerWrapper(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, bos_token=bos)
    )


def text_of(tokenizer: TokenizerWrapper, **more) -> str:
    return ChatTemplate(tokenizer).write(SAID, **more).text


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_gives_the_text_that_transformers_gives(kind):
    tokenizer = wrapped(TEMPLATES[kind])
    for more in ({}, {"tools": [{"name": "f"}]}):
        expected = tokenizer.apply_chat_template(
            list(SAID), add_generation_prompt=True, tokenize=False, **more
        )
        assert text_of(tokenizer, **more) == expected
        assert expected


@pytest.mark.parametrize("kind", REFUSED)
def test_whatever_a_template_raises_is_a_request_error_in_one_line_of_its_own(kind):
    with pytest.raises(
        RequestError, match=r"the chat template refuses these messages \(user, assistant, user\): ."
    ):
        text_of(wrapped(REFUSED[kind]))


LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) recursive %}{% for b in range(99999) %}{{ b if false }}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{{ caller() if caller }}{% if n %}{% call f(n - 1) %}{{ f(n - 1) }}{% endcall %}{{ f(n - 1) }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
)


@pytest.mark.parametrize("source", LOOPS)
def test_a_template_that_would_run_for_hours_ends_at_its_time(source):
    with pytest.raises(TooSlowError):
        JinjaTemplate(source).render({}, limit_s=0.05)
    with pytest.raises(RequestError, match=r"took more than 0\.05 s over these 3 messages"):
        ChatTemplate(wrapped(source)).write(SAID, limit_s=0.05)


def test_a_template_that_is_done_in_time_has_the_text_that_it_has_without_a_clock():
    source = "{% for a in range(1000) %}{{ a }}{% endfor %}"
    assert JinjaTemplate(source).render({}, limit_s=60.0) == JinjaTemplate(source).render({})


@pytest.mark.parametrize(
    ("source", "reads"),
    [
        ("{{ messages }}{{ enable_thinking }}", {"enable_thinking"}),
        ("{% if not date is defined %}{% set date = 'now' %}{% endif %}{{ date }}", {"date"}),
        ("{% set date = date or 'now' %}{{ date }}", {"date"}),
        ("{% if tools %}{% set x = 1 %}{% else %}{% set x = 2 %}{% endif %}{{ x }}", set()),
        ("{% for x in messages %}{{ x }}{{ y }}{% endfor %}", {"y"}),
        ("{% for a, b in messages %}{{ a }}{{ b }}{% endfor %}{{ a }}", {"a"}),
        ("{% macro f(x, y=z) %}{{ x }}{{ y }}{{ inner }}{% endmacro %}{{ f(1) }}", {"z", "inner"}),
        ("{% set x %}{{ y }}{% endset %}{{ x }}", {"y"}),
        (
            "{{ bos_token }}{{ tools }}{{ add_generation_prompt }}{{ strftime_now('%Y') }}{{ range(2) }}",
            set(),
        ),
        ("{{ self }}{{ loop }}{{ chat_template }}{{ tokenize }}", {"loop"}),
        (
            "{% generation %}{{ inside }}{% endgeneration %}{% call f() %}{{ called }}{% endcall %}",
            {"inside", "f", "called"},
        ),
        ("{{ documents }}", {"documents"}),
    ],
)
def test_the_variables_are_those_that_a_template_reads_and_does_not_set_itself(source, reads):
    assert renderer_of(wrapped(source)).variables == reads


def test_several_templates_by_name_are_chosen_as_transformers_does_and_share_their_variables():
    tokenizer = wrapped(
        {"default": "default{{ a }}{{ messages[0].role }}", "tool_use": "tools{{ b }}{{ tools[0].name }}"}
    )
    chat = ChatTemplate(tokenizer)
    assert chat.variables == {"a", "b"}
    assert text_of(tokenizer, variables={"a": 1}) == "default1user"
    assert text_of(tokenizer, tools=[{"name": "f"}], variables={"b": 2}) == "tools2f"
    with pytest.raises(RequestError, match="no default specified"):
        text_of(wrapped({"one": "x", "two": "y"}))


def test_a_template_written_in_python_takes_what_its_signature_names():
    def render(messages, add_generation_prompt=False, style="plain", **rest):
        return f"{style}:{messages[0]['content']}:{add_generation_prompt}:{sorted(rest)}"

    inner = wrapped(None)._tokenizer
    chat = ChatTemplate(TokenizerWrapper(inner, chat_template=render))
    assert chat.variables == {"style", "enable_thinking"}
    assert (
        chat.write([{"role": "user", "content": "hi"}], variables={"style": "s"}).text
        == "s:hi:True:['enable_thinking', 'tools']"
    )
    with pytest.raises(RequestError, match="found 'rest'"):
        chat.write([HI], variables={"rest": 1})


@pytest.mark.parametrize(
    "name", ["chat_template", "self", "messages_", "cls", "limit_s", "tokenize", "__class__"]
)
def test_a_variable_that_the_template_does_not_read_is_refused_with_those_it_reads(name):
    chat = ChatTemplate(wrapped("{{ messages }}{{ a }}{{ b }}"))
    with pytest.raises(RequestError, match=f"found '{name}'.*: a, b$") as caught:
        chat.write([HI], variables={name: "{{7*7}}"})
    assert caught.value.param == "chat_template_kwargs"
    with pytest.raises(RequestError, match="requests: none"):
        ChatTemplate(wrapped("{{ messages }}")).write([HI], variables={"a": 1})


def test_a_template_meets_nothing_but_the_types_of_json():
    class Odd(str):
        def secret(self) -> str:
            return "out"

    tokenizer = wrapped("{{ a.secret is defined }}{{ b }}{{ c }}")
    odd = {"a": Odd("x"), "b": object(), "c": (1, None)}
    assert ChatTemplate(tokenizer).write([HI], variables=odd).text == "False<object>[1, None]"
