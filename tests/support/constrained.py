"""Constraints for tests: good ones, and what is wrong with bad ones and where."""

from __future__ import annotations

import re

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", 3, None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SUMS = 'start: term (("+" | "-") term)*\nterm: /[0-9]{1,3}/ | "(" start ")"\n'


def is_sum(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9+\-()]+", text)) and isinstance(eval(re.sub(r"\b0+(?=\d)", "", text)), int)


BAD_SCHEMAS = [
    (False, "response_format: ", "allows something"),
    ({"type": "objct"}, "response_format: ", "objct"),
    ({"properties": {"a": {"type": "strin"}}}, "response_format.properties.a: ", "strin"),
    ({"properties": {"a": {"items": {"type": 5}}}}, "response_format.properties.a.items: ", "type must be"),
    ({"type": "object", "required": "a"}, "response_format: ", "required"),
    ({"properties": []}, "response_format: ", "properties must be an object"),
    ({"type": "string", "minLength": -1}, "response_format: ", "minLength"),
    ({"type": "array", "items": {"pattern": 3}}, "response_format.items: ", "pattern"),
    ({"type": "string", "pattern": "a(b"}, "response_format: ", "unclosed group"),
    (
        {"properties": {"a": {"type": "string", "pattern": "a(?=b)"}}},
        "response_format.properties.a: ",
        "look-ahead",
    ),
    ({"enum": []}, "response_format: ", "nsatisfiable"),
    ({"enum": "a"}, "response_format: ", "enum must be an array"),
    ({"anyOf": {}}, "response_format: ", "anyOf must be an array"),
    ({"anyOf": [{"type": "null"}, {"not": {}}]}, "response_format.anyOf.1: ", '"not"'),
    ({"$ref": "#/$defs/none"}, "response_format: ", "/$defs/none"),
    ({"$ref": "http://example.com/schema"}, "response_format: ", "example.com"),
    ({"$ref": "#"}, "response_format: ", "no text"),
    ({"minimum": 5, "maximum": 3, "type": "integer"}, "response_format: ", "minimum"),
    ({"items": {"type": "string", "format": "nope"}}, "response_format.items: ", "nope"),
    ({"type": "array", "uniqueItems": True}, "response_format: ", "uniqueItems"),
    ({"$defs": {"x": {"if": {}}}, "items": {"$ref": "#/$defs/x"}}, "response_format.$defs.x: ", '"if"'),
    ({"type": "object", "required": ["a"], "properties": {"a": False}}, "response_format: ", "'a'"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "response_format: ", "oneOf"),
    ({"items": {"x-guidance": {"lenient": True}, "not": {}}}, "response_format: ", "x-guidance"),
    ({"type": "string", "enum": ["x" * 140_000]}, "response_format: ", "characters"),
]
BAD_OTHERS = [
    ("regex", "a(b", "guided_regex: ", "unclosed group"),
    ("regex", "a(?=b)", "guided_regex: ", "look-ahead"),
    ("regex", "(a)\\1", "guided_regex: ", "backreferences"),
    ("regex", "[^\\s\\S]", "guided_regex: ", "no text"),
    ("regex", "\\b", "guided_regex: ", "not supported"),
    ("grammar", "start: foo", "guided_grammar: ", "foo"),
    ("grammar", 'strt: "a"', "guided_grammar: ", "Expected ::="),
    ("grammar", 'start: "a', "guided_grammar: ", "lexer error"),
    ("grammar", 'root ::= "a', "guided_grammar: ", ""),
    ("choice", [""], "guided_choice: ", "empty"),
]
