"""What an answer must be where it must call, or call as a schema says: a format's calls as a grammar of llguidance's.

Marks that are special tokens stand in it as these; words never are them. Where headers tell thoughts from calls, it
says where thoughts stand, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from serve.constraints.grammar import CLASS, JSON_OPTIONS, OWN_OPTIONS
from serve.errors import RequestError
from serve.tools.format import Headers, Parameters
from serve.tools.rules import ToolMarks
from serve.tools.tool import Tool, properties_of
from serve.tools.values import alternatives

Wanted = Literal["required", "auto"]
TEXT = r"/(.|\n)*/"
FORMATS = frozenset(
    {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"}
)
"""Of texts, which grammars know."""
_NOT_KEPT = frozenset(
    {
        *("uniqueItems", "propertyNames", "minProperties", "maxProperties", "dependentRequired", "not"),
        *("dependentSchemas", "dependencies", "contains", "minContains", "maxContains", "if", "then", "else"),
        *("unevaluatedProperties", "unevaluatedItems"),
    }
)
_SAYS_MORE = frozenset(
    {"$ref", "properties", "items", "prefixItems", "allOf", "anyOf", "oneOf", "not", "if", "minimum"}
)
"""Of a schema without a type: it is not any text."""
MAX_COUNTED = 1000
"""Longer texts are not counted."""
_NUMBER = "{number}"


def schema_of(tool: Tool) -> dict[str, Any]:
    """Of a call's arguments; a tool without parameters takes none."""
    if not tool.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {**tool.parameters, "type": "object"}


