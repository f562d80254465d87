"""A ConstraintSpec → a Grammar, by llguidance; or RequestError, which names the place in a schema or pattern."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
from llguidance import LLMatcher, LLParserLimits
from llguidance.gbnf_to_lark import any_to_lark

from serve.constraints.spec import ConstraintSpec
from serve.constraints.vocabulary import GrammarVocabulary
from serve.errors import RequestError

MAX_CHARS = 131_072
"""Of a schema, a pattern or a grammar; OpenAI takes 120,000."""
MAX_WHITESPACE = 24
"""Spaces that a line of JSON may begin with."""
MAX_PROBES = 256
"""Parts of a schema that are tried while the one at fault is looked for."""
MAX_MESSAGE_CHARS = 400
NOTHING = "no text is allowed by it"
NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""What may come may be spelled by any tokens, not by the tokenizer's own alone, which it would be asked for in each
step."""
LOST = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
"""Control characters that JSON writes as their numbers."""
_NUMBER = r"(?:0[0-7bef]|1[0-9a-f]|7f)"
LOST_IN_PATTERN = re.compile(
    rf"{LOST.pattern}|\\x{_NUMBER}|\\u00{_NUMBER}|\\[xu]\{{0*(?:[0-7bef]|1[0-9a-f]|7f)\}}", re.IGNORECASE
)
CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
"""Of a pattern: any of the characters that it names."""
OWN_OPTIONS = "x-guidance"
JSON_OPTIONS = {
    # One space, or one line break and what the next line is indented by: a model that likes nothing better than white
    # space gets to the next word all the same.
    "whitespace_flexible": True,
    "whitespace_pattern": f" |\\n {{0,{MAX_WHITESPACE}}}",
    "item_separator": ",",
    "key_separator": ":",
    # One spelling a character: a name written with other escapes would be a property's, and not seen to be.
    "json_allowed_escapes": '"\\bfnrt',
    "coerce_one_of": False,
    "lenient": False,
}
LIMITS = LLParserLimits(max_lexer_states=20_000, max_grammar_size=200_000, verbose_errors=False)
"""Of one row: the states are about 2 kB each, and a mask takes 20 ms at the very worst."""

_SUBSCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SUBSCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SUBSCHEMA = ("items", "additionalProperties", "not")


class Grammar:
    """What an answer may be, compiled for one vocabulary. It does not change, and may be used from any thread."""

    def __init__(self, matcher: LLMatcher, vocabulary: GrammarVocabulary) -> None:
        """`matcher`: at the beginning of an answer, and nobody else's."""
        self._matcher = matcher
        self.vocabulary = vocabulary

    def matcher(self) -> LLMatcher:
        """One at the beginning of an answer, which is the caller's."""
        return self._matcher.deep_copy()

    def after(self, token_ids: Sequence[int]) -> Grammar | None:
        """What may follow these tokens; None where the grammar does not let them through."""
        matcher = self.matcher()
        if token_ids and not matcher.consume_tokens(list(token_ids)):
            return None
        return Grammar(matcher, self.vocabulary)


def compile_grammar(spec: ConstraintSpec, vocabulary: GrammarVocabulary) -> Grammar:
    """Takes milliseconds, or seconds where it is large. RequestError where it is not one that can be kept to."""
    if len(spec.text) > MAX_CHARS:
        _refuse(spec, f"{len(spec.text):,} characters; at most {MAX_CHARS:,} are accepted")
    if "\0" in spec.text and spec.kind != "choice":
        _refuse(spec, "found a NUL character")
    matcher, problem = _matcher(_source(spec), vocabulary)
    if problem:
        where = "".join(_way_to(spec, problem, vocabulary)) if spec.kind == "json" else ""
        _refuse(spec, _readable(problem, spec), where)
    if not _may_begin(matcher, vocabulary):
        _refuse(spec, "no text but an empty one is allowed by it")
    return Grammar(matcher, vocabulary)


def _refuse(spec: ConstraintSpec, message: str, where: str = "") -> NoReturn:
    raise RequestError(f"{spec.place}{where}: {message}", spec.place.partition(".")[0])


def _source(spec: ConstraintSpec) -> str:
    """In Lark's form, as llguidance has it."""
    if spec.kind == "regex":
        made = json.loads(LLMatcher.grammar_from_regex(spec.text))
        return made["grammars"][0]["lark_grammar"] + NO_FORCING
    if spec.kind == "choice":
        # As escapes: what a string of a Lark grammar may hold is not all that one of JSON may.
        words = " | ".join(json.dumps(word).replace("\x7f", "\\u007f") for word in json.loads(spec.text))
        return (
            f"start: WORD\nWORD: {words}{NO_FORCING}"  # one terminal: a rule has 2,000 alternatives at most
        )
    if spec.kind == "grammar":
        try:
            return any_to_lark(spec.text) + NO_FORCING
        except Exception as error:  # of its parser for GBNF, of any kind
            _refuse(spec, f"{error}"[:MAX_MESSAGE_CHARS])
    schema = json.loads(spec.text)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        _refuse(spec, f"found {spec.text[:80]}; expected a JSON Schema that allows something")
    if _has_own_options(schema):
        _refuse(
            spec, f"{OWN_OPTIONS} is not accepted: white space and unknown keywords are the server's to judge"
        )
    if place := _lost(schema):
        _refuse(
            spec, "found a control character in a string, which answers cannot be kept to", "".join(place)
        )
    return _source_of(schema)


