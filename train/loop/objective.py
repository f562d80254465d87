"""What a step minimises. A batch goes in; out come a sum over units and what else is worth watching.

An objective says what a unit is: its loss is a mean over the units of a whole accumulated step, whatever way the
step is cut into batches and processes. The loop knows only this page; objectives are files of train/objectives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import mlx.core as mx
import numpy as np

from serve.model.network import Network
from train.loop.eyes import Eyes


@dataclass(frozen=True)
class Prepared:
    """A batch as an objective reads it, still on the host.

    inputs       arrays by name; "weights" holds 1 for each unit and 0 for padding; "seen", where rows show media, is
                 their array of Standing until `seen_by` has looked
    num_units    sum of the weights
    scaled       inputs that are divided by the units of the whole step
    is_measured  rows are worth measuring even where none of them holds a unit
    """

    inputs: dict[str, Any]
    num_units: int
    scaled: tuple[str, ...] = ("weights",)
    is_measured: bool = False

    @property
    def runs(self) -> bool:
        """Whether there is anything to compute."""
        return self.num_units > 0 or self.is_measured

    @property
    def sees(self) -> bool:
        """Whether any row of a forward shows media."""
        return any(name.endswith(SEEN) for name in self.inputs)

    def arrays(self, num_units: int) -> dict[str, Any]:
        """On the device, each unit weighing 1 / `num_units`: half floats stay in range, and the sums are means."""
        scaled = {name: self.inputs[name] / np.float32(num_units) for name in self.scaled}
        inputs = {**self.inputs, **scaled}
        return {
            name: mx.array(value) if isinstance(value, np.ndarray) else value
            for name, value in inputs.items()
        }

    def seen_by(self, eyes: Eyes | None) -> Prepared:
        """With what each forward sees in place of the media its rows show."""
        inputs = dict(self.inputs)
        for name in (name for name in self.inputs if name.endswith(SEEN)):
            assert eyes is not None, "rows with media need a model with towers"
            shape = self.inputs[name.removesuffix(SEEN) + "tokens"].shape
            inputs[name] = eyes.see(self.inputs[name], shape)
        return replace(self, inputs=inputs)


SEEN = "seen"
"""Key of what the rows of a forward show, among inputs: beside its tokens, under the same prefix as they."""


def seen_input(media: np.ndarray | None, prefix: str = "") -> dict[str, np.ndarray]:
    """A batch's media [B] as an input; nothing where it has none."""
    return {prefix + SEEN: media} if media is not None else {}


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
        self, network: Network, inputs: dict[str, Any], *, trains: bool = True
    ) -> tuple[mx.array, dict[str, mx.array]]:
        """(Σ weight · loss over units; measures, each Σ weight · value over units). Scalars, float32.

        trains  a gradient will be taken
        """
        ...

    def summarize(self, means: dict[str, float]) -> dict[str, float]:
        """What people are shown, from the measures' means over units: quotients of them, or themselves."""
        ...
