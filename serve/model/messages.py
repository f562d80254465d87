"""What a chat template is given: messages, tools and variables in the one form that templates know.

Content is text, a tool call's arguments are an object, and nothing but JSON's own types is left, since a template is
foreign code. What has another form is refused by its name, `messages.3.content`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve.errors import RequestError
from serve.model.expansion import Expansion
from serve.model.prompt import MediaKind
from serve.model.renderer import Message
from serve.model.words import Veil, spare_characters

HALF = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair, which JSON can spell and no tokenizer reads."""
MEDIA_PARTS: Mapping[str, MediaKind] = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
"""Types of parts that show something."""
Text = str | list[dict[str, Any]]
"""A message's content: text, or parts of text and of media (`{"type": "image"}`) where it shows something."""


@dataclass(frozen=True)
class Conversation:
    """Messages as they were said, and all of it as a template gets it."""

    plain: tuple[dict[str, Any], ...]
    messages: tuple[dict[str, Any], ...]
    """`plain`, under the veil."""
    tools: list[Any] | None
    variables: Mapping[str, Any]
    veil: Veil | None
    """None if there is nothing to hide."""
    limit_s: float | None = None
    """Seconds that the template may take."""
    media: tuple[tuple[Expansion, ...], ...] = ()
    """Of each message, what it shows."""

    def first(self, count: int) -> Conversation:
        """Its first messages alone, under the same veil."""
        return replace(
            self, plain=self.plain[:count], messages=self.messages[:count], media=self.media[:count]
        )

    def ending(self, content: Text) -> Conversation:
        """The same with another last content, which is not under the veil."""
        return self.saying(len(self.messages) - 1, content)

    def saying(self, index: int, content: Text) -> Conversation:
        """The same with another content of message `index`, which is not under the veil.

        One of text shows nothing; one of parts shows what the message did.
        """
        messages, media = list(self.messages), list(self.media)
        messages[index] = {**messages[index], "content": content}
        if isinstance(content, str):
            media[index] = ()
        return replace(self, messages=tuple(messages), media=tuple(media))

    @property
    def shown(self) -> tuple[Expansion, ...]:
        """What all its messages show, in order."""
        return tuple(item for items in self.media for item in items)

    def spare(self, count: int) -> list[str]:
        """Characters that nothing in it has, nor the veil."""
        stand_ins = self.veil.stand_ins.values() if self.veil else ()
        return spare_characters(count, [*leaves([self.plain, self.tools, self.variables]), *stand_ins])


def plain_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    """Tools in JSON's types; none at all if the list is empty. RequestError for what is no tool."""
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise RequestError(f"tools.{index}: found {_kind(tool)}; expected an object", f"tools.{index}")
    return [data(tool) for tool in tools] if tools else None


def data(value: Any, change: Callable[[str], str] = str) -> Any:
    """A value out of JSON's types alone, which is all that a template may meet, with every text in it changed."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return change(str(value))
    if isinstance(value, Mapping):
        return {data(key, change): data(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [data(item, change) for item in value]
    return f"<{type(value).__name__}>"


def leaves(value: Any) -> Iterator[str]:
    """Every text in a value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(key)
            yield from leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)


def plain_message(message: Message, index: int, shows: bool = False) -> dict[str, Any]:
    """A message in that form; `index` names it in the RequestError.

    shows  whether parts of media are known, and stay in the content without what they hold
    """
    name = f"messages.{index}"
    if not isinstance(message, Mapping):
        raise RequestError(f"{name}: found {_kind(message)}; expected an object with role and content", name)
    # Not with the rest: what a part shows may be megabytes of base64, or nothing that JSON knows.
    plain: dict[str, Any] = data({key: value for key, value in message.items() if key != "content"})
    if not isinstance(plain.get("role"), str):
        raise RequestError(
            f"{name}.role: found {_kind(plain.get('role'))}; expected a string", f"{name}.role"
        )
    plain["content"] = _plain_content(message.get("content"), f"{name}.content", shows)
    calls = plain.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise RequestError(f"{name}.tool_calls: found {_kind(calls)}; expected a list", f"{name}.tool_calls")
    if not calls:
        plain.pop("tool_calls", None)  # a list of none says what no list does; templates take it for calls
    else:
        plain["tool_calls"] = [
            _plain_call(call, f"{name}.tool_calls.{number}") for number, call in enumerate(calls)
        ]
    return plain


def says(content: Text) -> str:
    """The words of a content."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def around(content: Text, before: str, after: str) -> Text:
    """A content with more words before and after all of it."""
    if isinstance(content, str):
        return before + content + after
    return [{"type": "text", "text": before}, *content, {"type": "text", "text": after}]


def shown_by(content: Text) -> list[MediaKind]:
    """Of each part of media in a content, its kind."""
    return [] if isinstance(content, str) else [part["type"] for part in content if part["type"] != "text"]


def _plain_content(content: Any, name: str, shows: bool) -> Text:
    if content is None or isinstance(content, str):
        return str(content or "")
    if not isinstance(content, (list, tuple)):
        raise RequestError(f"{name}: found {_kind(content)}; expected a string or a list of parts", name)
    parts = [_plain_part(part, f"{name}.{number}", shows) for number, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _plain_part(part: Any, here: str, shows: bool) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise RequestError(f"{here}: found {_kind(part)}; expected an object with type and text", here)
    found = part.get("type")
    kind = MEDIA_PARTS.get(found) if isinstance(found, str) else None
    if kind is not None and shows:
        return {"type": kind}
    if found != "text":
        takes = "text and media" if shows else "text"
        raise RequestError(
            f"this model reads {takes}; found a part of type {found if isinstance(found, str) else _kind(found)}",
            f"{here}.type",
        )
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{here}.text: found {_kind(part.get('text'))}; expected a string", f"{here}.text")
    return {"type": "text", "text": str(part["text"])}


def _plain_call(call: Any, name: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise RequestError(f"{name}: found {_kind(call)}; expected an object with a function", name)
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return dict(call)
    if not isinstance(arguments, dict):  # which no template expects: it is told as text
        return dict(call)
    half = next((half for text in leaves(arguments) if (half := HALF.search(text))), None)
    if half is not None:
        here = f"{name}.function.arguments"
        raise RequestError(
            f"{here}: found half a surrogate pair ({ascii(half.group())[1:-1]}); expected whole characters",
            here,
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _kind(value: Any) -> str:
    """A JSON value as messages name it: `a number (3)`."""
    if value is None:
        return "nothing"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return f"{names.get(type(value), 'an object')} ({json.dumps(value, default=str)[:40]})"


def dealt(
    messages: Sequence[Mapping[str, Any]], media: Sequence[Expansion]
) -> tuple[tuple[Expansion, ...], ...]:
    """Of each message, what it shows. RequestError if parts and media are not the same, in number and kind."""
    rest = list(media)
    dealt = []
    for number, message in enumerate(messages):
        kinds = shown_by(message["content"])
        items, rest = rest[: len(kinds)], rest[len(kinds) :]
        if [item.kind for item in items] != kinds:
            raise RequestError(
                f"messages.{number}.content: found parts of {', '.join(kinds)}; got media of "
                f"{', '.join(item.kind for item in items) or 'none'}",
                f"messages.{number}.content",
            )
        dealt.append(tuple(items))
    if rest:
        raise RequestError(
            f"messages: got {len(rest)} more pictures, clips or sounds than parts that show them", "messages"
        )
    return tuple(dealt)
