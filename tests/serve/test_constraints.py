"""Grammars in the engine: every answer keeps to its own, whole or as a beginning, in any company."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from constrained import BAD_OTHERS, BAD_SCHEMAS, PERSON, SUMS, is_sum, some_schema
from pydantic_core import from_json

from serve.constraints.compiler import GrammarCompiler
from serve.constraints.edit import GrammarEdit, Masks
from serve.constraints.grammar import Grammar
from serve.constraints.spec import ConstraintSpec
from serve.engine.engine import Engine
from serve.engine.generate import Completion, generate
from serve.engine.request import Request
from serve.errors import GenerationError, OverloadedError, RequestError
from serve.model.token_bytes import TokenBytes

TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "v": {"type": "boolean"},
                "n": {"anyOf": [{"$ref": "#/$defs/node"}, {"const": 0}]},
            },
            "required": ["v", "n"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}


def of(kind: str, value: object) -> ConstraintSpec:
    if kind == "json":
        return ConstraintSpec.of_schema(value, "response_format")
    if kind == "choice":
        return ConstraintSpec.of_choices(value, "guided_choice")
    return ConstraintSpec(kind, value, f"guided_{kind}")


@pytest.fixture(scope="module")
def compiler(model_folder) -> GrammarCompiler:
    from serve.model.loading import load

    model = load(str(model_folder))
    return GrammarCompiler(model.tokenizer, TokenBytes(model.tokenizer), model.network.vocab_size)


@pytest.fixture(scope="module")
def grammar(compiler) -> Callable[[str, object], Grammar]:
    return lambda kind, value: compiler.compile(of(kind, value))


@pytest.fixture
def asking(make_request, grammar) -> Callable[..., Request]:
    """asking(id, kind, value, **as make_request) → at temperature 1, with the model's ends."""

    def make(id: str, kind: str | None = None, value: object = None, **options: object) -> Request:
        asked = {"temperature": 1.0, "ignore_eos": False, "max_tokens": 200, **options}
        request = make_request(id, f"request {id}", **asked)
        return request if kind is None else replace(request, grammar=grammar(kind, value))

    return make


def is_json_of(schema: object, answer: Completion) -> bool:
    """Valid, or at its length a beginning of JSON."""
    if answer.finish == "length":
        from_json(answer.text.rstrip("\ufffd"), allow_partial="trailing-strings")
        return True
    assert answer.finish == "stop"
    jsonschema.Draft202012Validator(schema).validate(json.loads(answer.text))
    return True


@pytest.mark.parametrize("schema", [PERSON, TREE, {"type": "object"}, {"type": ["number", "null"]}, True])
def test_answers_are_json_of_their_schema(model, make_engine, asking, schema):
    requests = [asking(f"{seed}", "json", schema, seed=seed) for seed in range(6)]
    answers = generate(make_engine(model, max_rows=6), requests)
    assert all(is_json_of(schema, answer) for answer in answers)
    assert any(answer.finish == "stop" for answer in answers)
    assert len({answer.text for answer in answers}) > 1


@pytest.mark.parametrize(
    "pattern",
    ["[ab]{3}-\\d{2,4}", "(yes|no)( sir){0,3}", "[^\\n]{5,9}", "é{2,3}€", "^[A-Z][a-z]+$", "(?i)abc?"],
)
def test_answers_match_their_pattern(model, make_engine, asking, pattern):
    requests = [asking(f"{seed}", "regex", pattern, seed=seed) for seed in range(5)]
    answers = generate(make_engine(model), requests)
    for answer in answers:
        if answer.finish == "stop":
            assert re.fullmatch(pattern, answer.text), answer.text
    assert any(answer.finish == "stop" for answer in answers)


def test_answers_are_one_of_their_choices(model, make_engine, asking):
    choices = ["yes", "no", 'a "quoted" one', "two\nlines", "é€😀", "\\", "\x7f", "yes please", "<|im_end|>"]
    requests = [asking(f"{seed}", "choice", choices, seed=seed) for seed in range(16)]
    answers = generate(make_engine(model), requests)
    assert {answer.finish for answer in answers} == {"stop"}
    assert {answer.text for answer in answers} <= set(choices)
    assert len({answer.text for answer in answers}) > 2
    many = [f"choice {number}" for number in range(4096)]
    assert generate(make_engine(model), [asking("many", "choice", many)])[0].text in many
    for choice in choices:
        only = generate(make_engine(model), [asking("only", "choice", [choice], seed=1)])[0]
        assert (only.text, only.finish) == (choice, "stop")


