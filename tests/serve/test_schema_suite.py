"""JSON-Schema-Test-Suite, of draft 2020-12: a schema is refused, or no answer can be what it does not allow."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic_core import from_json

from serve.constraints.compiler import GrammarCompiler
from serve.constraints.grammar import Grammar
from serve.constraints.spec import ConstraintSpec
from serve.engine.engine import Engine, EngineLimits
from serve.engine.generate import generate
from serve.errors import RequestError
from serve.model.loading import load
from serve.model.token_bytes import TokenBytes

SUITE = Path(__file__).parents[1] / "support" / "json_schema_suite.json"


@dataclass(frozen=True)
class Case:
    """A schema that is taken."""

    name: str
    schema: Any
    grammar: Grammar
    valid: list[Any]
    invalid: list[Any]


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return load(str(model_folder)).tokenizer


@pytest.fixture(scope="module")
def taken(model_folder) -> list[Case]:
    """Of the suite's 368 schemas those that are not refused, with the place and the reason."""
    model = load(str(model_folder))
    compiler = GrammarCompiler(model.tokenizer, TokenBytes(model.tokenizer), model.network.vocab_size)
    refused: list[str] = []
    found = list(cases(compiler, refused))
    assert all(each.startswith("response_format") for each in refused)
    return found


def cases(compiler: GrammarCompiler, refused: list[str]) -> Iterator[Case]:
    for number, each in enumerate(json.loads(SUITE.read_text())["cases"]):
        try:
            grammar = compiler.compile(ConstraintSpec.of_schema(each["schema"], "response_format"))
        except RequestError as error:
            refused.append(str(error))
            continue
        name = f"{number}: {each['file']}, {each['about']}"
        yield Case(name, each["schema"], grammar, each["valid"], each["invalid"])


def test_most_schemas_are_taken(taken):
    assert len(taken) > 150


def test_no_value_that_a_schema_does_not_allow_is_an_answer(taken, tokenizer):
    """In JSON as models write it; a valid value may be refused where its properties come in another order."""
    wrong, num_valid, num_said = [], 0, 0
    for case in taken:
        for value in case.invalid:
            wrong += [(case.name, value)] if is_answer(case.grammar, value, tokenizer) else []
        num_valid += len(case.valid)
        num_said += sum(is_answer(case.grammar, value, tokenizer) for value in case.valid)
    assert not wrong
    assert num_said > 0.8 * num_valid > 200


@pytest.mark.parametrize("code", [*range(32), 0x7F, 0x80, 0x2028, 0xFFFE])
def test_a_character_of_a_value_is_said_or_its_schema_refused(code, tokenizer, model):
    """And nobody's answer is the value without it."""
    compiler = GrammarCompiler(tokenizer, TokenBytes(tokenizer), model.network.vocab_size)
    said = f"ab{chr(code)}cd"
    for schema in ({"const": said}, {"enum": [said, 1]}, {"enum": [[said]]}):
        try:
            grammar = compiler.compile(ConstraintSpec.of_schema(schema, "response_format"))
        except RequestError:
            assert code < 32 or code == 0x7F
            continue
        value = schema.get("const", schema.get("enum", [None])[0])
        assert is_answer(grammar, value, tokenizer)
        assert not is_answer(grammar, ["abcd"] if isinstance(value, list) else "abcd", tokenizer)


def is_answer(grammar: Grammar, value: Any, tokenizer: Any) -> bool:
    """Whether the grammar takes some spelling of the value as a whole answer."""
    for separators in ((",", ":"), (", ", ": ")):
        for ascii_only in (False, True):
            text = json.dumps(value, separators=separators, ensure_ascii=ascii_only)
            token_ids = tokenizer.encode(text, add_special_tokens=False)
            matcher = grammar.matcher()
            if matcher.validate_tokens(token_ids) == len(token_ids):
                assert matcher.consume_tokens(token_ids)
                if matcher.is_accepting():
                    return True
    return False


@pytest.mark.large
@pytest.mark.parametrize("part", range(8))
def test_answers_are_valid_or_beginnings_at_their_length(taken, model, make_request, part):
    requests, asked = [], {}
    for number, case in enumerate(taken[part::8]):
        for seed in range(2):
            id = f"{number}-{seed}"
            request = make_request(
                id,
                f"request {id}",
                temperature=1.0,
                ignore_eos=False,
                max_tokens=120,
                seed=random.Random(id).getrandbits(32),
            )
            requests.append(replace(request, grammar=case.grammar))
            asked[id] = case
    answers = generate(Engine(model, EngineLimits(max_rows=8)), requests)
    num_whole = 0
    for request, answer in zip(requests, answers, strict=True):
        case = asked[request.id]
        if answer.finish == "length":
            from_json(answer.text.rstrip("\ufffd"), allow_partial="trailing-strings")
            continue
        assert answer.finish == "stop"
        num_whole += 1
        value = json.loads(answer.text)
        assert jsonschema.Draft202012Validator(case.schema).is_valid(value), (case.name, answer.text)
    assert num_whole > len(requests) / 4