def softened(value: Any) -> Any:
    """A schema without what no grammar can keep to: it allows more."""
    if isinstance(value, list):
        return [softened(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: softened(each)
        for key, each in value.items()
        if key not in _NOT_KEPT and not (key == "format" and each not in FORMATS)
    }


def calls_grammar(
    marks: ToolMarks,
    tools: Sequence[Tool],
    wanted: Wanted,
    *,
    is_single: bool,
    loose: Collection[str] = (),
    soft: Collection[str] = (),
    answer: Mapping[str, Any] | None = None,
) -> str:
    """A grammar in Lark's form. RequestError names what of a strict tool cannot be kept to in the format's way.

    wanted  required: calls and nothing else; auto: text, in which a call that begins is one
    loose   names of tools whose arguments are any
    soft    names of those whose schemas are kept to as far as a grammar can
    answer  a JSON Schema that text is held to, where it is no call
    """
    told = [
        replace(tool, parameters=softened(tool.parameters)) if tool.name in soft else tool for tool in tools
    ]
    return _Grammar(marks, loose).of(told, wanted, is_single, answer)


class _Grammar:
    """Rules, as they come to be."""

    def __init__(self, marks: ToolMarks, loose: Collection[str]) -> None:
        self._marks, self._writing, self._loose = marks, marks.format.writing, loose
        self._trims = any(whole.marks and whole.marks.trim == "white" for whole in marks.format.wholes)
        self._rules: list[str] = []
        names = sorted(marks.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def of(
        self, tools: Sequence[Tool], wanted: Wanted, is_single: bool, answer: Mapping[str, Any] | None
    ) -> str:
        writing, mark = self._writing, ""
        if writing.headers is not None:
            return self._of_messages(writing.headers, tools, wanted, answer)
        if wanted == "auto" and answer is None:
            mark = self._mark()
        # The mark is read with the text before it, wherever it stands.
        before = writing.before if writing.opening else writing.before.removeprefix(mark)
        self._rules += [
            f"call{number}: {self._call(tool, before, number)}" for number, tool in enumerate(tools)
        ]
        self._rules.append(f"call: {' | '.join(f'call{number}' for number in range(len(tools)))}")
        if mark and not writing.opening:
            self._rules += [f"block: {self._until(mark)} call", f"tail: {TEXT}"]
            return self._written("tail | block" if is_single else "block* tail")
        more = "" if is_single else f" ({self._text(writing.joint)} call)*"
        calls = f"call{more} {self._text(writing.closing)}"
        if mark:
            opening = f"{self._until(mark)} {self._text(writing.opening.removeprefix(mark))}"
            self._rules += [f"block: {opening} {calls}", f"tail: {TEXT}"]
            return self._written("tail | block" if is_single else "block* tail")
        calls = f"{self._text(writing.opening)} {calls}"
        if wanted == "required":
            return self._written(calls)
        if answer is not None:
            return self._written(f"{_json(answer)} | {calls}")
        self._rules.append(r"words: /([^\s{\[](.|\n)*)?/")  # an answer that begins as a call is one
        return self._written(f"words | {calls}")

    def _of_messages(
        self, headers: Headers, tools: Sequence[Tool], wanted: Wanted, answer: Mapping[str, Any] | None
    ) -> str:
        """A thought, if it likes, and a call, which ends the answer; or words, and then a call or what is none."""
        calls = [self._call(tool, self._writing.before, number) for number, tool in enumerate(tools)]
        free = {"thought": headers.thought}
        if wanted != "required":
            free["words"] = headers.words
            calls.append(f"{self._text(headers.answer)} {TEXT if answer is None else _json(answer)}")
        self._rules.append(f"last: {' | '.join(calls)}")
        for name, header in free.items():
            self._rules.append(f"{name}: {self._text(header)} {self._until(headers.following)}")
        return self._written(" ".join([*(f"{name}?" for name in free), "last"]))

    def _mark(self) -> str:
        """The mark that calls begin with in text; "" if there is none."""
        whole = self._writing.opening + self._writing.before
        return next((mark for mark in self._marks.format.marks if whole.startswith(mark)), "")

    def _written(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._rules]) + "\n"

    def _call(self, tool: Tool, before: str, number: int) -> str:
        """One call of a tool, with that before its arguments."""
        opening = self._text(before.replace("{name}", tool.name))
        return f"{opening} {self._arguments(tool, number)} {self._text(self._writing.after)}"

    def _arguments(self, tool: Tool, number: int) -> str:
        parameters = self._writing.parameters
        if parameters is None:
            return _json({"type": "object"} if tool.name in self._loose else schema_of(tool))
        return self._parameters(parameters, tool, number)

    def _parameters(self, parameters: Parameters, tool: Tool, number: int) -> str:
        """Those that must be there and any of the others, in the order of the schema."""
        schema, properties = schema_of(tool), list(properties_of(tool).items())
        required = schema.get("required")
        must = set(required) if isinstance(required, list) else set()
        rest, is_free = "", True  # what may follow, and whether nothing may
        for index in reversed(range(len(properties))):
            name, part = properties[index]
            if parameters.names.fullmatch(name) is None:
                if name in must and tool.strict:
                    raise RequestError(
                        f"tools: parameter {name!a:.100} of {tool.name!r} must be given, and a name like that "
                        f"cannot be written in {self._marks.format.name}'s way to call",
                        "tools",
                    )
                continue
            rule = f"p{number}_{index}"
            is_any = tool.name in self._loose
            one = self._parameter(
                parameters, name, part, schema, rule, is_any=is_any, is_strict=tool.strict and not is_any
            )
            joined = f"{self._text(parameters.joint)} {rest}".strip()
            follows = "" if not rest else f" ({joined})?" if is_free else f" {joined}"
            skip = f" | {rest}" if rest and name not in must else ""
            self._rules.append(f"{rule}: {one}{follows}{skip}")
            is_free = is_free and name not in must
            rest = rule
        if not rest:
            return '""'
        return f"({rest})?" if is_free else rest

    def _parameter(
        self,
        parameters: Parameters,
        name: str,
        part: Any,
        schema: Mapping[str, Any],
        rule: str,
        *,
        is_any: bool,
        is_strict: bool,
    ) -> str:
        """All ways to write a parameter."""
        after = parameters.after.replace("{name}", name)
        part = part if isinstance(part, dict) and not is_any else {}
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        options = list(alternatives(part, schema))
        texts = [] if parameters.quotes is None else [each for each in options if _is_text(each)]
        listed = [_listed(each) for each in texts]
        ways = []
        for number, (option, words) in enumerate(zip(texts, listed, strict=True)):
            opens, closes = parameters.quotes or ("", "")
            before, end = self._text(parameters.opening(name, "string") + opens), closes + after
            if words is not None:
                choices = " | ".join(self._text(word, is_words=True) for word in words)
                ways.append(f"{before} ({choices}) {self._text(end)}")
            elif not end:
                ways.append(f"{before} {_json({'type': 'string'})}")
            else:
                text = _text_of(option, name if is_strict else None, trims=self._trims)
                self._rules.append(f"{rule}v{number}: {self._until(end, text)}")
                ways.append(f"{before} {rule}v{number}")
        if not texts and not parameters.says_kinds:
            others = [{**shared, **part}]
        elif parameters.says_kinds or parameters.quotes != ("", "") or None not in listed:
            others = [{**shared, **each} for each in options if not _is_text(each)]
        else:
            others = []  # a text may be anything, and so be these
        for option in others:
            before = self._text(parameters.opening(name, _kind(option)))
            ways.append(f"{before} {_json(option)} {self._text(after)}")
        return ways[0] if len(ways) == 1 else f"({' | '.join(ways)})"

    def _until(self, end: str, text: str = TEXT) -> str:
        """Text up to the first `end`, and that."""
        found = self._special.match(end)
        if found is not None:
            return f"{text} {self._text(end)}"
        found = self._special.search(end)
        cut = found.start() if found else len(end)
        name = f"u{len(self._rules)}"
        self._rules.append(f"{name}[lazy]: {text} {_string(end[:cut])}")
        return f"{name} {self._text(end[cut:])}".strip()

    def _text(self, text: str, *, is_words: bool = False) -> str:
        """Literal text, with its special tokens."""
        if not text:
            return '""'
        atoms, at = [], 0
        for found in () if is_words else re.finditer(f"{self._special.pattern}|{re.escape(_NUMBER)}", text):
            if text[at : found.start()]:
                atoms.append(_string(text[at : found.start()]))
            number = self._marks.special.get(found[0])
            atoms.append("/[0-9]{1,3}/" if number is None else f"<[{number}]>")
            at = found.end()
        if text[at:]:
            atoms.append(_string(text[at:]))
        return " ".join(atoms)


def _string(text: str) -> str:
    return json.dumps(text).replace("\x7f", "\\u007f")


def _json(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, OWN_OPTIONS: JSON_OPTIONS})}"