def test_answers_are_of_their_lark_or_gbnf_grammar(model, make_engine, asking):
    gbnf = 'root ::= "[" item ("," item)* "]"\nitem ::= [a-c] | root\n'
    requests = [asking(f"sum {seed}", "grammar", SUMS, seed=seed) for seed in range(6)]
    requests += [asking(f"list {seed}", "grammar", gbnf, seed=seed) for seed in range(6)]
    answers = generate(make_engine(model), requests)
    stopped = [answer.text for answer in answers if answer.finish == "stop"]
    assert len(stopped) > 4
    for text in stopped:
        assert json.loads(re.sub("([a-c])", r'"\1"', text)) if text[0] == "[" else is_sum(text)


@pytest.mark.parametrize("whitespace", [" ", "\n", "\t"])
def test_white_space_is_bounded_whatever_the_model_would_rather_say(model, make_engine, asking, whitespace):
    token_id = model.tokenizer.encode(whitespace, add_special_tokens=False)[0]
    bias = {"logit_bias": ((token_id, 100.0),), "temperature": 0.0}
    schema = {**PERSON, "properties": {**PERSON["properties"], "name": {"enum": ["x", "y"]}}}
    answers = generate(make_engine(model), [asking("a", "json", schema, **bias)])
    assert answers[0].finish == "stop"
    assert is_json_of(schema, answers[0])


def test_rows_with_schemas_of_their_own_and_free_rows_are_each_as_alone(
    model, fresh_engine, make_engine, asking
):
    kinds = [
        ("json", PERSON),
        (None, None),
        ("regex", "[a-z]{4,9}"),
        ("json", TREE),
        ("choice", ["one", "two", "three"]),
        (None, None),
        ("grammar", SUMS),
        ("json", {"type": "array", "items": {"type": "integer"}, "minItems": 2}),
    ]
    options = [
        {},
        {"top_p": 0.9},
        {"temperature": 0.0},
        {"repetition_penalty": 1.2},
        {"num_logprobs": 3},
        {},
        {"min_tokens": 6},
        {"frequency_penalty": 0.3, "top_k": 40},
    ]
    requests = [
        asking(f"{number}", *kind, seed=number, max_tokens=40, **option)
        for number, (kind, option) in enumerate(zip(kinds, options, strict=True))
    ]
    together = generate(make_engine(model, max_rows=8), requests)
    for request, answer in zip(requests, together, strict=True):
        alone = generate(fresh_engine(), [request])[0]
        assert (answer.token_ids, answer.finish) == (alone.token_ids, alone.finish)
    assert len(together[4].logprobs) == len(together[4].token_ids)


def test_three_choices_of_one_prompt_each_follow_the_grammar_from_its_beginning(model, make_engine, asking):
    base = asking("n", "json", PERSON)
    requests = [
        replace(base, id=f"n-{seed}", group="n", sampling=replace(base.sampling, seed=seed))
        for seed in range(3)
    ]
    answers = generate(make_engine(model, max_rows=3), requests)
    assert all(is_json_of(PERSON, answer) for answer in answers)
    assert len({answer.text for answer in answers}) == 3


def test_a_preempted_row_goes_on_in_its_grammar(model, make_engine, fresh_engine, asking):
    pattern = "[a-z]{60}"
    requests = [replace(asking(f"{i}", "regex", pattern, seed=i), group="g") for i in range(2)]
    engine = make_engine(model, max_rows=2)
    for request in requests:
        engine.add(engine.check(request))
    events = [event for _ in range(9) for event in engine.step()]
    late = asking("late", "choice", ["abc"])
    engine.add(engine.check(late))
    while engine.has_work:
        events += engine.step()
        engine.scheduler.check_integrity()
    assert engine.stats().num_preempted > 0
    for request in (*requests, late):
        text = "".join(event.text for event in events if event.request_id == request.id)
        assert re.fullmatch(pattern if request is not late else "abc", text)
        assert text == generate(fresh_engine(), [request])[0].text


def test_an_answer_goes_on_from_a_prefix_and_a_cancelled_one_leaves_nothing(model, make_engine, asking):
    engine = make_engine(model, prefix_cache_bytes=1 << 24)
    first = generate(engine, [asking("one", "json", PERSON, seed=5)])[0]
    gone = asking("two", "json", PERSON, seed=6)
    engine.add(engine.check(gone))
    for _ in range(4):
        engine.step()
    assert engine.cancel("two") is not None
    again = generate(engine, [replace(asking("one", "json", PERSON, seed=5), id="again")])[0]
    assert (again.text, again.finish) == (first.text, first.finish)


