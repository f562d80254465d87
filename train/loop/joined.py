"""Several pieces of media in one call of a tower that trains: fewer, larger products.

A family's code takes the pictures of one prompt at once, and its inputs are stacked in a few ways; whether joining
pieces gives each what it has alone is not known of families but tried, on the first pieces that could be joined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from serve.errors import ModelError
from serve.model.prompt import Media
from serve.model.vision import Features, Vision

MAX_PIECES = 64
MAX_PATCHES = 1 << 14
"""Of one call, in the tower's own tokens."""
MAX_ERROR = 1e-3
"""Of the largest feature: rounding of products of other shapes moves it by a millionth."""


class Joiner:
    """What encodes the pieces of a batch. Remembers which shapes of inputs may be joined."""

    def __init__(self, vision: Vision) -> None:
        self._vision = vision
        self._proven: dict[tuple[object, ...], bool] = {}

    def prove(self, media: Sequence[Media]) -> None:
        """Try the shapes among these pieces that nobody has tried: outside of any gradient, for it evaluates."""
        for shape, group in _groups(media).items():
            if shape not in self._proven and len(group) > 1:
                self._proven[shape] = self._is_equal(group[:2])

    def encode(self, media: Mapping[str, Media]) -> dict[str, Features]:
        """Each piece's features by its key; lazy, gradients pass."""
        found: dict[str, Features] = {}
        for shape, group in _groups(list(media.values())).items():
            size = MAX_PIECES if self._proven.get(shape) else 1
            for part in _parts(group, size):
                found |= self._encoded(part)
        return found

    def _encoded(self, media: Sequence[Media]) -> dict[str, Features]:
        if len(media) == 1:
            return {media[0].key: self._vision.encode(media[0])}
        features = self._vision.encode(_joined(media))
        stops = np.cumsum([len(one.positions) for one in media]).tolist()
        return {
            one.key: features.part(stop - len(one.positions), stop)
            for one, stop in zip(media, stops, strict=True)
        }

    def _is_equal(self, media: Sequence[Media]) -> bool:
        alone = [self._vision.encode(one) for one in media]
        try:
            together = list(self._encoded(media).values())
            pairs = [
                (one, other)
                for a, b in zip(alone, together, strict=True)
                for one, other in zip((a.embeddings, *a.deepstack), (b.embeddings, *b.deepstack), strict=True)
            ]
            return all(
                bool(mx.abs(one - other).max() <= MAX_ERROR * mx.maximum(mx.abs(one).max(), 1e-6))
                for one, other in pairs
            )
        except (ValueError, TypeError, IndexError, RuntimeError, ModelError):
            return False  # its code takes one at a time


def _groups(media: Sequence[Media]) -> dict[tuple[object, ...], list[Media]]:
    """Pieces whose inputs can be laid one behind the other, by the shapes of those inputs but for that axis."""
    groups: dict[tuple[object, ...], list[Media]] = {}
    for one in media:
        axes = _axes(one)
        shape = tuple(
            (name, axes[name], value.shape[: axes[name]] + value.shape[axes[name] + 1 :])
            for name, value in sorted(one.inputs.items())
        )
        groups.setdefault((one.kind, *shape), []).append(one)
    return groups


def _axes(media: Media) -> dict[str, int]:
    """Along which axis of each input pieces follow each other: the first, or behind an axis of prompts."""
    is_nested = any(value.ndim == 5 and value.shape[0] == 1 for value in media.inputs.values())
    return {name: int(is_nested and value.ndim >= 3) for name, value in media.inputs.items()}


def _joined(media: Sequence[Media]) -> Media:
    axes = _axes(media[0])
    inputs = {
        name: np.concatenate([one.inputs[name] for one in media], axis=axis) for name, axis in axes.items()
    }
    count = sum(len(one.positions) for one in media)
    patches = sum(one.num_patches for one in media)
    return Media(media[0].kind, media[0].key, np.arange(count, dtype=np.int32), inputs, patches)


def _parts(media: Sequence[Media], size: int) -> list[list[Media]]:
    """At most `size` pieces and MAX_PATCHES patches each."""
    parts: list[list[Media]] = []
    room = 0
    for one in media:
        if not parts or len(parts[-1]) >= size or one.num_patches > room:
            parts.append([])
            room = MAX_PATCHES
        parts[-1].append(one)
        room -= one.num_patches
    return parts
