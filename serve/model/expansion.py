"""What one picture, clip or sound becomes in a prompt's text: placeholders as its family's processor writes them."""

from __future__ import annotations

from dataclasses import dataclass

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
