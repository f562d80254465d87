"""Where the forwards of drafters read and write, of sequences that have rows; and how their guesses are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from serve.cache.capacity import Place
from serve.cache.spans import Blocks, Span, SpanPart
from serve.engine.drafts import Wanted
from serve.engine.plan import SequenceState
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
    parts = []
    rows = zip(sequences, starts, begins, strict=True)
    for bucket, group in groupby(rows, key=lambda row: place_of(row[0])[0]):
        inside = list(group)
        parts.append(
            SpanPart(
                bucket,
                [place_of(sequence)[1] for sequence, _, _ in inside],
                [start for _, start, _ in inside],
                [begin for _, _, begin in inside],
            )
        )
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
        self._sequences: list[SequenceState] = []
        self._sampler = Sampler([])

    def of(self, sequences: Sequence[SequenceState]) -> Sampler:
        """By which each draws."""
        if len(sequences) != len(self._sequences) or any(
            one is not other for one, other in zip(sequences, self._sequences, strict=True)
        ):
            self._sequences = list(sequences)
            self._sampler = Sampler([sequence.request.sampling for sequence in sequences])
        return self._sampler
