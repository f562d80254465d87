"""In what form a row keeps its keys and values. Plain data: the scheduler, the prefix tree and the API read it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from serve.errors import RequestError

Scheme = Literal["plain", "affine", "turbo"]
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
MIN_TURBO_BITS, MAX_TURBO_BITS = 1.0, 8.0


@dataclass(frozen=True)
class KvPrecision:
    """What full-attention layers store. Sliding windows and recurrent state stay as the model computes them.

    RequestError for what no scheme has.
    """

    scheme: Scheme = "plain"
    key_bits: float = 16
    value_bits: float = 16
    group_size: int = 64
    """Channels that share a scale (affine)."""
    start_after: int = 0
    """A row of at most so many tokens is plain; once it is longer, all of it is quantized."""
    num_plain_layers: int = 0
    """So many of the last full-attention layers stay plain."""

    def __post_init__(self) -> None:
        for name, bits in (("kv_bits", self.key_bits), ("kv_value_bits", self.value_bits)):
            if self.scheme == "affine" and bits not in AFFINE_BITS:
                raise RequestError(f"{name} is {bits}; expected one of {AFFINE_BITS}", name)
            is_turbo = MIN_TURBO_BITS <= bits <= MAX_TURBO_BITS and 2 * bits == round(2 * bits)
            if self.scheme == "turbo" and not is_turbo:
                raise RequestError(f"{name} is {bits}; expected a multiple of 0.5 from 1 to 8", name)
        if self.group_size not in GROUP_SIZES:
            raise RequestError(
                f"kv_group_size is {self.group_size}; expected one of {GROUP_SIZES}", "kv_group_size"
            )
        for name, count in (
            ("kv_quantize_after", self.start_after),
            ("kv_plain_layers", self.num_plain_layers),
        ):
            if count < 0:
                raise RequestError(f"{name} is {count}; expected 0 or more", name)

    @property
    def is_plain(self) -> bool:
        """Nothing is quantized."""
        return self.scheme == "plain"

    @property
    def label(self) -> str:
        """Tells any two precisions apart; part of a prefix's key."""
        if self.is_plain:
            return "plain"
        bits = f"{self.key_bits:g}:{self.value_bits:g}"
        return f"{self.scheme}:{bits}:{self.group_size}:{self.start_after}:{self.num_plain_layers}"

    def at(self, num_tokens: int) -> KvPrecision:
        """What a row of so many tokens is stored in: PLAIN, or this with `start_after` 0."""
        if self.is_plain or num_tokens <= self.start_after:
            return PLAIN
        return self if self.start_after == 0 else replace(self, start_after=0)


PLAIN = KvPrecision()