def test_an_answer_ends_where_its_grammar_does_even_if_ends_are_ignored(model, make_engine, asking):
    same = {"seed": 3, "ignore_eos": True}
    answers = generate(
        make_engine(model),
        [
            asking("closed", "regex", "[a-z]{5}", **same),
            asking("late", "regex", "[a-z]{5}", min_tokens=50, **same),
            asking("open", "regex", "[a-z]{5,}", max_tokens=30, **same),
            asking("stopped", "regex", "[a-z]{5}!", stop=("!",), **same),
            asking("exact", "regex", "[a-z]{5}", max_tokens=5, **same),
        ],
    )
    assert [answer.finish for answer in answers] == ["stop", "stop", "length", "stop", "stop"]
    assert [len(answer.text) for answer in answers] == [5, 5, 30, 5, 5]
    assert [answer.stop_reason for answer in answers] == [None, None, None, "!", None]
    assert len(answers[0].token_ids) == 5


def test_an_end_is_drawn_only_where_the_grammar_lets_an_answer_end(model, make_engine, asking):
    always = {"logit_bias": ((2, 100.0),), "ignore_eos": False}
    answers = generate(
        make_engine(model),
        [
            asking("some", "regex", "a{3,}", **always),
            asking("more", "regex", "a{3,}", min_tokens=7, **always),
            asking("json", "json", {"type": "array", "items": {"const": 1}, "minItems": 2}, **always),
        ],
    )
    assert answers[0].text == "aaa"
    assert answers[1].text == "a" * 7
    assert len(json.loads(answers[2].text)) >= 2


def test_a_grammar_that_fails_at_run_time_ends_its_row_and_no_other(model, make_engine, asking):
    ambiguous = "start: " + " ".join(["a?"] * 3000) + '\na: "x" | "x" "x"'
    free = [asking(f"{i}", seed=i, ignore_eos=True, max_tokens=30) for i in range(2)]
    engine = make_engine(model)
    alone = [answer.token_ids for answer in generate(engine, free)]
    request = asking("bad", "grammar", ambiguous, ignore_eos=True, max_tokens=400)
    ends = {}
    for each in (*free, request):
        engine.add(engine.check(replace(each, id=f"{each.id}+")))
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
            if event.finish is not None:
                ends[event.request_id] = event
    assert ends["bad+"].finish == "error"
    assert isinstance(ends["bad+"].error, GenerationError)
    assert "grammar" in str(ends["bad+"].error)
    assert [tuple(tokens[f"{each.id}+"]) for each in free] == alone


