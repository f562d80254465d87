"""A row's media, looked at before it is tokenized: what stands in the text for each, and boxes in their new size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from serve.errors import RequestError
from serve.media.processor import Processed
from serve.model.expansion import Expansion
from serve.model.messages import MEDIA_PARTS
from serve.model.prompt import Prompt
from train.data.coordinates import Coordinates, Picture
from train.data.example import Example, Message
from train.data.media_reader import MediaReader
from train.data.row_media import RowMedia

MUCH = 4
"""By how many times a picture is shrunk for a person to be told."""


@dataclass(frozen=True)
class Looked:
    """A row as it is tokenized, and what it shows."""

    example: Example
    processed: tuple[Processed, ...] = ()
    reader: MediaReader | None = None

    @property
    def expansions(self) -> tuple[Expansion, ...]:
        """What stands in the text for each medium, in order."""
        return tuple(made.expansion for made in self.processed)

    @property
    def notes(self) -> Iterator[str]:
        """What a person should know of how its media were read."""
        if self.reader is None:
            return
        sizes = filter(None, (self.reader.sizes(ref) for ref in self.example.media))
        if any(MUCH * seen[0] * seen[1] < stored[0] * stored[1] for stored, seen in sizes):
            yield f"show pictures that are shrunk to less than 1/{MUCH} of their pixels (see image.max_pixels)"

    def prompt(self, token_ids: Sequence[int]) -> Prompt:
        """These tokens, which end with a prompt, with what they show."""
        media = self.row_media(token_ids, len(token_ids))
        return Prompt(tuple(token_ids)) if media is None else media.prompt(token_ids)

    def row_media(self, token_ids: Sequence[int], first_target: int) -> RowMedia | None:
        """What a sequence of the row shows; the prompt of families that see it both ways ends at its first target.

        RequestError where its placeholders and the media do not come out even.
        """
        if self.reader is None or not self.processed:
            return None
        found = self.reader.row_media(token_ids, self.example.media, self.processed)
        if found is None or not self.reader.sees_prompts:
            return found
        return replace(found, blocks=((0, max(first_target, found.stop)),))


def num_shown(message: Message) -> int:
    """How many media a message shows."""
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else ()
    return sum(isinstance(part, Mapping) and part.get("type") in MEDIA_PARTS for part in parts)


def words_of(message: Message) -> str:
    """A message's content for a person: `(image)` where it shows one."""
    content = message.get("content")
    if not num_shown(message):
        return str(content)
    return " ".join(
        f"({MEDIA_PARTS[part['type']]})" if part.get("type") in MEDIA_PARTS else str(part.get("text"))
        for part in content or ()
    )


def look(example: Example, reader: MediaReader | None) -> Looked:
    """Read what a row shows. RequestError, which begins with the medium's place, where that cannot be done."""
    if not example.media:
        return Looked(example)
    if reader is None:
        first = example.media[0]
        raise RequestError(
            f"{first.place}: found media ({first.kind}), and this model reads text alone; answers may rest on it: "
            f"take such rows out, or the key"
        )
    processed = tuple(reader.read(ref) for ref in example.media)
    adjusted = example if reader.coordinates is None else _adjusted(example, reader, reader.coordinates)
    return Looked(adjusted, processed, reader)


def _adjusted(example: Example, reader: MediaReader, coordinates: Coordinates) -> Example:
    """The row with its boxes and points in the new size of the picture last shown before them."""
    refs = iter(example.media)
    picture: Picture | None = None

    def words(text: str, place: str) -> str:
        try:
            return text if picture is None else coordinates.adjusted(text, picture)
        except ValueError as error:
            raise RequestError(f"{place}: {error}", place) from error

    def turn(message: Message, place: str) -> Message:
        nonlocal picture
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": words(content, place)}
        parts = []
        for part in content or ():
            if part.get("type") in MEDIA_PARTS:
                found = reader.sizes(next(refs))
                picture = Picture(*found) if found is not None else picture
                parts.append(part)
            else:
                parts.append({**part, "text": words(str(part.get("text", "")), place)})
        return {**message, "content": parts} if parts else message

    def turns(messages: Sequence[Message] | None, name: str) -> tuple[Message, ...] | None:
        if messages is None:
            return None
        return tuple(turn(message, f"{name}.{number}") for number, message in enumerate(messages))

    return replace(
        example,
        messages=turns(example.messages, "messages"),
        chosen=turns(example.chosen, "chosen"),
        rejected=turns(example.rejected, "rejected"),
    )
