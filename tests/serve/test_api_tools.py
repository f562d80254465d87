"""Tools over HTTP, by OpenAI's own client: told to the template, called, read whole and streamed, and required."""

from __future__ import annotations

import json
from typing import Literal

import jsonschema
import openai
import pydantic
import pytest
from tiny import QWEN3, running
from transformers import AutoTokenizer

from serve.config import ServeConfig

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>"
    "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {**QWEN3, "vocab_size": 263, "max_position_embeddings": 2048}
MARK_ID = 259
"""The token <tool_call>, the first after the bytes'."""
MESSAGES = [{"role": "user", "content": "How warm is it in Paris?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "How warm it is.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def caller(make_model):
    """A random model whose template knows tools, and whose vocabulary has a token for each mark."""
    folder = make_model("caller", CONFIG, seed=3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool_call>", "<tool_call|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(caller):
    with running(caller) as (_, opened):
        yield opened


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0) as opened:
        yield opened


def said(text: str, **fields) -> dict:
    """A request whose answer is this text, for nothing else is allowed."""
    allowed = {"structured_outputs": {"choice": [text]}}
    return {
        **{"model": "m", "messages": MESSAGES, "tools": [WEATHER, NOW], "temperature": 0, "max_tokens": 400},
        **fields,
        "extra_body": {**allowed, **fields.get("extra_body", {})},
    }


def streamed(client, **fields) -> tuple[dict, str, list]:
    """The message that the deltas of a stream join to, its finish reason, and the deltas of its calls."""
    message: dict = {"content": "", "tool_calls": []}
    deltas, finish = [], None
    for chunk in client.chat.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            message["content"] += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                deltas.append(call)
                if call.id is not None:
                    assert call.index == len(message["tool_calls"])
                    assert call.type == "function"
                    message["tool_calls"].append({"name": call.function.name, "arguments": ""})
                message["tool_calls"][call.index]["arguments"] += call.function.arguments
            finish = choice.finish_reason or finish
    return message, finish, deltas


def test_calls_are_told_from_the_text_whole_and_streamed(client):
    choice = client.chat.completions.create(**said(CALLS)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert calls == [("get_weather", {"city": "Paris", "days": 2}), ("now", {})]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    message, finish, deltas = streamed(client, **said(CALLS))
    assert finish == "tool_calls"
    assert message == {
        "content": choice.message.content,
        "tool_calls": [
            {"name": call.function.name, "arguments": call.function.arguments}
            for call in choice.message.tool_calls
        ],
    }
    assert len(deltas) > 8, "arguments come as they are written"


def test_without_tools_the_same_answer_is_text(client):
    choice = client.chat.completions.create(**said(CALLS, tools=openai.omit)).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (CALLS, "stop", None)
    none = client.chat.completions.create(**said(CALLS, tool_choice="none")).choices[0]
    assert (none.message.content, none.message.tool_calls) == (CALLS, None)


class Weather(pydantic.BaseModel):
    """How warm it is."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2]


def asked(**fields) -> dict:
    """A request whose answer is the model's own: random, as far as it is allowed to be."""
    random = {"temperature": 1.0, "seed": 7, "max_tokens": 300}
    return {"model": "m", "messages": MESSAGES, "tools": [WEATHER, NOW], **random, **fields}


@pytest.mark.parametrize("seed", range(4))
def test_required_and_named_tools_are_called_with_arguments_of_their_schema(client, seed):
    named = {"type": "function", "function": {"name": "get_weather"}}
    allowed = {"mode": "required", "tools": [named]}
    for choice in (named, {"type": "allowed_tools", "allowed_tools": allowed}):
        fields = asked(tool_choice=choice, seed=seed, parallel_tool_calls=False)
        answer = client.chat.completions.create(**fields).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        (call,) = answer.message.tool_calls
        assert call.function.name == "get_weather"
        jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
        message, finish, _ = streamed(client, **fields)
        assert finish == "tool_calls"
        assert message == {
            "content": "",
            "tool_calls": [{"name": "get_weather", "arguments": call.function.arguments}],
        }
    either = client.chat.completions.create(
        **asked(tool_choice="required", seed=seed, parallel_tool_calls=False, n=3)
    )
    for answer in either.choices:
        assert [call.function.name in ("get_weather", "now") for call in answer.message.tool_calls] == [True]


def test_openais_helpers_parse_calls_into_pydantic_models(client):
    tool = openai.pydantic_function_tool(Weather)
    fields = asked(tools=[tool], tool_choice="required", parallel_tool_calls=False)
    answer = client.chat.completions.parse(**fields).choices[0]
    (call,) = answer.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**fields) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert final.message.tool_calls[0].function.parsed_arguments == call.function.parsed_arguments


def test_a_strict_tool_is_held_to_its_schema_once_its_call_begins_and_text_is_free(client):
    tool = openai.pydantic_function_tool(Weather)
    called = 0
    for seed in range(3):
        answer = client.chat.completions.create(**asked(tools=[tool], seed=seed, max_tokens=20)).choices[0]
        assert answer.message.content or answer.message.tool_calls
        # A model that likes the mark better than anything writes it, and cannot but go on with a call.
        bias = {str(MARK_ID): 100}
        answer = client.chat.completions.create(**asked(tools=[tool], seed=seed, logit_bias=bias)).choices[0]
        for call in answer.message.tool_calls or ():
            if answer.finish_reason == "tool_calls" or call is not answer.message.tool_calls[-1]:
                Weather.model_validate_json(call.function.arguments)
                called += 1
    assert called > 2


def test_one_call_at_most_ends_the_answer_after_it(client):
    fields = said(CALLS + " and more", parallel_tool_calls=False)
    answer = client.chat.completions.create(**fields)
    (call,) = answer.choices[0].message.tool_calls
    assert (call.function.name, answer.choices[0].finish_reason) == ("get_weather", "tool_calls")
    assert answer.choices[0].message.content == "Let me see."
    message, finish, _ = streamed(client, **fields)
    assert finish == "tool_calls"
    assert [each["arguments"] for each in message["tool_calls"]] == [call.function.arguments]
    whole = client.chat.completions.create(**said(CALLS + " and more"))
    assert whole.usage.completion_tokens > answer.usage.completion_tokens
    assert [call.function.name for call in whole.choices[0].message.tool_calls] == ["get_weather", "now"]


def test_a_cut_or_broken_call_is_no_error(client):
    for limit in (30, 60, 90, 120):
        answer = client.chat.completions.create(**said(CALLS, max_tokens=limit)).choices[0]
        assert answer.finish_reason == "length"
        message, finish, _ = streamed(client, **said(CALLS, max_tokens=limit))
        assert finish == "length"
        assert message["content"] == (answer.message.content or "")
        assert [call["arguments"] for call in message["tool_calls"]] == [
            call.function.arguments for call in answer.message.tool_calls or ()
        ]
    for broken in (
        '<tool_call>\n{"name": 3}\n</tool_call>',
        "<tool_call>\nnever mind",
        "<tool_call>[]</tool_call>",
    ):
        answer = client.chat.completions.create(**said(broken)).choices[0]
        assert (answer.message.content, answer.finish_reason) == (broken, "stop")
        assert answer.message.tool_calls is None
    unknown = '<tool_call>{"name": "launch", "arguments": {"at": [1, {}]}}</tool_call>'
    (call,) = client.chat.completions.create(**said(unknown)).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == ("launch", '{"at": [1, {}]}')


def test_calls_and_results_go_back_into_the_prompt(client):
    answer = client.chat.completions.create(**said(CALLS)).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": "21"}]}
        for call in answer.tool_calls
    ]
    again = client.chat.completions.create(
        **said("It is 21 degrees.", messages=[*MESSAGES, answer, *results])
    )
    assert again.choices[0].message.content == "It is 21 degrees."
    first = client.chat.completions.create(**said("So."))
    assert again.usage.prompt_tokens > first.usage.prompt_tokens + 140
    for arguments in (
        "{",
        '{"city": "Par',
        "nothing",
        "",
        "[1]",
        '"x"',
        "\ud83d".encode("utf-16", "surrogatepass").hex(),
    ):
        call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": arguments}}
        history = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}, results[0]]
        assert (
            client.chat.completions.create(**said("So.", messages=history)).choices[0].message.content
            == "So."
        )


