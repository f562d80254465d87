"""What an adapter does to one module of a network: its update, and what that takes in the bank."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Size:
    """What an update takes in the bank."""

    rank: int
    """0 of one that is dense."""
    has_gain: bool
    is_dense: bool = False
    """It is a whole weight's difference."""
    has_bias: bool = False


@dataclass(frozen=True)
class LowRank:
    """The update of one module, float32.

    a     [D, R], of experts [E, D, R]; None: the identity, and b [D, O] is the whole difference of the weight
    b     [R, O], of experts [E, R, O], with the scale folded in
    gain  [O]  DoRA's m / ‖W + s·BA‖ − 1, by which the updated output is lengthened; None: not at all, as where a is
    bias  [O]  added last, whatever the gain; None: nothing, as of experts
    """

    a: mx.array | None
    b: mx.array
    gain: mx.array | None = None
    bias: mx.array | None = None

    @property
    def size(self) -> Size:
        """What it takes in the bank."""
        rank = 0 if self.a is None else self.a.shape[-1]
        return Size(rank, self.gain is not None, self.a is None, self.bias is not None)

    def arrays(self) -> dict[str, mx.array]:
        """What there is, by the name of the tensor that it was made of."""
        b = "lora_b" if self.a is not None else "weight"
        made = {"lora_a": self.a, b: self.b, "m": self.gain, "bias": self.bias}
        return {name: array for name, array in made.items() if array is not None}
