"""What one chat template takes and how it ends a turn, found once by rendering conversations of words nobody says.

Messages may be said in several forms: a call's arguments as an object or as JSON, content as text or as parts, no
content as "" or as none. A template renders some of them wrongly or not at all; it is given the first that it renders
right, in training and in serving. Knows no tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, takewhile
from types import MappingProxyType
from typing import Any, Literal

from serve.model.expansion import Expansion
from serve.model.jinja import TooSlowError
from serve.model.renderer import Message
from serve.model.words import ControlTokens

Render = Callable[[Sequence[Message], bool], str]
"""(messages, whether the next turn is opened) -> text, or whatever the template raises."""

RenderTools = Callable[[Sequence[Message], Sequence[Message] | None], str]
"""(messages, tools) -> text, the next turn being opened, or whatever the template raises."""

Content = Literal["text", "parts"]
Arguments = Literal["object", "text"]
Shown = Literal["part", "part_url", "part_content", "marker"]
"""A part of media: `{"type": "image"}`, `{"type": "image_url"}`, the first beside text under `content`, or the marker
itself among the words."""
NoContent = Literal["empty", "absent"]
_CONTENT: tuple[Content, ...] = ("text", "parts")
_ARGUMENTS: tuple[Arguments, ...] = ("object", "text")
_NO_CONTENT: tuple[NoContent, ...] = ("empty", "absent")
_SHOWN: tuple[Shown, ...] = ("part", "part_url", "part_content", "marker")
"""Each in the order of trying."""

ASKED, SAID, ASKED_AGAIN = "probedquestion", "probedanswer", "probedagain"
NAME, KEY, VALUE, RESULT = "probedcall", "probedkey", "probedvalue", "probedresult"
_ID = "probe0001"  # Mistral's templates want nine characters
_USER = {"role": "user", "content": ASKED}
_ANSWER = {"role": "assistant", "content": SAID}
_AGAIN = {"role": "user", "content": ASKED_AGAIN}
_SYSTEM = {"role": "system", "content": SAID}
_PARAMETERS = {
    "type": "object",
    "properties": {KEY: {"type": "string", "description": VALUE}},
    "required": [KEY],
}
_FUNCTION = {"name": NAME, "arguments": {KEY: VALUE}}
_CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": _ID, "type": "function", "function": _FUNCTION}],
}
_RESULT = {"role": "tool", "content": RESULT, "tool_call_id": _ID, "name": NAME}


NOTHING: Mapping[str, Shown] = MappingProxyType({})


@dataclass(frozen=True)
class Forms:
    """How a template wants messages, which come with content as text and arguments as objects."""

    content: Content = "text"
    arguments: Arguments = "object"
    no_content: NoContent = "empty"
    """Of a turn that only calls tools."""
    renders_calls: bool = False
    renders_results: bool = False
    """Of tools, in a conversation that calls one."""

    def shape(
        self, message: Message, media: Sequence[Expansion] = (), shown: Mapping[str, Shown] = NOTHING
    ) -> Message:
        """The message as the template wants it, with the media that it shows, each kind in its form."""
        calls = message.get("tool_calls")
        shaped = dict(message)
        if isinstance(message.get("content"), list):
            shaped["content"] = _showing(message["content"], media, shown)
        if calls and self.arguments == "text":
            shaped["tool_calls"] = [_with_text(call) for call in calls]
        if calls and self.no_content == "absent" and not message.get("content"):
            del shaped["content"]
        elif self.content == "parts" and isinstance(shaped.get("content"), str):
            shaped["content"] = [{"type": "text", "text": shaped["content"]}]
        return shaped


@dataclass(frozen=True)
class Ends:
    """How a template ends an assistant's turn."""

    stops: frozenset[str] = frozenset()
    """Control tokens at which a turn is over: the first of them ends it. Empty: nothing tells where a turn ends."""
    before_user: str = ""
    """Where the next turn's marker is the only end: that marker, after an answer."""
    before_result: str = ""
    """The same after calls of tools."""


