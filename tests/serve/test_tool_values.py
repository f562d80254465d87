"""Parameters between marks: values are what the tool's schema says, texts come as they are written, and whatever a
grammar lets through keeps to the schema."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from called import Held, heard, read, split

from serve.errors import RequestError
from serve.tools.formats import FORMATS
from serve.tools.reader import ToolReader
from serve.tools.tool import Tool
from serve.tools.words import written

STREAMED = [name for name, format in FORMATS.items() if any(whole.marks for whole in format.wholes)]
"""Formats that write parameters one by one, between marks."""
FILE = Tool(
    "write_file",
    "As pydantic writes the schema of a function's arguments.",
    {
        "type": "object",
        "$defs": {"Kind": {"enum": ["text", "null", "7"], "type": "string"}},
        "properties": {
            "path": {"type": "string"},
            "text": {"type": "string"},
            "line": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None},
            "note": {"anyOf": [{"type": "string", "maxLength": 9}, {"type": "null"}], "default": None},
            "kind": {"$ref": "#/$defs/Kind"},
            "level": {"anyOf": [{"$ref": "#/$defs/Kind"}, {"type": "null"}]},
            "ratio": {"type": "number", "minimum": 0, "maximum": 10},
            "sure": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
            "from": {"type": ["integer", "boolean"]},
            "more": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "path": {"type": "string"}},
                "additionalProperties": False,
            },
        },
        "required": ["path", "text", "kind"],
        "additionalProperties": False,
    },
    strict=True,
)
TEXTS = [
    "null",
    "123",
    "True",
    '{"a": 1}',
    "[1]",
    '"quoted"',
    "a  b\n\n\tc",
    "é 🎉 \\n \x07",
    "",
    "<city>",
    "&lt;",
]
VALUES = {
    "line": [3, None],
    "note": ["it is so", None],
    "kind": ["text", "null", "7"],
    "level": ["7", None],
    "ratio": [0.25, 2],
    "sure": [True, False],
    "tags": [[], ["a", "b]"]],
    "from": [1, False],
    "more": [{"a": 1, "path": "x"}, {}],
}


@pytest.mark.parametrize("name", STREAMED)
def test_values_are_what_the_schema_says_however_the_answer_is_cut(name):
    """Also texts that look like other values, and texts that hold the marks around them."""
    format, rng = FORMATS[name], random.Random(name)
    writing, marks = format.writing, next(whole.marks for whole in format.wholes if whole.marks)
    ends = [whole.end for whole in format.wholes]
    close = format.writing.parameters.after.strip().replace("{name}", "text")
    quoted = [f"a {end} b" for end in ends] + [
        f'return "{close}"',
        f"{marks.begin}x",
        f"say {format.marks[0]} twice",
    ]
    for text in [*TEXTS, *quoted, f"{ends[0]}\n{format.ends[0] if format.ends else ends[0]}\nand {close}."]:
        path = f"/{text}" if text else "/"
        arguments = {"path": path, "text": text}
        arguments |= {key: rng.choice(values) for key, values in VALUES.items() if rng.random() < 0.6}
        arguments.setdefault("kind", "7")
        call = {"function": {"name": "write_file", "arguments": arguments}}
        answer = f"Now.\n{writing.opening}{written(writing, call, 0)}{writing.closing}"
        told, [(_, called, said)] = read(format, [FILE], [answer])
        assert (told, called, json.loads(said)) == ("Now.", "write_file", arguments)
        for _ in range(8):
            assert read(format, [FILE], split(answer, rng)) == (told, [("id0", called, said)])


@pytest.mark.parametrize("name", STREAMED)
def test_texts_come_as_they_are_written_and_values_as_they_end(name):
    format = FORMATS[name]
    call = {
        "function": {"name": "write_file", "arguments": {"path": "/a", "text": "word " * 40 + ".", "line": 3}}
    }
    answer = format.writing.opening + written(format.writing, call, 0)
    reader, pieces = ToolReader(format, [FILE]), []
    for character in answer:
        pieces += [piece.arguments for piece in reader.push(character).calls]
        if "word word" not in "".join(pieces):
            continue
        assert len(pieces) > 8, "the text is told with what comes later"
        break
    assert not reader.is_over
    begun = "".join(pieces)
    assert begun.startswith('{"path": "/a", "text": "word'), begun
    assert len(begun) < 60


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("cut", ["inside a text", "between two parameters"])
def test_a_call_that_is_cut_stays_one_with_what_there_is_of_it(name, cut):
    format = FORMATS[name]
    call = {"function": {"name": "write_file", "arguments": {"path": "/a", "text": "word word"}}}
    answer = format.writing.opening + written(format.writing, call, 0)
    at = answer.index("rd word") if cut == "inside a text" else answer.rindex("word") + 4
    answer = answer[:at]
    if cut == "between two parameters":
        answer += format.writing.parameters.after.replace("{name}", "text")
    told, [(_, _, said)] = read(format, [FILE], [answer])
    assert told == ""
    assert said == '{"path": "/a", "text": "wo' if cut == "inside a text" else json.loads(said)


@pytest.mark.parametrize(
    ("name", "is_special"),
    [(name, kind) for name in FORMATS for kind in (False, True) if kind or not FORMATS[name].writing.headers],
)
def test_whatever_a_grammar_lets_through_is_read_as_a_call_that_keeps_to_the_schema(
    name, is_special, model_folder
):
    format, rng = FORMATS[name], random.Random(name)
    properties = {**FILE.parameters["properties"], "path": {"type": "string", "pattern": "^/[a-z]{1,8}$"}}
    properties |= {"text": {"type": "string", "minLength": 3, "maxLength": 12}}
    parameters = format.writing.parameters
    # `from` is a word of Python's own, and no name of an argument there.
    required = [key for key in properties if parameters is None or parameters.names.fullmatch(key)]
    schema = {**FILE.parameters, "properties": properties, "required": required}
    tool = Tool("write_file", None, schema, strict=True)
    held = Held(model_folder, format, is_special=is_special)
    for answer in held.answers([tool], rng, 8, wanted="required", is_single=True):
        _, [(_, called, said)] = read(format, [tool], [heard(format, answer)], is_single=True)
        arguments = json.loads(said)
        jsonschema.validate(arguments, tool.parameters)
        assert called == "write_file"


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "string", "format": "date"}, "format date"),
        ({"type": "string", "pattern": "a(?=b)"}, "pattern"),
        ({"type": "string", "pattern": "^a$", "maxLength": 3}, "pattern"),
        ({"type": "string", "maxLength": 5000}, "length"),
    ],
)
def test_a_text_that_cannot_be_held_to_its_schema_is_refused_by_name_where_it_must_be(
    part, named, model_folder
):
    held = Held(model_folder, FORMATS["qwen3_coder"], is_special=False)
    tool = Tool("f", None, {"type": "object", "properties": {"when": part}}, strict=True)
    with pytest.raises(RequestError, match=f"{named}.*'when'"):
        next(held.answers([tool], random.Random(0), 1, wanted="required", is_single=True))
    loose = Tool("f", None, tool.parameters)
    assert next(held.answers([loose], random.Random(0), 1, wanted="required", is_single=True))


def test_a_parameter_whose_name_cannot_be_written_is_refused_where_it_must_be_given(model_folder):
    held = Held(model_folder, FORMATS["pythonic"], is_special=False)
    schema = {"type": "object", "properties": {"-i": {"type": "boolean"}}}
    strict = Tool("grep", None, {**schema, "required": ["-i"]}, strict=True)
    with pytest.raises(RequestError, match="'-i'"):
        next(held.answers([strict], random.Random(0), 1, wanted="required", is_single=True))
    assert next(
        held.answers([Tool("grep", None, schema)], random.Random(0), 1, wanted="required", is_single=True)
    )


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("key", ["text", "line"], ids=["a text", "a number"])
def test_a_call_whose_last_values_end_was_left_out_has_that_value(name, key):
    """vLLM lost it; in a stream it could not be taken back."""
    format, rng = FORMATS[name], random.Random(name)
    writing = format.writing
    call = {"function": {"name": "write_file", "arguments": {"path": "/a", key: "7"}}}
    one = writing.opening + written(writing, call, 0)
    after = writing.parameters.after.replace("{name}", key)
    at = one.rindex(after)
    answer = one[:at] + one[at + len(after) :] + writing.closing + " Done."
    told, [(_, called, said)] = read(format, [FILE], [answer])
    assert (told.strip(), called) == ("Done.", "write_file")
    assert json.loads(said) == {
        "path": "/a",
        key: "7" if key == "text" or writing.parameters.says_kinds else 7,
    }
    for _ in range(8):
        assert read(format, [FILE], split(answer, rng)) == (told, [("id0", called, said)])


@pytest.mark.parametrize(
    "line", ["<parameter=\nx\n</parameter>", "<parameter=ids: [1]\n</parameter>", "<parameter=a=</parameter>"]
)
def test_a_parameter_that_is_none_leaves_no_trace(line):
    """vLLM had its text for a name, and left the client an object without an end."""
    answer = f"<function=write_file>\n<parameter=path>\n/a\n</parameter>\n{line}\n</function>\n</tool_call>"
    assert read(FORMATS["qwen3_coder"], [FILE], [answer]) == ("", [("id0", "write_file", '{"path": "/a"}')])
