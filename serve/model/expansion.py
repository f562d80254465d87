"""What pictures, clips and sounds become in a prompt's text: placeholders as their family's processor writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from serve.errors import RequestError
from serve.model.prompt import MediaKind


@dataclass(frozen=True)
class Expansion:
    """Text that stands where a chat template writes `marker`.

    marker       what the family's templates write in an item's place, as `<|image_pad|>`
    placeholder  the token that stands for one vector of the tower; `text` holds it once for each
    text         what the marker is replaced by, and is then read by the tokenizer with everything around it
    glue         between the marker and the words after it, in a template that knows no media
    """

    kind: MediaKind
    marker: str
    placeholder: str
    text: str
    glue: str = "\n"


def expanded(raw: str, media: Sequence[Expansion]) -> str:
    """What a template wrote, each marker in it replaced by what its item becomes.

    Words under the veil hold no marker, so every one that is found is the template's own.
    """
    if not media:
        return raw
    markers = sorted({item.marker for item in media}, key=len, reverse=True)
    pieces = re.split(f"({'|'.join(map(re.escape, markers))})", raw)
    written = pieces[1::2]
    if written != [item.marker for item in media]:
        raise RequestError(
            f"messages: the chat template writes {len(written)} places for the {len(media)} pictures, clips and "
            "sounds of these messages, or in another order; it may know them in user turns alone",
            "messages",
        )
    pieces[1::2] = [item.text for item in media]
    return "".join(pieces)
