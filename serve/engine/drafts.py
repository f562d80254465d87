"""Guesses of what a sequence says next: the interface, and what is kept of one sequence's. No arrays.

A drafter proposes, the forward checks: at each guess the row's own token is drawn from the target's logits, by its
own counter, and the answer goes on as long as that is what was guessed. So the tokens are those of the same row
without a drafter, at any temperature (drafter-invariant speculative decoding: Daliri, Musco and Suresh 2024,
"Coupling without communication"). A drafter that draws its guesses by the same settings, seed and counters
(`Sampler.tokens`) is right far more often than by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import mlx.core as mx

    from serve.adapters.bank.bank import Bank
    from serve.cache.rows import BatchRows
    from serve.engine.plan import Chunk, SequenceState
    from serve.model.network import Network

MAX_DRAFT = 15
"""Guesses of a row that one step checks at most."""
EMPTY_ASKS = 4
MAX_RESTING = 8
NONE = "none"
"""The name of no drafter."""


class Wanted(NamedTuple):
    """Guesses are wanted of what follows a sequence's tokens, all of which are known."""

    sequence: SequenceState
    most: int
    """At most so many tokens, and at least one."""


class Drafter(Protocol):
    """Lives on the thread that owns the arrays, but for what it says of itself."""

    @property
    def max_bytes(self) -> int:
        """Memory that it may come to hold for texts, beside what it holds in the target's rows: no row has that."""

    @property
    def num_bytes(self) -> int:
        """What of that it holds now. From any thread."""

    def propose(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int] | None]:
        """For each, at most `most` tokens that may follow; none where it knows none, for which it may be asked less
        often after a while; None where it is not ready, and is to be asked again. What it raises is logged, and
        nobody has a draft in that step."""

    def forget(self, sequence: SequenceState) -> None:
        """It has ended. Called once for each sequence that this drafter was chosen for, whether or not it was ever
        asked; not for one that has lost its row and will go on."""

    def clear(self, tenant: str | None) -> None:
        """What it remembers of texts of that tenant that have ended, or of everybody's (None), is dropped."""


@runtime_checkable
class Reader(Drafter, Protocol):
    """A drafter that reads the target's states, and keeps layers of its own beside the target's rows."""

    @property
    def taps(self) -> Sequence[int]:
        """Layers of the target whose outputs it is shown; known once bound."""

    def bind(self, network: Network, bank: Bank, rows: BatchRows) -> None:
        """Before any row is in use: it attaches its layers. ModelError where it was made for another target."""

    def observe(
        self, tokens: mx.array, hidden: mx.array, taken: Mapping[int, mx.array], chunks: Sequence[Chunk]
    ) -> Sequence[mx.array]:
        """A forward of the target is built: tokens [B, T], final states [B, T, D], and [B, T, D] of each tap; of a
        chunk that is shorter, what lies behind it is padding. Nothing is computed here: what is written in the rows
        is computed with them, and so is what it returns."""


@dataclass
class Acceptance:
    """How often guesses are right: a share that forgets, of guesses that were reached."""

    num_right: float
    num_reached: float
    """Both as if the last were worth most."""
    memory: float
    """What is left of both after one more draft."""

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.num_right / self.num_reached

    def note(self, num_drafted: int, num_right: int) -> None:
        """Of a draft so many guesses were right, and the next one, if there was one, was wrong."""
        self.num_right = self.num_right * self.memory + num_right
        self.num_reached = self.num_reached * self.memory + min(num_right + 1, num_drafted)


@dataclass(eq=False)
class Drafting:
    """One sequence's drafts."""

    name: str
    """Of the drafter, by which requests choose it."""
    drafter: Drafter
    acceptance: Acceptance
    knowledge: Acceptance
    """How often it knew something when it was asked."""
    num_drafts: int = 0
    num_drafted: int = 0
    num_right: int = 0
    num_empty: int = 0
    """Times in a row that nothing was known."""
    num_resting: int = 0
    """Steps for which it is not asked."""

    def note_asked(self, is_known: bool) -> None:
        """It was asked, and knew something, or nothing: who knows nothing for long is asked every so many steps."""
        self.num_empty = 0 if is_known else self.num_empty + 1
        self.num_resting = min(self.num_empty // EMPTY_ASKS, MAX_RESTING)


@dataclass(frozen=True)
class DraftStats:
    """Drafts of one adapter's rows, or the base's; counters of the engine's life."""

    num_drafts: int = 0
    num_drafted: int = 0
    """Guesses that were checked."""
    num_accepted: int = 0
    """Of those, the right ones that no wrong one preceded."""

    def plus(self, num_drafted: int, num_accepted: int) -> DraftStats:
        """With one more draft."""
        return DraftStats(
            self.num_drafts + 1, self.num_drafted + num_drafted, self.num_accepted + num_accepted
        )
