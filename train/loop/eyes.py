"""What a step's forwards see: the media of a batch in; embeddings, positions and masks of its rows out.

Where towers are frozen, a piece's features are computed once, by itself, and kept by its content; where they train,
they are computed inside the loss, with a gradient. Either way a row's features do not depend on its neighbours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from serve.model.network import Network, evaluating
from serve.model.prompt import Media
from serve.model.vision import Features, Placed, Vision
from train.data.media_reader import LaterInputs
from train.data.row_media import Standing, blocks_of, rope_of
from train.loop.joined import Joiner

MAX_FEATURE_BYTES = 1 << 30


@dataclass(frozen=True)
class Seen:
    """What the rows of one forward [B, T] show beside their tokens.

    pieces    (row, columns, the piece's key)
    features  of the pieces, by key; where towers train there are none, and `joiner` makes them of `media`
    positions [3, B, T] int32, for families that turn keys by three positions
    blocks    [B, T] int32, tokens of one number see one another; -1: causally
    """

    vision: Vision
    pieces: tuple[tuple[int, np.ndarray, str], ...]
    features: Mapping[str, Features]
    media: Mapping[str, Media]
    joiner: Joiner
    positions: mx.array | None
    blocks: mx.array | None

    def inputs(self, tokens: mx.array) -> tuple[mx.array | None, dict[str, Any]]:
        """What `Network.hidden` takes for these tokens: embeddings [B, T, D], and extras."""
        features = dict(self.features) or self.joiner.encode(self.media)
        placed = [Placed(row, columns, features[key]) for row, columns, key in self.pieces]
        embeddings, extras = self.vision.inputs(tokens, placed)
        return embeddings, extras if self.positions is None else {**extras, "position_ids": self.positions}


class Eyes:
    """The towers of a network that trains, and what was computed by them so far.

    trains     whether any weight of theirs does
    max_bytes  of features that are kept, where none does; the longest unused go first
    """

    def __init__(
        self, network: Network, vision: Vision, *, trains: bool, max_bytes: int = MAX_FEATURE_BYTES
    ) -> None:
        self.vision = vision
        self.trains = trains
        self.max_bytes = max_bytes
        self.num_encoded = 0
        """Pieces that were computed beforehand; one that was dropped and computed again counts twice."""
        self._network = network
        self._joiner = Joiner(vision)
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self._num_bytes = 0

    def see(self, rows: Sequence[Sequence[Standing]], shape: tuple[int, int]) -> Seen:
        """What a batch's rows [B] show, for a forward over its tokens [B, T]."""
        pieces: list[tuple[int, np.ndarray, str]] = []
        media: dict[str, Media] = {}
        for row, standing in enumerate(rows):
            for one in standing:
                for piece in one.media.media:
                    assert int(piece.positions[-1]) + one.start < one.stop, "media are never cut"
                    pieces.append((row, piece.positions + one.start, piece.key))
                    media.setdefault(piece.key, piece)
        _read_ahead(piece for key, piece in media.items() if key not in self._kept)
        if self.trains:
            with evaluating(self._network):
                self._joiner.prove(list(media.values()))
        positions = mx.array(rope_of(rows, shape[1])) if self.vision.positions else None
        blocks = blocks_of(rows, shape[1])
        return Seen(
            self.vision,
            tuple(pieces),
            {} if self.trains else dict(self._features(media)),
            media if self.trains else {},
            self._joiner,
            positions,
            mx.array(blocks) if blocks is not None else None,
        )

    def _features(self, media: Mapping[str, Media]) -> Iterator[tuple[str, Features]]:
        for key, piece in media.items():
            found = self._kept.get(key)
            if found is None:
                with evaluating(self._network):
                    found = self.vision.encode(piece)
                    mx.eval(found.embeddings, *found.deepstack)
                self.num_encoded += 1
                self._keep(key, found)
            else:
                self._kept.move_to_end(key)
            yield key, found

    def _keep(self, key: str, features: Features) -> None:
        self._kept[key] = features
        self._num_bytes += features.num_bytes
        while self._num_bytes > self.max_bytes and self._kept:
            _, dropped = self._kept.popitem(last=False)
            self._num_bytes -= dropped.num_bytes


def _read_ahead(media: Iterable[Media]) -> None:
    """Begin to decode them, on the reader's threads: the first is waited for while the others are made."""
    for piece in media:
        if isinstance(piece.inputs, LaterInputs):
            piece.inputs.read_ahead()