def test_taking_back_restores_the_mask_and_masks_of_many_rows_are_those_of_each(grammar):
    rng = random.Random(0)
    kinds = [("json", PERSON), ("regex", "[ab]+c?"), ("grammar", SUMS), ("choice", ["a", "ab", "b"])]
    edits = [GrammarEdit(grammar(*kind), ends={2}) for kind in kinds for _ in range(3)]
    told: list[list[int]] = [[] for _ in edits]

    def mask(edit: GrammarEdit) -> np.ndarray | None:
        change = edit.change()
        return None if change is None else change.allowed.copy()

    for _ in range(25):
        for number, edit in enumerate(edits):
            count = rng.randrange(len(told[number]) + 1) if rng.random() < 0.2 else 0
            edit.retract(count)
            del told[number][len(told[number]) - count :]
        Masks().fill(edits)
        for number, edit in enumerate(edits):
            found = mask(edit)
            fresh = GrammarEdit(grammar(*kinds[number // 3]), ends={2})
            fresh.advance(told[number])
            expected = mask(fresh)
            assert fresh.length == edit.length
            if found is None:
                assert expected is None
                continue
            assert (found == expected).all()
            bits = np.unpackbits(found.view(np.uint8), bitorder="little")
            token_id = int(rng.choice(np.flatnonzero(bits)))
            edit.advance([token_id])
            told[number].append(token_id)


def test_what_is_told_behind_an_end_is_nobodys_and_is_taken_back_first(model, grammar):
    a, b = model.tokenizer.encode("ab", add_special_tokens=False)
    closed, open_ = (GrammarEdit(grammar("regex", pattern), ends={2}) for pattern in ("ab", "a+"))
    closed.advance([a, b, 77, 2])
    open_.advance([a, 2, 50])
    assert (closed.length, open_.length) == (2, None)
    assert closed.change() is open_.change() is None
    closed.retract(3)
    open_.retract(2)
    assert (closed.length, open_.length) == (None, None)
    for edit, expected in ((closed, {b}), (open_, {a, 2})):
        bits = np.unpackbits(edit.change().allowed.view(np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits)) == expected


def test_a_grammar_is_compiled_once_and_the_least_used_are_dropped(compiler, grammar):
    first = grammar("regex", "first")
    assert grammar("regex", "first") is first
    assert grammar("choice", ["first"]) is not first
    for number in range(300):
        grammar("regex", f"x{number}")
    assert compiler.find(of("regex", "first")) is None
    assert compiler.find(of("regex", "x299")) is not None
    assert len(compiler._grammars) <= 256


def test_many_who_ask_at_once_wait_for_one_compilation_and_hear_of_their_own_places(compiler):
    good = of("regex", "[a-z]{3} at once")
    bad = [ConstraintSpec("regex", "a(b", place) for place in ("guided_regex", "structured_outputs.regex")]

    async def ask() -> list[object]:
        asked = [*[good] * 20, *bad * 5]
        return await asyncio.gather(*map(compiler.get, asked), return_exceptions=True)

    found = asyncio.run(ask())
    assert {id(grammar) for grammar in found[:20]} == {id(compiler.find(good))}
    for number, error in enumerate(found[20:]):
        assert str(error).startswith(f"{bad[number % 2].place}: ")
        assert error.param == bad[number % 2].place.partition(".")[0]


def test_who_waits_too_long_is_told_and_others_are_served(model):
    tokens, size = TokenBytes(model.tokenizer), model.network.vocab_size
    hasty = GrammarCompiler(model.tokenizer, tokens, size, timeout_s=0.0)
    specs = [of("regex", f"x{{{number}}}") for number in range(1, 9)]

    async def ask() -> list[object]:
        return await asyncio.gather(*map(hasty.get, specs), return_exceptions=True)

    found = asyncio.run(ask())
    told = [each for each in found if not isinstance(each, Grammar)]  # a thread may be quicker than no time
    assert told
    for error in told:
        is_own = isinstance(error, RequestError) and "takes more than 0 s" in str(error)
        assert is_own or isinstance(error, OverloadedError), error
    assert hasty.compile(specs[0]) is hasty.find(specs[0])


def test_no_other_spelling_of_a_name_is_taken_for_another_property(model, grammar):
    schema = {
        **{"type": "object", "properties": {"a": {"type": "string"}, "n/m": {"type": "string"}}},
        "additionalProperties": {"type": "integer"},
    }

    def allows(text: str) -> bool:
        token_ids = model.tokenizer.encode(text, add_special_tokens=False)
        return grammar("json", schema).matcher().validate_tokens(token_ids) == len(token_ids)

    assert allows('{"a":"x","b":1}')
    assert not any(map(allows, ('{"a":1}', '{"\\u0061":1}', '{"n\\/m":1}', '{"n/m":1}')))


@pytest.mark.parametrize(
    ("spec", "place", "told"),
    [
        *((of("json", schema), place, told) for schema, place, told in BAD_SCHEMAS),
        *((of(kind, value), place, told) for kind, value, place, told in BAD_OTHERS),
    ],
)
def test_what_cannot_be_kept_to_is_refused_with_its_place(compiler, spec, place, told):
    with pytest.raises(RequestError) as caught:
        compiler.compile(spec)
    assert str(caught.value).startswith(place), str(caught.value)
    assert told in str(caught.value)
    assert caught.value.param == spec.place
    assert len(str(caught.value)) < 700


def test_an_engine_sees_constrained_rows_among_edited_ones(model, make_engine, asking):
    engine: Engine = make_engine(model)
    answers = generate(engine, [asking("a", "regex", "a{20}", repetition_penalty=5.0, presence_penalty=2.0)])
    assert answers[0].text == "a" * 20


@pytest.mark.large
@pytest.mark.parametrize("part", range(10))
def test_answers_are_json_of_generated_schemas(model, make_engine, compiler, asking, part):
    rng = random.Random(part)
    requests, schemas = [], []
    while len(requests) < 24:
        schema = some_schema(rng)
        name = f"{part}-{len(requests)}"
        try:
            requests.append(asking(name, "json", schema, seed=rng.getrandbits(32), max_tokens=300))
        except RequestError:  # what it cannot keep to is refused
            continue
        schemas.append(schema)
    answers = generate(make_engine(model, max_rows=8), requests)
    assert all(is_json_of(*pair) for pair in zip(schemas, answers, strict=True))
    assert sum(answer.finish == "stop" for answer in answers) > 16
