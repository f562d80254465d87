"""What the scheduler asks of others: known prefixes, features of pictures, slots of adapters; and what answers it
where there are none. Imports no mlx."""

from __future__ import annotations

from typing import Protocol

from serve.engine.plan import Found, SequenceState


class Prefixes(Protocol):
    """What the scheduler asks of a prefix cache."""

    def find(self, sequence: SequenceState) -> Found | None:
        """The longest prefix of its tokens, but for the last, that a row can be given; kept until released."""

    def release(self, prefix: Found) -> None:
        """A prefix will not be asked for again."""

    def num_known(self, sequence: SequenceState, stop: int) -> int:
        """How many of its first `stop` tokens need no capture."""


class Features(Protocol):
    """What the scheduler asks of what towers have made of pictures."""

    def hold(self, sequence: SequenceState, number: int) -> bool:
        """Whether the features of one of its prompt's media are at hand, or will be when the step in flight has run.

        If so, they are kept for it, and its number is in `sequence.held`.
        """

    def relax(self, sequence: SequenceState) -> None:
        """It has no row now: what can be encoded again need not be kept for it."""


class Adapters(Protocol):
    """What the scheduler asks of the adapters' places on the device."""

    def hold(self, sequence: SequenceState) -> bool:
        """Whether its adapter has a slot, or it needs none. If so, that is kept for it until `let_go`, and
        `sequence.slot` is it. Otherwise it is on its way; it is asked for again after `Scheduler.wake`, or when a
        row has been given up.

        Raises LatheError where it cannot come; the sequence ends with that.
        """

    def let_go(self, sequence: SequenceState) -> None:
        """It has no row now. Called once for each `hold` that was true."""


class NoAdapters:
    """Where all requests are the base's."""

    def hold(self, sequence: SequenceState) -> bool:
        """It needs no slot."""
        assert sequence.request.adapter is None, "nobody is there to give adapters slots"
        sequence.slot = 0
        return True

    def let_go(self, sequence: SequenceState) -> None:
        """Nothing was held."""


class NoFeatures:
    """Where no prompt has media."""

    def hold(self, sequence: SequenceState, number: int) -> bool:
        """Nothing is ever at hand."""
        return False

    def relax(self, sequence: SequenceState) -> None:
        """Nothing is kept."""


class NoPrefixes:
    """A cache that never hits."""

    def find(self, sequence: SequenceState) -> Found | None:
        """Nothing."""
        return None

    def release(self, prefix: Found) -> None:
        """Nothing was found."""

    def num_known(self, sequence: SequenceState, stop: int) -> int:
        """No token is worth keeping."""
        return stop