def _is_text(option: Mapping[str, Any]) -> bool:
    """Whether a value is written as it is, and not as JSON."""
    if "type" in option:
        return option["type"] == "string"
    if "enum" in option or "const" in option:
        return _listed(option) is not None
    return not _SAYS_MORE & option.keys()


def _listed(option: Mapping[str, Any]) -> Sequence[str] | None:
    """The texts that there are; None: any, or not texts alone."""
    words = option.get("enum", [option["const"]] if "const" in option else None)
    is_listed = isinstance(words, list) and words and all(isinstance(word, str) for word in words)
    return words if is_listed else None


def _kind(option: Mapping[str, Any]) -> str:
    kind = option.get("type")
    return kind if isinstance(kind, str) else "object"


def _text_of(option: Mapping[str, Any], strict_name: str | None, *, trims: bool) -> str:
    """What a text may be, as a regular expression. RequestError for what it cannot be held to and must be, being a
    parameter of that name in a strict tool."""
    pattern, least, most = option.get("pattern"), option.get("minLength") or 0, option.get("maxLength")
    has_length = bool(least) or most is not None
    problem = ""
    if isinstance(pattern, str):
        own = _anchored(pattern)
        if own is not None and not has_length:
            return f"/{own}/"
        problem = f"pattern {pattern!r:.100}"
    if option.get("format") in FORMATS:
        problem = f"format {option['format']}"
    if max(least, most or 0) > MAX_COUNTED and not problem:
        problem = f"a length of {max(least, most or 0)}"
    if problem and strict_name is not None:
        raise RequestError(
            f"tools: strict, but {problem} of parameter {strict_name!a:.100} cannot be kept to: this model "
            f"writes it as plain text, for which patterns without lengths and lengths up to {MAX_COUNTED} can",
            "tools",
        )
    return TEXT if problem or not has_length else _of_length(least, most, trims=trims)


def _of_length(least: int, most: int | None, *, trims: bool) -> str:
    """trims: white space at its ends is not counted, being none of it."""
    if not trims or not least:
        return rf"/(.|\n){_times(least, most)}/"
    inner = rf"(.|\n){_times(max(least - 2, 0), None if most is None else max(most - 2, 0))}\S"
    return rf"/\S{inner}/" if least > 1 else r"/\S/" if most == 1 else rf"/\S({inner})?/"


def _times(least: int, most: int | None) -> str:
    return f"{{{least},{'' if most is None else most}}}"


def _anchored(pattern: str) -> str | None:
    """A pattern that a text holds → one that all of it is; None where that is not told by its two ends."""
    begins, ends = pattern.startswith("^"), bool(re.search(r"(?<!\\)(\\\\)*\$$", pattern))
    core = pattern[begins : len(pattern) - ends]
    plain = CLASS.sub("", re.sub(r"\\.", "", core))
    if re.search(r"[\^$]|\(\?", plain) or "\n" in core:
        return None
    core = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", core)
    free = r"(.|\n)*"
    return f"{'' if begins else free}({core}){'' if ends else free}"