def forms_of(render: Render) -> Forms:
    """The forms that a template renders right; the usual ones where it renders none. TooSlowError as `render`."""
    forms = Forms()
    for content in _CONTENT:
        text = _try(render, [replace(forms, content=content).shape(m) for m in (_USER, _ANSWER)])
        if ASKED in text and SAID in text:
            forms = replace(forms, content=content)
            break
    for no_content, arguments in product(_NO_CONTENT, _ARGUMENTS):
        other = replace(forms, no_content=no_content, arguments=arguments, renders_calls=True)
        if _is_call(_try(render, [other.shape(message) for message in (_USER, _CALLS)])):
            forms = other
            break
    text = _try(render, [forms.shape(message) for message in (_USER, _CALLS, _RESULT)])
    return replace(forms, renders_results=RESULT in text)


def renders_tools(render: RenderTools, forms: Forms) -> bool:
    """Whether a template writes a tool into the prompt, with what it is for."""
    function = {"name": NAME, "description": VALUE, "parameters": _PARAMETERS}
    for messages in ((_USER,), (_SYSTEM, _USER)):
        try:
            text = render(
                [forms.shape(message) for message in messages], [{"type": "function", "function": function}]
            )
        except Exception:  # a template is foreign code: what it raises is how it refuses
            continue
        if NAME in text and KEY in text:
            return True
    return False


def renders_system(render: RenderTools, forms: Forms) -> bool:
    """Whether a template writes what a system turn says."""
    try:
        return SAID in render([forms.shape(message) for message in (_SYSTEM, _USER)], None)
    except Exception:  # as above
        return False


def renders_broken(render: RenderTools, forms: Forms) -> bool:
    """Whether a template writes a call whose arguments are text that is no JSON."""
    function = {"name": NAME, "arguments": f"{{{VALUE}"}
    message = {**_CALLS, "tool_calls": [{"id": _ID, "type": "function", "function": function}]}
    try:
        text = render([forms.shape(each) for each in (_USER, message)], None)
    except Exception:  # as above
        return False
    return NAME in text and VALUE in text


def shown_of(render: Render, forms: Forms, item: Expansion) -> Shown | None:
    """In which form the template writes the marker of such an item, once, beside the words; None: in none.

    TooSlowError as `render`.
    """
    parts = [{"type": "text", "text": ASKED}, {"type": item.kind}, {"type": "text", "text": ASKED_AGAIN}]
    message = {"role": "user", "content": parts}
    for shown in _SHOWN:
        text = _try(render, [forms.shape(message, [item], {item.kind: shown})])
        if text.count(item.marker) == 1 and ASKED in text and ASKED_AGAIN in text:
            return shown
    return None


def ends_of(render: Render, forms: Forms, control: ControlTokens, known: Collection[str]) -> Ends:
    """How the template ends a turn. `control`: the tokens it may write; `known`: those that end turns in any case.

    TooSlowError as `render`.
    """

    def after(words: str, *messages: Message) -> str:
        text = _try(render, [forms.shape(message) for message in messages])
        return text[text.rindex(words) + len(words) :] if words in text else ""

    alone, followed = after(SAID, _USER, _ANSWER), after(SAID, _USER, _ANSWER, _AGAIN)
    followed = followed.split(ASKED_AGAIN)[0]
    common = _common(alone, followed)
    for tail in (common, alone):
        written = [token for _, token in control.find(tail)]
        if written:
            end = next((token for token in written if token in known), written[-1])
            return Ends(frozenset({*known, end}))
    before_user = leading(followed, control)
    if not before_user:
        return Ends(frozenset(known))
    calling = _try(render, [forms.shape(m) for m in (_USER, _CALLS)])
    called = _try(render, [forms.shape(m) for m in (_USER, _CALLS, _RESULT)])
    rest = called[len(calling) :] if calling and called.startswith(calling) else ""
    before_result = leading(rest, control) or before_user
    markers = {before_user.strip(), before_result.strip()}
    return Ends(frozenset({*known, *markers}), before_user, before_result)


def cue_of(render: Render, forms: Forms) -> str:
    """What the template puts between a question and the answer to it, as served. TooSlowError as `render`."""
    text = _try(render, [forms.shape(_USER)], True)
    return text[text.rindex(ASKED) + len(ASKED) :] if ASKED in text else ""


