"""Drafters for tests: one that was told what will be said and lies now and then, and gains that always pay."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from serve.engine.drafts import Drafting, Wanted
from serve.engine.gains import Gains
from serve.engine.plan import SequenceState


class Foreteller:
    """Knows answers by request; each guess is wrong with probability `error`, and now and then it has none."""

    def __init__(
        self, answers: Mapping[str, Sequence[int]], rng: random.Random, error: float, size: int
    ) -> None:
        self._answers, self._rng, self._error, self._size = answers, rng, error, size
        self.num_right = 0
        """Guesses that are what was foretold."""
        self.num_asked = 0
        self.forgotten: list[str] = []

    max_bytes = num_bytes = 0

    def propose(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        return [self._guesses(one) for one in wanted]

    def forget(self, sequence: SequenceState) -> None:
        self.forgotten.append(sequence.request.id)

    def clear(self, tenant: str | None) -> None:
        self.forgotten.clear()

    def _guesses(self, wanted: Wanted) -> list[int]:
        sequence, rng = wanted.sequence, self._rng
        self.num_asked += 1
        if rng.random() < 0.2:
            return []
        at = len(sequence.generated)
        told = self._answers.get(sequence.request.id, ())[at : at + rng.randint(1, wanted.most)]
        return [rng.randrange(self._size) if rng.random() < self._error else token for token in told]


class Eager(Gains):
    """Guesses are always wanted, up to so many a row, and all are checked."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def wanted(self, draftings: Sequence[Drafting | None], behind: Sequence[int] = ()) -> int:
        return self._most if any(draftings) else 0

    def width(
        self, draftings: Sequence[Drafting | None], counts: Sequence[int], behind: Sequence[int] = ()
    ) -> int:
        return 1 + max(map(sum, zip(counts, behind or [0] * len(counts), strict=True)))


class Fitful(Eager):
    """The same, but for some steps, in which nobody guesses and rows take in what they have given back."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self._rng = random.Random(0)

    def wanted(self, draftings: Sequence[Drafting | None], behind: Sequence[int] = ()) -> int:
        return super().wanted(draftings, behind) if self._rng.random() < 0.7 else 0
