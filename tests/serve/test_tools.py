"""Each family's way to write calls: read the same however the answer is cut, and whatever is wrong with it."""

from __future__ import annotations

import json
import random
import time

import pytest
from called import Held, heard, read, split
from thinkers import Family, make_tokenizer

from serve.engine.thinking import Thinking, ThoughtStream
from serve.model.template import ChatTemplate
from serve.tools.call import Call, add_pieces
from serve.tools.formats import ALIASES, FORMATS, NAMES, named
from serve.tools.reader import ToolReader
from serve.tools.rules import ToolRules
from serve.tools.tool import Tool
from serve.tools.words import written

NUM_SPLITS = 1000
WEATHER = Tool(
    "get_weather",
    "How warm it is.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "days": {"type": "integer", "minimum": 0, "maximum": 99},
            "kind": {"enum": ["air", "sea"]},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
)
TOOLS = [WEATHER, Tool("now")]
PARIS = ("get_weather", {"city": "Paris"})
ANSWERS: dict[str, tuple[str, str, list[tuple[str, dict]]]] = {
    "hermes": (
        "Let me see.\n\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "Par\\"is </tool_call>", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"arguments": {"a": [1,{}]}, "name": "now"}\n</tool_call>',
        "Let me see.",
        [("get_weather", {"city": 'Par"is </tool_call>', "days": 3}), ("now", {"a": [1, {}]})],
    ),
    "qwen3_coder": (
        "ok <tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n"
        "3\n</parameter>\n</function>\n</tool_call>\n<function=now>\n</function> bye",
        "ok bye",
        [("get_weather", {"city": "Paris", "days": 3}), ("now", {})],
    ),
    "glm47": (
        "hm<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now</tool_call>",
        "hm",
        [("get_weather", {"city": "Paris", "days": 3}), ("now", {})],
    ),
    "llama3": (
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}',
        "",
        [("get_weather", {"city": "Paris"}), ("now", {})],
    ),
    "mistral": (
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{}',
        "",
        [("get_weather", {"city": "Paris"}), ("now", {})],
    ),
    "mistral_v3": (
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]',
        "",
        [("get_weather", {"city": "Paris"}), ("now", {})],
    ),
    "gemma4": (
        '<|tool_call>call:get_weather{city:<|"|>Pa{r}is, x<|"|>,days:3,tags:[<|"|>a<|"|>,{b:true}]}'
        "<tool_call|><|tool_call>call:now{}<tool_call|>",
        "",
        [("get_weather", {"city": "Pa{r}is, x", "days": 3, "tags": ["a", {"b": True}]}), ("now", {})],
    ),
    "tool_code": (
        'Sure\n```tool_code\nprint(get_weather(city="Paris", days=3))\n```\n',
        "Sure",
        [("get_weather", {"city": "Paris", "days": 3})],
    ),
    "pythonic": (
        '<|tool_call_start|>[get_weather(city="Paris", days=3), now()]<|tool_call_end|>done',
        "done",
        [("get_weather", {"city": "Paris", "days": 3}), ("now", {})],
    ),
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n'
        "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        [("get_weather", {"city": "Paris"}), ("now", {})],
    ),
    "deepseek_v31": (
        'x<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "x",
        [("get_weather", {"city": "Paris"}), ("now", {})],
    ),
    "deepseek_v32": (
        'x\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>",
        "x",
        [("get_weather", {"city": "Paris", "days": 3})],
    ),
    "kimi_k2": (
        "<|tool_calls_section_begin|>"
        '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Paris"}'
        "<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "",
        [("get_weather", {"city": "Paris"}), ("now", {})],
    ),
    "kimi_k3": (
        '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>'
        '<|open|>argument key="city" type="string"<|sep|>Tokyo<|close|>argument<|sep|><|close|>call<|sep|>'
        "<|close|>tools<|sep|>",
        "",
        [("get_weather", {"city": "Tokyo"})],
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n'
        "</minimax:tool_call>",
        "",
        [("get_weather", {"city": "Paris", "days": 3}), ("now", {})],
    ),
    "minimax_m3": (
        ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="get_weather">]<]minimax[>[<city>Paris]'
        "<]minimax[>[</city>]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>",
        "",
        [("get_weather", {"city": "Paris"})],
    ),
    "minicpm5": (
        '<function name="get_weather"><param name="city">Paris</param></function>',
        "",
        [("get_weather", {"city": "Paris"})],
    ),
    "muse_spark": (
        '<atem:function_calls>\n<atem:invoke name="get_weather">\n'
        '<atem:parameter name="city">Paris</atem:parameter>\n</atem:invoke>\n</atem:function_calls>',
        "",
        [("get_weather", {"city": "Paris"})],
    ),
    "longcat": (
        "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n"
        "<longcat_arg_value>Paris</longcat_arg_value>\n</longcat_tool_call>",
        "",
        [("get_weather", {"city": "Paris"})],
    ),
    "granite": (
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]',
        "",
        [("get_weather", {"city": "Paris"}), ("now", {})],
    ),
    "phi4": (
        'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]',
        "",
        [("get_weather", {"city": "Paris"})],
    ),
    "cohere2": (
        "<|START_ACTION|>[\n"
        ' {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}}\n]'
        "<|END_ACTION|>",
        "",
        [("get_weather", {"city": "Paris"})],
    ),
    "jamba": (
        '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</tool_calls>',
        "",
        [("get_weather", {"city": "Paris"})],
    ),
    "internlm": (
        '<|action_start|><|plugin|>\n{"name": "get_weather", "parameters": {"city": "Paris"}}<|action_end|>',
        "",
        [("get_weather", {"city": "Paris"})],
    ),
    "olmo3": (
        '<function_calls>get_weather(city="Paris")\nnow()</function_calls>',
        "",
        [("get_weather", {"city": "Paris"}), ("now", {})],
    ),
    "function_gemma": (
        "<start_function_call>call:get_weather{city:<escape>Pa}ris<escape>}<end_function_call>",
        "",
        [("get_weather", {"city": "Pa}ris"})],
    ),
    "gpt_oss": (
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
        "",
        [("get_weather", {"city": "Paris"})],
    ),
}
"""By format: an answer, its text outside of calls, and its calls."""