def after_cue(header: str, cues: Sequence[str], control: ControlTokens) -> int:
    """Where an answer's own words start after `header`, which holds what the template writes before its content.

    That is where the first cue ends that stands there whole from one of its control tokens on; else its longest
    piece, or the words after its last control token.
    """
    best = (0, len(header.rstrip()))
    for cue in cues:
        for at, token in control.find(cue):
            piece = cue[at:]
            for begin in (found.start() for found in re.finditer(re.escape(token), header)):
                length = len(_common(piece, header[begin:]))
                if length == len(piece):
                    return begin + length
                best = max(best, (length, begin + length), key=lambda found: found[0])
    if best[0]:
        return best[1]
    ends = [max((at + len(token) for at, token in control.find(cue)), default=0) for cue in cues]
    words = [cue[end:].strip() for cue, end in zip(cues, ends, strict=True)]
    return next((header.index(w) + len(w) for w in words if w and w in header), best[1])


def leading(text: str, control: ControlTokens) -> str:
    """The control token that a text begins with, and white space before it; "" if it begins with none."""
    begin = len(text) - len(text.lstrip())
    found = next(iter(control.find(text)), None)
    return text[: begin + len(found[1])] if found is not None and found[0] == begin else ""


def missing_calls(message: Message, text: str) -> Iterator[str]:
    """Names of a message's calls that are not in the text, or whose arguments are not."""
    written = squeezed(text)
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call if isinstance(call, Mapping) else {}
        name = str(function.get("name", ""))
        said = [name, *_words_of(function.get("arguments"))] if isinstance(function, Mapping) else []
        if not all(any(squeezed(form) in written for form in _spellings(words)) for words in said):
            yield name


def squeezed(text: str) -> str:
    """Without white space and backslashes, which templates put and leave out."""
    return "".join(text.replace("\\", "").split())


def _showing(
    parts: Sequence[Mapping[str, Any]], media: Sequence[Expansion], shown: Mapping[str, Shown]
) -> str | list[dict[str, Any]]:
    """Content of text and media in the forms that its kinds have; text alone where they all stand among the words."""
    rest, shaped = iter(media), []
    for number, part in enumerate(parts):
        if part["type"] == "text":
            shaped.append(dict(part))
            continue
        item = next(rest)
        form = shown[item.kind]
        if form == "marker":
            following = parts[number + 1].get("text", "") if number + 1 < len(parts) else ""
            glue = item.glue if following and not following[0].isspace() else ""
            shaped.append({"type": "text", "text": item.marker + glue})
        else:
            shaped.append({"type": f"{item.kind}_url" if form == "part_url" else item.kind})
    if all(part["type"] == "text" for part in shaped):
        return "".join(part["text"] for part in shaped)
    if "part_content" in shown.values():
        return [{**part, "content": part["text"]} if "text" in part else part for part in shaped]
    return shaped


def _common(a: str, b: str) -> str:
    return "".join(x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _try(render: Render, messages: Sequence[Message], opens: bool = False) -> str:
    try:
        return render(messages, opens)
    except TooSlowError:
        raise
    except Exception:  # a template is foreign code: what it raises is how it refuses
        return ""


def _is_call(text: str) -> bool:
    """Whether a call stands there whole, and neither as Python prints objects nor as JSON inside JSON."""
    return all(words in text for words in (NAME, KEY, VALUE)) and not any(
        wrong in text for wrong in (f"{{'{KEY}'", f'\\"{KEY}')
    )


def _with_text(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or isinstance(function.get("arguments"), (str, type(None))):
        return call
    return {
        **call,
        "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
    }


def _words_of(value: Any) -> Iterator[str]:
    """Texts and whole numbers in arguments, keys too; templates spell other values in their own ways."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, int) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _words_of(item)
    elif isinstance(value, Iterable):
        for item in value:
            yield from _words_of(item)


def _spellings(words: str) -> Iterator[str]:
    yield words
    yield json.dumps(words, ensure_ascii=False)[1:-1]
    yield json.dumps(words)[1:-1]