def test_the_older_words_are_answered_in_them(client):
    fields = said(CALLS, tools=openai.omit, functions=[WEATHER["function"], NOW["function"]])
    answer = client.chat.completions.create(**fields).choices[0]
    assert answer.finish_reason == "function_call"
    assert answer.message.function_call.name == "get_weather"
    assert answer.message.tool_calls is None
    arguments = ""
    for chunk in client.chat.completions.create(stream=True, **fields):
        for choice in chunk.choices:
            if choice.delta.function_call is not None:
                arguments += choice.delta.function_call.arguments
    assert arguments == answer.message.function_call.arguments
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": "{}"}},
        {"role": "function", "name": "now", "content": "noon"},
    ]
    assert (
        client.chat.completions.create(**said("Noon.", messages=history)).choices[0].message.content
        == "Noon."
    )


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice: found 'fly'"),
        ({"tools": [WEATHER, WEATHER]}, "tools: found 'get_weather' twice"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0: Input tag 'retrieval'"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"functions": [WEATHER["function"]]}, "functions: found beside tools"),
        *(
            (
                {**forced, "extra_body": {"structured_outputs": only}},
                "structured_outputs: found beside " + beside,
            )
            for only in ({"choice": ["sunny"]}, {"regex": "a+"})
            for forced, beside in (
                ({"tool_choice": "required"}, "tool_choice"),
                ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice"),
                ({"tools": [{**NOW, "function": {**NOW["function"], "strict": True}}]}, "strict tools"),
            )
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "strict": True, "parameters": {"type": "none"}},
                    }
                ],
                "tool_choice": "required",
            },
            "tools.0.function.parameters",
        ),
    ],
)
def test_what_cannot_be_called_is_refused_by_its_name(client, fields, told):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**asked(**{**fields, "max_tokens": 5}))
    assert told in error.value.body["message"]


