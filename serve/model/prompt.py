"""A prompt as the engine takes it: token ids, and the media they refer to. No text and no template here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Media:
    """One picture of a prompt, still encoded. `sha256` is of `data`; caches are keyed by it."""

    kind: Literal["image"]
    data: bytes
    sha256: str


@dataclass(frozen=True)
class Prompt:
    """What a forward starts from. `token_ids` already hold the placeholders that `media` fill."""

    token_ids: tuple[int, ...]
    media: tuple[Media, ...] = ()
