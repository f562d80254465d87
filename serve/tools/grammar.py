"""What an answer must be where it must call, or call as a schema says: a format's calls as a grammar of llguidance's.

Marks that are special tokens stand in it as these; words never are them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from serve.constraints.grammar import JSON_OPTIONS, OWN_OPTIONS
from serve.tools.formats import Parameters, Writing
from serve.tools.rules import ToolMarks
from serve.tools.tool import Tool, properties_of

Wanted = Literal["required", "auto"]
TEXT = r"/(.|\n)*/"
MAX_COUNTED = 1000
"""Longer texts are not counted."""
_NUMBER = "{number}"


def schema_of(tool: Tool) -> dict[str, Any]:
    """Of a call's arguments; a tool without parameters takes none."""
    if not tool.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **tool.parameters}


def calls_grammar(
    marks: ToolMarks,
    tools: Sequence[Tool],
    wanted: Wanted,
    *,
    is_single: bool,
    loose: Collection[str] = (),
    answer: Mapping[str, Any] | None = None,
) -> str | None:
    """A grammar in Lark's form; None where the format's calls cannot be said in one.

    wanted  required: calls and nothing else; auto: text, in which a call that begins is one
    loose   names of tools whose arguments are any
    answer  a JSON Schema that text is held to, where it is no call
    """
    writing = marks.format.writing
    return None if writing is None else _Grammar(marks, writing, loose).of(tools, wanted, is_single, answer)


class _Grammar:
    """Rules, as they come to be."""

    def __init__(self, marks: ToolMarks, writing: Writing, loose: Collection[str]) -> None:
        self._marks, self._writing, self._loose = marks, writing, loose
        self._rules: list[str] = []
        names = sorted(marks.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def of(
        self, tools: Sequence[Tool], wanted: Wanted, is_single: bool, answer: Mapping[str, Any] | None
    ) -> str:
        writing, mark = self._writing, ""
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
            rule = f"p{number}_{index}"
            one = self._parameter(parameters, name, part, schema, rule, is_any=tool.name in self._loose)
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
    ) -> str:
        before, after = parameters.before.replace("{name}", name), parameters.after
        part = part if isinstance(part, dict) else {}
        shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        if parameters.quotes is None or not _is_text(part):
            value = _json({} if is_any else {**shared, **part})
            return f"{self._text(before)} {value} {self._text(after)}"
        opens, closes = parameters.quotes
        choices = part.get("enum", [part["const"]] if "const" in part else None)
        if choices is not None and all(isinstance(choice, str) for choice in choices) and not is_any:
            words = " | ".join(self._text(choice, is_words=True) for choice in choices)
            return f"{self._text(before + opens)} ({words}) {self._text(closes + after)}"
        end = closes + after
        if not end:
            return f"{self._text(before)} {_json({'type': 'string'})}"
        self._rules.append(f"{rule}v: {self._until(end, _counted(part))}")
        return f"{self._text(before + opens)} {rule}v"

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


def _is_text(part: Mapping[str, Any]) -> bool:
    """Whether a value is written as it is, and not as JSON."""
    kind = part.get("type")
    if isinstance(kind, str):
        return kind == "string"
    if "enum" in part or "const" in part:
        return all(isinstance(each, str) for each in part.get("enum", [part.get("const")]))
    return (not isinstance(kind, list) and "$ref" not in part) or (
        isinstance(kind, list) and "string" in kind
    )


def _counted(part: Mapping[str, Any]) -> str:
    least, most = part.get("minLength", 0), part.get("maxLength")
    if not isinstance(most, int) or most > MAX_COUNTED or not isinstance(least, int) or least > most:
        return TEXT
    return rf"/(.|\n){{{least},{most}}}/"
