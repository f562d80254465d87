"""Constraints for tests: good ones, and what is wrong with bad ones and where."""

from __future__ import annotations

import random
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
    ({"properties": {"a": {"const": "b\x01"}}}, "response_format.properties.a.const: ", "control character"),
    ({"enum": [1, {"k": ["\x7f"]}]}, "response_format.enum.1.k.0: ", "control character"),
    ({"type": "string", "pattern": "^a\\x01b"}, "response_format.pattern: ", "control character"),
    ({"type": "string", "pattern": "[a-z]\\u{7F}"}, "response_format.pattern: ", "control character"),
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


def some_schema(rng: random.Random, depth: int = 3) -> object:
    """A schema of the kinds that JSON-Schema-Test-Suite has files for, satisfiable or not, of short answers."""
    simple = [
        _boolean_or_null,
        _integer,
        _number,
        _string,
        _enum,
        lambda rng, depth: {"const": some_value(rng, 2)},
    ]
    nested = [_object, _array, _any_of, _all_of, _ref]
    schema = rng.choice(simple if depth <= 0 else [*simple, *nested, *nested, *nested])(rng, depth)
    if rng.random() < 0.2:
        schema |= {"title": "t", "description": "d", "default": None, "$comment": "c", "examples": [1]}
    return schema


def some_value(rng: random.Random, depth: int) -> object:
    """Any short value."""
    kinds = [None, True, False, 0, -7, 1.5, 1e6, "", 'q"\\', "é😀", "a\nb"]
    if depth and rng.random() < 0.4:
        inside = [some_value(rng, depth - 1) for _ in range(rng.randrange(3))]
        return inside if rng.random() < 0.5 else {f"k{i}": value for i, value in enumerate(inside)}
    return rng.choice(kinds)


def _boolean_or_null(rng: random.Random, depth: int) -> dict:
    return {"type": rng.choice(["boolean", "null", ["null", "boolean"]])}


def _integer(rng: random.Random, depth: int) -> dict:
    low = rng.randrange(-200, 200)
    bounds = [
        {"minimum": low, "maximum": low + rng.randrange(500)},
        {"exclusiveMinimum": low, "exclusiveMaximum": low + 2 + rng.randrange(500)},
        {"minimum": 0, "maximum": 1000, "multipleOf": rng.choice([1, 3, 10, 25])},
    ]
    return {"type": "integer", **rng.choice(bounds)}


def _number(rng: random.Random, depth: int) -> dict:
    low = rng.randrange(-99, 99) / 4
    return {"type": "number", **rng.choice([{"minimum": low, "maximum": low + 9}, {"exclusiveMinimum": low}])}


def _string(rng: random.Random, depth: int) -> dict:
    few = rng.randrange(5)
    kinds = [
        {"maxLength": few},
        {"minLength": few, "maxLength": few + rng.randrange(4)},
        {"pattern": rng.choice(["^[a-c]{1,4}$", "^\\d+$", "^(x|yz)*$", "^é?[^a]b$"]), "maxLength": 12},
        {"format": rng.choice(["date", "time", "ipv4", "uuid", "date-time"])},
    ]
    return {"type": "string", **rng.choice(kinds)}


def _enum(rng: random.Random, depth: int) -> dict:
    return {"enum": [some_value(rng, 1) for _ in range(rng.randrange(1, 5))]}


def _object(rng: random.Random, depth: int) -> dict:
    names = rng.sample(["a", "b", "long name", "é", 'q"', "$ref", "n/m"], rng.randrange(4))
    schema: dict = {
        "type": "object",
        "properties": {name: some_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": rng.choice([False, False, some_schema(rng, 0)]),
    }
    if rng.random() < 0.2:
        schema["patternProperties"] = {"^z[0-9]$": some_schema(rng, 0)}
    if rng.random() < 0.2:
        schema |= {"required": names, "maxProperties": len(names) + 1}
    return schema


def _array(rng: random.Random, depth: int) -> dict:
    low = rng.randrange(3)
    schema: dict = {"type": "array", "items": some_schema(rng, depth - 1), "minItems": low}
    schema["maxItems"] = low + rng.randrange(3)
    if rng.random() < 0.4:
        schema["prefixItems"] = [some_schema(rng, depth - 1) for _ in range(rng.randrange(1, 3))]
        schema["items"] = rng.choice([False, schema["items"]])
    return schema


def _any_of(rng: random.Random, depth: int) -> dict:
    word = rng.choice(["anyOf", "anyOf", "oneOf"])
    return {word: [some_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]}


def _all_of(rng: random.Random, depth: int) -> dict:
    first = _object(rng, depth - 1)
    del first["additionalProperties"]
    second = {"properties": {"more": some_schema(rng, 0)}, "required": ["more"]}
    return {"allOf": [first, second], "unevaluated": 1}


def _ref(rng: random.Random, depth: int) -> dict:
    # One that refers to itself, but need not.
    node = {
        "type": "object",
        "properties": {
            "v": some_schema(rng, 0),
            "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]},
        },
        "required": ["v", "next"],
        "additionalProperties": False,
    }
    return {"$defs": {"n": node}, "$ref": "#/$defs/n"} if depth == 3 else some_schema(rng, depth - 1)
