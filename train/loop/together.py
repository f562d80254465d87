"""What the trainer tells one process, told to all: the observer of a run with several processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import mlx.optimizers as mlx_optim

from serve.model.network import Network
from train.loop import checkpoint
from train.loop.distributed import Ranks
from train.loop.step import Evaluation
from train.loop.trainer import Nonfinite, Observer, Report, TrainState


class Leader(Observer, Protocol):
    """Rank 0's observer, which also has a console."""

    def say(self, text: str) -> None: ...


class Together:
    """The observer of one process's trainer: rank 0's own is told, and what it does to the run reaches all.

    leader  of rank 0, and None elsewhere
    spread  gives every process rank 0's weights and optimizer state
    """

    def __init__(self, leader: Leader | None, ranks: Ranks, spread: Callable[[], None]) -> None:
        self._leader = leader
        self._ranks = ranks
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

    def say(self, text: str) -> None:
        """Rank 0's alone."""
        if self._leader is not None:
            self._leader.say(text)

    def shared(self, measure: Callable[[int], Mapping[str, float]]) -> Callable[[int], dict[str, float]]:
        """A measure of the weights at a step that rank 0 takes and every process gets."""

        def measured(step: int) -> dict[str, float]:
            own = dict(measure(step)) if self._leader is not None else {}
            first: dict[str, float] = self._ranks.gather(own)[0]
            return first

        return measured


def spread(ranks: Ranks, network: Network, optimizer: mlx_optim.Optimizer) -> None:
    """Give every process rank 0's weights and optimizer state."""
    if ranks.size == 1:
        return
    network.module.update(ranks.first_tree(network.module.trainable_parameters()))
    checkpoint.restore_optimizer(optimizer, ranks.first_tree(checkpoint.flat_state(optimizer)))
