"""What a step minimises. A batch goes in; out come a sum over units and what else is worth watching.

An objective says what a unit is: its loss is a mean over the units of a whole accumulated step, whatever way the
step is cut into batches and processes. The loop knows only this page; objectives are files of train/objectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import mlx.core as mx
import numpy as np

from serve.model.network import Network


@dataclass(frozen=True)
class Prepared:
    """A batch as an objective reads it, still on the host.

    inputs       arrays by name; "weights" holds 1 for each unit and 0 for padding
    num_units    sum of the weights
    scaled       inputs that are divided by the units of the whole step
    is_measured  rows are worth measuring even where none of them holds a unit
    """

    inputs: dict[str, np.ndarray]
    num_units: int
    scaled: tuple[str, ...] = ("weights",)
    is_measured: bool = False

    @property
    def runs(self) -> bool:
        """Whether there is anything to compute."""
        return self.num_units > 0 or self.is_measured

    def arrays(self, num_units: int) -> dict[str, mx.array]:
        """On the device, each unit weighing 1 / `num_units`: half floats stay in range, and the sums are means."""
        scaled = {name: self.inputs[name] / np.float32(num_units) for name in self.scaled}
        return {name: mx.array(value) for name, value in {**self.inputs, **scaled}.items()}


class Objective(Protocol):
    """One way to learn from a batch. Holds numbers, no weights."""

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> str:
        """What the loss is a mean over, in one word: target, pair, row."""
        ...

    @property
    def splits_by(self) -> Literal["row", "pair"] | None:
        """What a forward may hold alone: a row; a pair, one row in each half of the batch; None: only the batch."""
        ...

    def prepare(self, batch: Any, *, pad: bool = False) -> Prepared:
        """Host work. `pad` rounds sizes up, so that a compiled step meets few distinct shapes."""
        ...

    def loss(
        self, network: Network, inputs: dict[str, mx.array], *, trains: bool = True
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """(Σ weight · loss over units; measures, each Σ weight · value over units). Scalars, float32.

        trains  a gradient will be taken
        """
        ...

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """What people are shown, from the measures' means over units: quotients of them, or themselves."""
        ...
