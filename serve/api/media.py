"""The pictures, clips and sounds of a chat: which of them a model takes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from serve.api.parts import MediaPart
from serve.api.schemas import Message
from serve.errors import RequestError
from serve.model.prompt import MediaKind

_PLURAL = {"image": "images", "video": "videos", "audio": "sounds"}


@dataclass(frozen=True)
class Item:
    """One part of a chat that is no text."""

    part: MediaPart
    name: str
    """Where it stands: `messages.0.content.1`."""


def items_of(messages: Sequence[Message]) -> list[Item]:
    """All of them, in the order in which they are shown."""
    return [
        Item(part, f"messages.{index}.content.{number}")
        for index, message in enumerate(messages)
        for number, part in message.media
    ]


def check_kinds(items: Sequence[Item], kinds: Collection[MediaKind]) -> None:
    """RequestError that names the first part of a kind that is not among those the model takes."""
    for item in items:
        if item.part.kind not in kinds:
            raise RequestError(
                f"{item.name}: found a part of type {item.part.type!r}; {_PLURAL[item.part.kind]} are not accepted, "
                f"this model reads {_listed(kinds)}",
                item.name,
            )


def _listed(kinds: Collection[MediaKind]) -> str:
    words = ["text", *(_PLURAL[kind] for kind in _PLURAL if kind in kinds)]
    return "text only" if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]} only"
