"""A segment of keys and values without a model: each position's value tells all tokens up to it."""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from serve.cache.precision import PLAIN, KvPrecision
from serve.cache.segment_file import HostArray


def values_of(tokens: Sequence[int]) -> np.ndarray:
    """[len(tokens)] uint32; the i-th depends on tokens [0, i], as a model's keys do."""
    values = np.zeros(len(tokens), np.uint32)
    checksum = 0
    for number, token in enumerate(tokens):
        checksum = zlib.crc32(array("i", [token]).tobytes(), checksum)
        values[number] = checksum
    return values


@dataclass(frozen=True)
class Kept:
    """What `Segment` is to the tree, with numbers for arrays."""

    values: np.ndarray
    precision: KvPrecision = PLAIN
    num_window_tokens: int = 0
    state: int | None = None
    """The last position's value, where the state after it is kept."""
    token_bytes: int = 4

    @property
    def num_tokens(self) -> int:
        return len(self.values)

    @property
    def num_bytes(self) -> int:
        return len(self.values) * self.token_bytes

    @property
    def has_state(self) -> bool:
        return self.state is not None

    def cut(self, at: int) -> tuple[Kept, Kept]:
        assert 0 < at < self.num_tokens
        behind = min(self.num_window_tokens, self.num_tokens - at)
        first = replace(
            self, values=self.values[:at], num_window_tokens=self.num_window_tokens - behind, state=None
        )
        return first, replace(self, values=self.values[at:], num_window_tokens=behind)


class KeptCodec:
    """Its bytes."""

    def dump(self, segment: Kept) -> tuple[dict[str, HostArray], dict[str, str]]:
        arrays = {"values": HostArray("uint32", segment.values.shape, segment.values.tobytes())}
        if segment.state is not None:
            state = np.array([segment.state], np.uint32)
            arrays["state"] = HostArray("uint32", (1,), state.tobytes())
        meta = {"windows": str(segment.num_window_tokens), "token_bytes": str(segment.token_bytes)}
        return arrays, {**meta, "precision": json.dumps(asdict(segment.precision))}

    def load(self, arrays: Mapping[str, HostArray], meta: Mapping[str, str]) -> Kept:
        assert arrays["values"].dtype == "uint32"
        state = np.frombuffer(arrays["state"].data, np.uint32)[0] if "state" in arrays else None
        return Kept(
            np.frombuffer(arrays["values"].data, np.uint32),
            KvPrecision(**json.loads(meta["precision"])),
            int(meta["windows"]),
            None if state is None else int(state),
            int(meta["token_bytes"]),
        )


def kept(
    tokens: Sequence[int],
    start: int = 0,
    stop: int | None = None,
    *,
    has_state: bool = True,
    num_window_tokens: int | None = None,
    **options: object,
) -> Kept:
    """Positions [start, stop) of these tokens."""
    values = values_of(tokens[: len(tokens) if stop is None else stop])
    state = int(values[-1]) if has_state else None
    num_tokens = len(values) - start
    windows = num_tokens if num_window_tokens is None else min(num_window_tokens, num_tokens)
    return Kept(values[start:], state=state, num_window_tokens=windows, **options)
