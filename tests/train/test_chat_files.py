"""Laws of what an export says of chats: variables set by the template itself render as those of a request."""

from __future__ import annotations

from importlib.resources import files

import jinja2
import pytest

from serve.model.jinja import JinjaTemplate
from train.after.chat_files import with_variables

PUBLIC = {
    path.name.removesuffix(".jinja"): path.read_text()
    for path in files("trl").joinpath("chat_templates").iterdir()
    if path.name.endswith(".jinja")
}
VALUES = {
    "off": False,
    "none": None,
    "number": -1.5e-7,
    "text": 'a "b" \\n \n {{ c }} %} {# é 🙂',
    "nested": {"a": [1, {"b": None}], "c": True},
}
SAID = {
    "messages": [{"role": "user", "content": "hi"}],
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_generation_prompt": True,
    "tools": None,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("start", ["", "\n", "  ", "  \n", "{%- if true %}", "  {% if true %}"])
def test_a_value_comes_back_as_it_was_and_no_white_space_changes(value, start):
    source = start + "a {{ it | tojson }}" + ("{% endif %}" if "if" in start else "")
    expected = JinjaTemplate(source).render({"it": value})
    assert JinjaTemplate(with_variables(source, {"it": value})).render({"it": "another"}) == expected


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("thinks", [True, False])
def test_public_templates_that_set_a_variable_render_as_those_that_are_given_it(name, thinks):
    def rendered(source: str, **variables) -> str:
        try:
            return JinjaTemplate(source).render({**SAID, **variables})
        except (jinja2.TemplateError, TypeError) as error:
            return repr(error)

    changed = with_variables(PUBLIC[name], {"enable_thinking": thinks})
    assert rendered(changed, enable_thinking=not thinks) == rendered(PUBLIC[name], enable_thinking=thinks)