def test_a_schema_that_cannot_be_kept_to_is_left_where_nobody_asked_for_strictness(client):
    odd = {
        "type": "function",
        "function": {"name": "odd", "parameters": {"type": "object", "unheardOf": 3, "not": {}}},
    }
    answer = client.chat.completions.create(
        **asked(tools=[odd], tool_choice="required", parallel_tool_calls=False)
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "odd"
    half = {
        "properties": {"n": {"enum": [1, 2], "not": {}}},
        "required": ["n"],
        "additionalProperties": False,
    }
    odd = {"type": "function", "function": {"name": "odd", "parameters": {**half, "propertyNames": {}}}}
    answer = client.chat.completions.create(
        **asked(tools=[odd], tool_choice="required", parallel_tool_calls=False)
    )
    arguments = json.loads(answer.choices[0].message.tool_calls[0].function.arguments)
    assert arguments in ({"n": 1}, {"n": 2}), "what can be kept to is"


def test_text_of_a_schema_or_a_call_of_a_tool(client):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = client.chat.completions.create(
        **asked(response_format=wanted, parallel_tool_calls=False)
    ).choices[0]
    if answer.message.tool_calls is None:
        jsonschema.validate(json.loads(answer.message.content), schema)
    bias, strict = {str(MARK_ID): 100}, {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    fields = asked(response_format=wanted, parallel_tool_calls=False, logit_bias=bias, tools=[strict])
    choice = client.chat.completions.create(**fields).choices[0]
    assert choice.finish_reason == "tool_calls", choice


def test_marks_that_are_special_tokens_are_read_too(caller):
    with (
        running(caller, tool_call_parser="gemma4") as (_, url),
        openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client,
    ):
        fields = asked(tool_choice="required", parallel_tool_calls=False)
        (call,) = client.chat.completions.create(**fields).choices[0].message.tool_calls
        assert call.function.name in ("get_weather", "now")
        free = client.chat.completions.create(**{**fields, "tool_choice": "none", "max_tokens": 20})
        assert free.choices[0].message.tool_calls is None
    with pytest.raises(pydantic.ValidationError, match="expected one of auto, none, "):
        ServeConfig(model=str(caller), tool_call_parser="qwen17")


def test_a_template_without_tools_is_told_of_them_in_words(model_folder):
    with running(model_folder) as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        answer = client.chat.completions.create(**said(CALLS))
        assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather", "now"]
        without = client.chat.completions.create(**said("x", tools=openai.omit))
        assert answer.usage.prompt_tokens - without.usage.prompt_tokens > 500


ITERATING = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}"
    "<arg_key>{{ key }}</arg_key><arg_value>{{ value }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def thinking_client(make_model):
    """Of a model that thinks, and whose template goes through a call's arguments one by one."""
    folder = make_model("thinking caller", CONFIG, seed=4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = ITERATING
    tokenizer.save_pretrained(folder)
    with running(folder) as (_, url), openai.OpenAI(base_url=f"{url}/v1", api_key="x", timeout=60) as opened:
        yield opened


@pytest.mark.parametrize(
    "arguments", ["{", '{"city": "Par', "nothing", "", "[1]", '"x"', "null", '{"a": 1}', "[" * 9000]
)
def test_no_history_wedges_a_chat(thinking_client, client, arguments):
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
    ]
    for each in (thinking_client, client):
        if len(arguments) > 1000:  # more than the context
            with pytest.raises(openai.BadRequestError, match="context"):
                each.chat.completions.create(**asked(messages=history, max_tokens=4))
        else:
            answer = each.chat.completions.create(**asked(messages=history, max_tokens=4))
            assert answer.usage.completion_tokens


def test_a_call_comes_after_thoughts_and_by_the_grammar_too(thinking_client):
    bias = {"260": 100}  # the end of a thought
    fields = asked(tool_choice="required", parallel_tool_calls=False, logit_bias=bias)
    answer = thinking_client.chat.completions.create(**fields).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    assert answer.message.tool_calls[0].function.name in ("get_weather", "now")
    message, finish, _ = streamed(thinking_client, **fields)
    assert finish == "tool_calls"
    assert message["tool_calls"][0]["arguments"] == answer.message.tool_calls[0].function.arguments


FAULTS = {
    "vLLM lost the empty arguments of a tool without parameters": ('{"name": "now", "arguments": {}}', "{}"),
    "vLLM lost the last brace where several tokens came at once": (
        '{"name": "f", "arguments": {"id": {"n": 42}}}',
        '{"id": {"n": 42}}',
    ),
    "vLLM lost the beginning of a list of objects": (
        '{"name": "f", "arguments": {"numbers": [{"a": 1}, {"b": [2]}]}}',
        '{"numbers": [{"a": 1}, {"b": [2]}]}',
    ),
    "mlx-lm crashed on escapes that JSON has not": (
        '{"name": "f", "arguments": {"pattern": "\\d+"}}',
        '{"pattern": "\\d+"}',
    ),
    "llama.cpp took an argument called name for the tool's": (
        '{"name": "f", "arguments": {"name": "g", "arguments": {"x": 1}}}',
        '{"name": "g", "arguments": {"x": 1}}',
    ),
    "arguments written as text": ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
    "arguments before the name": ('{"arguments": {"a": 1}, "name": "f"}', '{"a": 1}'),
    "a brace too many": ('{"name": "f", "arguments": {"a": 1}}}', '{"a": 1}'),
    "a brace too few": ('{"name": "f", "arguments": {"a": 1}', '{"a": 1}'),
    "a mark inside a string": ('{"name": "f", "arguments": {"a": "</tool_call>"}}', '{"a": "</tool_call>"}'),
    "line breaks inside strings": ('{"name": "f", "arguments": {"a": "x\ny"}}', '{"a": "x\\ny"}'),
    "half a surrogate pair": ('{"name": "f", "arguments": {"a": "\\ud83d"}}', '{"a": "\\ud83d"}'),
    "OpenAI's own shape": (
        '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}',
        '{"a": 1}',
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_that_others_had(client, name):
    written, arguments = FAULTS[name]
    text = f"<tool_call>\n{written}\n</tool_call>"
    (call,) = client.chat.completions.create(**said(text)).choices[0].message.tool_calls
    assert (call.function.name, call.function.arguments) == (
        "now" if name.startswith("vLLM lost the em") else "f",
        arguments,
    )
    message, finish, deltas = streamed(client, **said(text))
    assert [each["arguments"] for each in message["tool_calls"]] == [arguments]
    assert finish == "tool_calls"
    assert message["content"] == ""
    assert all(delta.id is None and delta.function.name is None for delta in deltas[1:]), "named once"


def test_two_calls_that_are_the_same_are_two(client):
    one = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
    calls = client.chat.completions.create(**said(one * 3)).choices[0].message.tool_calls
    assert len({call.id for call in calls}) == 3
    _, _, deltas = streamed(client, **said(one * 3))
    assert sorted({delta.index for delta in deltas}) == [0, 1, 2]
