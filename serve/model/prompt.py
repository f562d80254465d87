"""A prompt as the engine takes it: token ids, the media that fill their placeholders, and where its tokens stand.

Plain host data: no text, no template, no array of the device. Token ids are expanded already: a picture that the
tower turns into n vectors has n placeholders among them.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from serve.model.ngrams import Ngrams

MediaKind = Literal["image", "video", "audio"]

KEY_BYTES = 8
"""Of one token's key."""
_SIGN = 0x80


@dataclass(frozen=True, eq=False)
class Media:
    """What a tower encodes in one call: a picture, a few frames of a clip, a stretch of sound.

    key          sha256, in hex, of the decoded content and of all settings it was processed with: equal keys have
                 equal features, whatever file or address they came from
    positions    [n] int32, ascending: where its placeholders stand among the prompt's tokens
    inputs       what the family's `get_input_embeddings` takes besides ids, by name, of this piece alone
    num_patches  what encoding costs, in the tower's own tokens
    step         of a clip's piece: how many positions before the next one it stands, where the family counts seconds
    """

    kind: MediaKind
    key: str
    positions: np.ndarray
    inputs: Mapping[str, np.ndarray] = field(repr=False)
    num_patches: int
    step: float = 1.0

    @property
    def start(self) -> int:
        """Position of its first placeholder."""
        return int(self.positions[0])

    @property
    def stop(self) -> int:
        """Behind its last placeholder."""
        return int(self.positions[-1]) + 1

    def first_in(self, start: int, stop: int) -> int | None:
        """The first of its placeholders among tokens [start, stop); None if there is none."""
        index = int(np.searchsorted(self.positions, start))
        is_there = index < len(self.positions) and self.positions[index] < stop
        return int(self.positions[index]) if is_there else None


class Rope(NamedTuple):
    """Where tokens stand for families that turn keys by several positions (M-RoPE).

    positions  [3, L] int32: temporal, height and width
    delta      a token at index i ≥ L of the sequence stands at i + delta, in all three
    """

    positions: np.ndarray
    delta: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a forward starts from.

    media   in the order of their first placeholders; no placeholder belongs to two
    rope    None: token i stands at i
    blocks  ranges [a, b) of tokens that see one another, whatever their order; ascending, they do not overlap. What
            is computed, kept or restored never ends inside one
    """

    token_ids: tuple[int, ...]
    media: tuple[Media, ...] = ()
    rope: Rope | None = None
    blocks: tuple[tuple[int, int], ...] = ()

    @cached_property
    def keys(self) -> array[int]:
        """By which a prefix knows the tokens: their ids; at placeholders negative numbers that follow from the
        media's key, its step and the placeholder's number in it, 63 bits each. A block's first token has one that
        follows from all of the block: what stands there was computed with what comes behind it."""
        keys = array("q", self.token_ids)
        for media in self.media:
            size = KEY_BYTES * len(media.positions)
            told = media.key if media.step == 1 else f"{media.key} {media.step!r}"
            stream = bytearray(hashlib.shake_256(told.encode()).digest(size))
            stream[KEY_BYTES - 1 :: KEY_BYTES] = bytes(
                byte | _SIGN for byte in stream[KEY_BYTES - 1 :: KEY_BYTES]
            )
            for position, key in zip(
                media.positions.tolist(), np.frombuffer(stream, dtype="<i8").tolist(), strict=True
            ):
                keys[position] = key
        for start, stop in self.blocks:
            digest = hashlib.blake2b(keys[start:stop].tobytes(), digest_size=KEY_BYTES).digest()
            number = int.from_bytes(digest, "little", signed=True)
            keys[start] = min(number, ~number)
        return keys

    @cached_property
    def tally(self) -> tuple[np.ndarray, np.ndarray]:
        """Its token ids, each once and ascending, and how often each comes: [K] int64 both. Not to be written to."""
        return np.unique(np.asarray(self.token_ids, dtype=np.int64), return_counts=True)

    @cached_property
    def ngrams(self) -> Ngrams:
        """Where its n-grams came in it last. Not to be extended."""
        return Ngrams(self.keys)

    def whole(self, stop: int) -> int:
        """Where what ends at `stop` may end: there, or before the block that it would cut."""
        index = bisect_left(self.blocks, (stop, 0)) - 1
        if index >= 0 and self.blocks[index][1] > stop:
            return self.blocks[index][0]
        return stop

    def block_stop(self, start: int) -> int:
        """Behind the block that begins at `start`; `start` where none does."""
        index = bisect_left(self.blocks, (start, 0))
        is_one = index < len(self.blocks) and self.blocks[index][0] == start
        return self.blocks[index][1] if is_one else start