def _lost(schema: dict[str, Any]) -> list[str]:
    """The way to a text that llguidance would take for the same without its control characters; [] where there is
    none. Of JSON's strings it leaves out those that have no short escape, but for what a class of a pattern names."""
    pending: list[tuple[list[str], Any, bool]] = [([""], schema, False)]
    while pending:
        way, part, is_value = pending.pop()
        if isinstance(part, str):
            is_pattern = not is_value and way[-1] == ".pattern"
            if (is_value and LOST.search(part)) or (
                is_pattern and LOST_IN_PATTERN.search(CLASS.sub("", part))
            ):
                return way
        elif isinstance(part, dict):
            pending += [
                ([*way, f".{key}"], value, is_value or key in ("const", "enum"))
                for key, value in part.items()
            ]
        elif isinstance(part, list):
            pending += [([*way, f".{number}"], value, is_value) for number, value in enumerate(part)]
    return []


def _source_of(schema: dict[str, Any]) -> str:
    return f"start: %json {json.dumps({**schema, OWN_OPTIONS: JSON_OPTIONS})}{NO_FORCING}"


def _matcher(source: str, vocabulary: GrammarVocabulary) -> tuple[LLMatcher, str]:
    """A matcher that knows what may come first, and what is wrong with it."""
    matcher = LLMatcher(vocabulary.tokenizer, source, log_level=0, limits=LIMITS)
    problem = matcher.get_error() if matcher.is_error() else ""
    # What it would warn of is a part that it does not keep to.
    problem = problem or "; ".join(matcher.get_grammar_warnings())
    if not problem:
        matcher.compute_bitmask()
        problem = matcher.get_error() if matcher.is_error() else ""
    return matcher, NOTHING if "NoExtensionBias" in problem else problem


def _may_begin(matcher: LLMatcher, vocabulary: GrammarVocabulary) -> bool:
    """Whether any token but the end may come first."""
    mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    bits = np.unpackbits(mask, bitorder="little")  # a copy
    bits[vocabulary.end_id] = 0
    return bool(bits.any())


def _readable(problem: str, spec: ConstraintSpec) -> str:
    """llguidance's words, less what they say of a grammar that was made here."""
    text = problem if spec.kind == "grammar" else _core(problem)
    text = text.replace("<non-verbose/>", "").strip()
    return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:MAX_MESSAGE_CHARS]}…"


def _core(problem: str) -> str:
    """A problem by itself: neither where in a grammar that was made here, nor a listing of that."""
    text = re.split(r"\n\s*\d+ \| ", problem)[0]
    for before in ("(in regex): ", "failed to compile JSON schema: "):
        text = text.partition(before)[2] or text
    return text


def _has_own_options(schema: Any) -> bool:
    """Whether any object in it has llguidance's key for how to read it."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            if OWN_OPTIONS in part:
                return True
            pending += part.values()
        elif isinstance(part, list):
            pending += part
    return False


def _way_to(spec: ConstraintSpec, problem: str, vocabulary: GrammarVocabulary) -> list[str]:
    """The way into a schema to the smallest part with the same problem; as far as MAX_PROBES trials lead."""
    root = json.loads(spec.text)
    shared = {name: root[name] for name in ("$defs", "definitions", "$schema") if name in root}
    way: list[str] = []
    here, left = root, MAX_PROBES
    while True:
        for step, part in _parts(here):
            left -= 1
            if left < 0:
                return way
            alone = part if not isinstance(part, dict) else {**_without(shared, way, step), **part}
            if _fails_alike(alone, problem, vocabulary):
                way.append(step)
                here = part
                break
        else:
            return way


def _without(shared: dict[str, Any], way: list[str], step: str) -> dict[str, Any]:
    """What a part may refer to; none of it for one that stands among that, where it would be its own problem."""
    first = way[0] if way else step
    return {} if first.startswith((".$defs", ".definitions")) else shared


def _fails_alike(schema: Any, problem: str, vocabulary: GrammarVocabulary) -> bool:
    if not isinstance(schema, dict):
        return not isinstance(schema, bool) and "schema must be an object" in problem
    return _core(_matcher(_source_of(schema), vocabulary)[1]) == _core(problem)


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Schemas that stand in this one, and where."""
    if not isinstance(schema, dict):
        return
    for name in _SUBSCHEMAS:
        if isinstance(group := schema.get(name), dict):
            yield from ((f".{name}.{key}", part) for key, part in group.items())
    for name in _SUBSCHEMA_LISTS:
        if isinstance(parts := schema.get(name), list):
            yield from ((f".{name}.{number}", part) for number, part in enumerate(parts))
    for name in _SUBSCHEMA:
        if name in schema and not isinstance(schema[name], list):
            yield f".{name}", schema[name]