def test_every_format_has_an_answer_here():
    assert set(ANSWERS) == set(FORMATS)
    assert all(named(name) in FORMATS.values() for name in NAMES if name not in ("auto", "none"))
    assert not set(ALIASES) & set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_is_read_as_it_was_meant(name):
    answer, text, calls = ANSWERS[name]
    told, made = read(FORMATS[name], TOOLS, [answer])
    assert (told, [(name, json.loads(arguments)) for _, name, arguments in made]) == (text, calls)


@pytest.mark.parametrize("name", FORMATS)
def test_no_cut_into_pieces_changes_what_is_read(name):
    format, (answer, _, _) = FORMATS[name], ANSWERS[name]
    rng = random.Random(name)
    for _ in range(NUM_SPLITS // 20):
        variant = mangled(answer, rng)
        is_cut, is_single = rng.random() < 0.5, rng.random() < 0.3
        whole = read(format, TOOLS, [variant], is_cut=is_cut, is_single=is_single)
        for pieces in (list(variant), *(split(variant, rng) for _ in range(19))):
            assert read(format, TOOLS, pieces, is_cut=is_cut, is_single=is_single) == whole, (variant, pieces)


def mangled(answer: str, rng: random.Random) -> str:
    """The answer, or one that a model could have gone wrong with."""
    kind = rng.randrange(8)
    at, to = sorted((rng.randrange(len(answer)), rng.randrange(len(answer))))
    if kind == 0:
        return answer[:at]
    if kind == 1:
        return answer[:at] + answer[to:]
    if kind == 2:
        return answer[:at] + rng.choice('"{}[]<>\\,:`|\n é') + answer[at:]
    if kind == 3:
        return answer + " And [more] </tool_call>{}\n" + answer[at:]
    if kind == 4:
        return "  " + answer + answer
    if kind == 5:
        return answer[:to] + answer[at:]
    return answer


@pytest.mark.parametrize("name", FORMATS)
def test_text_without_marks_is_given_on_as_it_is(name):
    rng = random.Random(name)
    for _ in range(50):
        words = "".join(rng.choices('ab <|`[{}]\n"é', k=rng.randrange(40)))
        if any(mark in words for mark in FORMATS[name].marks):
            continue
        assert read(FORMATS[name], TOOLS, split(words, rng)) == (words, [])


@pytest.mark.parametrize("name", FORMATS)
def test_a_megabyte_of_arguments_takes_linear_time(name):
    """CPU seconds of one thread; twenty times the text may take sixty times as long, where quadratic is 400.

    Pieces of 21 letters: of smaller ones nothing but their number is felt.
    """
    format = FORMATS[name]
    writing = format.writing
    values = [
        writing.opening
        + written(writing, {"function": {"name": "get_weather", "arguments": {"city": "x{ ,<" * n}}}, 0)
        + writing.closing
        for n in (8_000, 160_000)
    ]
    taken = []
    for value in values:
        pieces = [value[at : at + 21] for at in range(0, len(value), 21)]
        reader, told = ToolReader(format, TOOLS), list[str]()
        begun = time.thread_time()
        for found in (*map(reader.push, pieces), reader.finish()):
            told += [call.arguments for call in found.calls]
        taken.append(time.thread_time() - begun)
        assert len(json.loads("".join(told))["city"]) >= len(value) * 0.9
    assert taken[1] < 60 * taken[0] + 0.5, taken
    assert taken[1] < 20


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_of_a_call_is_read_as_that_call(name):
    """As histories are told in words, and as grammars have it."""
    format = FORMATS[name]
    calls = [PARIS, ("now", {}), ("get_weather", {"city": "é\n{x}", "days": 3})]
    writing = format.writing
    words = writing.joint.join(
        written(writing, {"function": {"name": called, "arguments": arguments}}, number)
        for number, (called, arguments) in enumerate(calls)
    )
    text, made = read(format, TOOLS, [writing.opening + words + writing.closing])
    assert (text, [(called, json.loads(arguments)) for _, called, arguments in made]) == ("", calls)


@pytest.mark.parametrize(
    ("name", "is_special"),
    # Headers are made of tokens: a model without them is not read by headers.
    [(name, kind) for name in FORMATS for kind in (False, True) if kind or not FORMATS[name].writing.headers],
)
def test_a_grammar_lets_through_calls_that_are_read_as_such_and_nothing_else(name, is_special, model_folder):
    format, rng = FORMATS[name], random.Random(name)
    held = Held(model_folder, format, is_special=is_special)
    for wanted, is_single in (("required", True), ("required", False), ("auto", True), ("auto", False)):
        begun = ""
        if wanted == "auto":
            whole = format.writing.opening + format.writing.before
            begun = next((mark for mark in format.marks if whole.startswith(mark)), '{"name')
            is_first = format.bare or format.writing.headers is not None
            begun = begun if is_first else f"hi <{begun[:1]} {begun}"
        for answer in held.answers(TOOLS, rng, 4, begun, wanted=wanted, is_single=is_single):
            said, calls = read(format, TOOLS, [heard(format, answer)], is_single=is_single)
            assert calls, (answer, said)
            assert not is_single or len(calls) == 1
            assert wanted == "auto" or not said.strip(), answer
            for _, called, arguments in calls:
                values = json.loads(arguments)
                assert (
                    ("city" in values and len(values["city"]) <= 6)
                    if called == "get_weather"
                    else values == {}
                )


HEADERS = (
    "<|channel|>analysis<|message|>Where is it?<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
    '<|end|><|start|>assistant<|channel|>{header}<|message|>{{"city": "Paris"}}<|call|>'
)


@pytest.mark.parametrize(
    "header",
    [
        "commentary to=functions.get_weather <|constrain|>json",
        "commentary to=functions.get_weather",
        "analysis to=functions.get_weather code",
    ],
)
def test_calls_in_gpt_oss_headers_are_told_apart_from_thoughts_and_words(header):
    family = Family("gpt_oss")
    thinking = Thinking(family.thoughts, tells_calls=True)
    for answer in (HEADERS.format(header=header), HEADERS.format(header=header).removesuffix("<|call|>")):
        stream, reader = ThoughtStream(thinking, family.tokens), ToolReader(FORMATS["gpt_oss"], TOOLS)
        pieces = [stream.push(token_id) for token_id in family.encode(answer)] + [stream.finish()]
        found = [*map(reader.push, pieces), reader.finish()]
        calls = list[Call]()
        for each in found:
            add_pieces(calls, each.calls)
        assert "".join(each.text for each in found) == "I look."
        assert [(call.name, call.arguments) for call in calls] == [("get_weather", '{"city": "Paris"}')]
        assert stream.take_reasoning() == "Where is it?"
    plain = ThoughtStream(Thinking(family.thoughts), family.tokens)
    ids = family.encode(HEADERS.format(header=header))
    assert "to=" not in "".join(map(plain.push, ids)) + plain.finish()


def test_a_call_before_the_recipients_channel_is_one_too():
    family = Family("gpt_oss")
    stream = ThoughtStream(Thinking(family.thoughts, tells_calls=True), family.tokens)
    answer = "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>"
    text = "".join(map(stream.push, family.encode(answer))) + stream.finish()
    assert read(FORMATS["gpt_oss"], TOOLS, [text]) == ("", [("id0", "now", "{}")])


TOLD = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{{ messages[0].content }}"
SIGNS = {
    # What of a family's own template tells it from its neighbours'.
    "hermes": "<tool_call>\n{{ '{\"name\": ' }}{{ tool_call.name }}\n</tool_call>",
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=p>\n</parameter></function></tool_call>",
    "llama3": 'Respond in the format {"name": function name, "parameters": dictionary}<|eot_id|><|python_tag|>',
    "mistral": "[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}",
    "mistral_v3": "[TOOL_CALLS] [{{ call }}][/TOOL_RESULTS]",
    "gemma4": "<|tool_call>call:{{ name }}<tool_call|>",
    "function_gemma": "<start_function_call>call:{{ name }}<end_function_call>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>x\n```json\n<｜tool▁call▁end｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>x<｜tool▁sep｜>{}<｜tool▁call▁end｜>",
    "glm47": "<tool_call>{{ name }}<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>",
    "granite": "<|start_of_role|>assistant<|end_of_role|><|tool_call|>",
    "phi4": "<|tool|>{{ tools }}<|/tool|>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>",
    "minimax_m2": "<minimax:tool_call><invoke name='x'></invoke></minimax:tool_call>",
    "longcat": "<longcat_tool_call></longcat_tool_call>",
    "cohere2": "<|START_ACTION|><|END_ACTION|>",
    "pythonic": "<|tool_list_start|><|tool_list_end|>",
    "gpt_oss": "<|channel|>commentary to=functions.x<|message|>{}<|call|>",
}


@pytest.mark.parametrize("name", SIGNS)
def test_a_format_is_found_by_the_familys_own_template(name):
    sign = SIGNS[name].replace("{{", "{").replace("}}", "}")
    tokenizer = make_tokenizer(template=TOLD + "{% raw %}" + sign + "{% endraw %}")
    marks = ToolRules(tokenizer).of(ChatTemplate(tokenizer), has_channels=True)
    assert marks is not None
    assert marks.format.name == name


def test_a_format_is_found_by_the_vocabulary_or_what_the_checkpoint_says_or_by_name():
    mistral = make_tokenizer(special=("[TOOL_CALLS]", "[ARGS]"), template=TOLD)
    marks = ToolRules(mistral).of(ChatTemplate(mistral), has_channels=False)
    assert marks is not None
    assert marks.format.name == "mistral"
    assert marks.shown_ids == set(mistral.convert_tokens_to_ids(["[TOOL_CALLS]", "[ARGS]"]))
    plain = make_tokenizer(template=TOLD)
    assert ToolRules(plain).of(ChatTemplate(plain), has_channels=False).format.name == "hermes"
    assert (
        ToolRules(plain, "qwen3_xml").of(ChatTemplate(plain), has_channels=False).format.name == "qwen3_coder"
    )
    assert ToolRules(plain, "none").of(ChatTemplate(plain), has_channels=False) is None
    plain._tokenizer.init_kwargs["tool_parser_type"] = "laguna"
    assert ToolRules(plain).of(ChatTemplate(plain), has_channels=False).format.name == "glm47"
