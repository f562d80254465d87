"""Where the forwards of drafters read and write, of sequences that have rows; and how their guesses are drawn."""

from __future__ import annotations

from collections.abc import Sequence

from serve.cache.capacity import Place
from serve.cache.spans import Blocks, Span, span_parts
from serve.engine.drafts import Wanted
from serve.engine.plan import SequenceState
from serve.engine.request import Sampling
from serve.engine.sampler import Sampler


def span_of(
    sequences: Sequence[SequenceState],
    starts: Sequence[int],
    begins: Sequence[bool],
    num_tokens: int,
    blocks: Sequence[Blocks] | None = None,
) -> Span:
    """`num_tokens` tokens of each, from `starts` on; those of a bucket stand side by side, in the order of rows.

    blocks  of each row, positions that see one another
    """
    parts = span_parts([place_of(sequence) for sequence in sequences], starts, begins)
    return Span(parts, num_tokens, blocks=blocks)


def place_of(sequence: SequenceState) -> Place:
    """Its row."""
    assert sequence.place is not None, "who has no row is asked nothing"
    return sequence.place


def in_rows(wanted: Sequence[Wanted]) -> list[int]:
    """Numbers of those wanted, in the order of their rows."""
    buckets: dict[object, int] = {}
    for one in wanted:
        buckets.setdefault(place_of(one.sequence).bucket, len(buckets))
    keys = [(buckets[place.bucket], place.row) for place in (place_of(one.sequence) for one in wanted)]
    return sorted(range(len(wanted)), key=keys.__getitem__)


class Samplers:
    """The settings of the rows that were asked last: most often the same ones again."""

    def __init__(self) -> None:
        self._settings: list[Sampling] = []  # and not the sequences, which may have ended
        self._sampler = Sampler([])

    def of(self, sequences: Sequence[SequenceState]) -> Sampler:
        """By which each draws."""
        settings = [sequence.request.sampling for sequence in sequences]
        if settings != self._settings:  # the same objects are equal at once
            self._settings, self._sampler = settings, Sampler(settings)
        return self._sampler
