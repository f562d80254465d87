"""What the trainer tells one process, told to all: the observer of a run with several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from train.loop.distributed import Ranks
from train.loop.trainer import Evaluation, Nonfinite, Observer, Report, TrainState


class Together:
    """The observer of one process's trainer: rank 0's own is told, and what it does to the run reaches all.

    leader   of rank 0, and None elsewhere
    measure  step → measures of the weights, taken by rank 0
    spread   gives every process rank 0's weights and optimizer state
    """

    def __init__(
        self,
        leader: Observer | None,
        ranks: Ranks,
        measure: Callable[[int], Mapping[str, float]],
        spread: Callable[[], None],
    ) -> None:
        self._leader = leader
        self._ranks = ranks
        self._measure = measure
        self._spread = spread

    def on_report(self, report: Report) -> None:
        """Rank 0's alone."""
        if self._leader is not None:
            self._leader.on_report(report)

    def on_eval(self, step: int, evaluation: Evaluation, is_best: bool, seconds: float) -> None:
        """Rank 0's alone."""
        if self._leader is not None:
            self._leader.on_eval(step, evaluation, is_best, seconds)

    def on_nonfinite(self, event: Nonfinite) -> None:
        """Rank 0's alone."""
        if self._leader is not None:
            self._leader.on_nonfinite(event)

    def on_save(self, state: TrainState) -> None:
        """Nobody goes on before the checkpoint is whole."""
        if self._leader is not None:
            self._leader.on_save(state)
        self._ranks.gather_numbers([state.step])

    def on_rollback(self) -> None:
        """Rank 0 reads the checkpoint; all have it afterwards."""
        if self._leader is not None:
            self._leader.on_rollback()
        self._spread()

    def measure(self, step: int) -> dict[str, float]:
        """Rank 0's measures, in every process."""
        mine = self._measure(step) if self._leader is not None else {}
        found: dict[str, float] = self._ranks.gather(dict(mine))[0]
        return found
