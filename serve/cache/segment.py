"""A stretch of a row outside the batch: its keys and values, layer by layer, and what its end needs to go on.

It knows neither tokens nor rows: the prefix tree holds it by its tokens, rows take it in by `put`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import mlx.core as mx

from serve.cache.precision import KvPrecision

Layers = Mapping[int, tuple[mx.array, ...]]
"""Arrays by number of the layer."""


@dataclass(frozen=True, eq=False)
class Segment:
    """Positions [0, num_tokens) of one stretch. Its arrays are its own: no buffer is kept alive by it.

    full    parts [H, num_tokens, width] of the layers that see everything
    window  parts [H, num_window_tokens, D] of the sliding windows, for the last tokens alone
    state   arrays [...] of the recurrent layers after the last token; empty where they are not known
    """

    precision: KvPrecision
    """PLAIN, or what it is quantized to; with `start_after` 0."""
    num_tokens: int
    full: Layers
    window: Layers
    state: Layers
    num_window_tokens: int
    """So many of the last tokens have their keys in the sliding windows' layers; all where no layer has a window."""
    keeps_state: bool
    """Layers of this family keep recurrent state."""

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(array.nbytes for array in self.arrays().values())

    @property
    def has_window(self) -> bool:
        """A row can go on wherever in this stretch, as far as sliding windows need it."""
        return self.num_window_tokens == self.num_tokens

    @property
    def has_state(self) -> bool:
        """Recurrent state after the last token is there, or none is needed."""
        return bool(self.state) or not self.keeps_state

    def cut(self, at: int) -> tuple[Segment, Segment]:
        """[0, at) and [at, num_tokens). State goes with the second. Both have memory of their own, evaluated."""
        assert 0 < at < self.num_tokens, f"a cut at {at} of {self.num_tokens} tokens"
        behind = min(self.num_window_tokens, self.num_tokens - at)
        before = self.num_window_tokens - behind
        first = replace(
            self,
            num_tokens=at,
            full=_slice(self.full, 0, at),
            window=_slice(self.window, 0, before),
            state={},
            num_window_tokens=before,
        )
        second = replace(
            self,
            num_tokens=self.num_tokens - at,
            full=_slice(self.full, at, self.num_tokens),
            window=_slice(self.window, before, self.num_window_tokens),
            num_window_tokens=behind,
        )
        mx.eval([*first.arrays().values(), *second.arrays().values()])
        return first, second

    def with_window(self, num_tokens: int) -> Segment:
        """The sliding windows' keys of the last `num_tokens` alone: as many as going on from its end needs."""
        kept = min(num_tokens, self.num_window_tokens)
        if kept == self.num_window_tokens or not self.window:
            return self
        window = _slice(self.window, self.num_window_tokens - kept, self.num_window_tokens)
        mx.eval(list(window.values()))
        return replace(self, window=window, num_window_tokens=kept)

    def arrays(self) -> dict[str, mx.array]:
        """All arrays by name: for a file, or to evaluate them."""
        return {
            f"{kind}.{layer}.{index}": array
            for kind, layers in (("full", self.full), ("window", self.window), ("state", self.state))
            for layer, parts in layers.items()
            for index, array in enumerate(parts)
        }

    def meta(self) -> dict[str, str]:
        """What the arrays do not tell, for a file."""
        return {
            "precision": json.dumps(asdict(self.precision)),
            "num_tokens": str(self.num_tokens),
            "num_window_tokens": str(self.num_window_tokens),
            "keeps_state": str(int(self.keeps_state)),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, mx.array], meta: Mapping[str, str]) -> Segment:
        """The segment that gave `arrays` and `meta`. ValueError or LookupError for what never was one."""
        layers: dict[str, dict[int, dict[int, mx.array]]] = {"full": {}, "window": {}, "state": {}}
        for name, array in arrays.items():
            kind, layer, index = name.split(".")
            layers[kind].setdefault(int(layer), {})[int(index)] = array
        full, window, state = (
            {
                layer: tuple(parts[index] for index in range(len(parts)))
                for layer, parts in layers[kind].items()
            }
            for kind in ("full", "window", "state")
        )
        return cls(
            KvPrecision(**json.loads(meta["precision"])),
            int(meta["num_tokens"]),
            full,
            window,
            state,
            int(meta["num_window_tokens"]),
            bool(int(meta["keeps_state"])),
        )


def _slice(layers: Layers, start: int, stop: int) -> Layers:
    """Copies of positions [start, stop)."""
    if stop <= start:
        return {}
    return {
        layer: tuple(mx.contiguous(part[:, start:stop]) for part in parts) for layer, parts in layers.items()
    }


def total_tokens(segments: Sequence[Segment]) -> int:
    """Tokens of segments that follow each other."""
    return sum(segment.num_tokens for segment in segments)
