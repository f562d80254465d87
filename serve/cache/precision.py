"""In what form a row keeps its keys and values. Plain data: the scheduler, the prefix tree and the API read it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from serve.errors import RequestError

Scheme = Literal["plain", "affine", "turbo"]
KvScheme = Literal["affine", "turbo"]
"""What a configuration or a request may ask for; plain is 16 bits."""
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_BYTES = 2
"""Scales and norms are stored in half precision, whatever the model computes in."""
MIN_TURBO_BITS, MAX_TURBO_BITS = 1.0, 8.0
LONGEST = 2**31 - 1
"""No row is longer: who waits for more tokens than that never quantizes."""


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
            if self.scheme == "turbo":
                _check_turbo_bits(name, bits)
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


def precision(
    kv_bits: float | None,
    *,
    value_bits: float | None = None,
    scheme: KvScheme | None = None,
    group_size: int = 64,
    start_after: int = 0,
    num_plain_layers: int = 0,
) -> KvPrecision:
    """The form that a configuration or a request names: None or 16 bits are plain, whole bits affine, halves turbo.

    Turbo bits stand for keys and values together, as mlx-vlm takes them: 3.5 is 3 for keys and 4 for values.
    `value_bits` changes the values' bits, `scheme` makes whole bits turbo. RequestError names the field at fault.
    """
    if kv_bits is None or kv_bits == PLAIN.key_bits:
        for name, value in (("kv_value_bits", value_bits), ("kv_scheme", scheme)):
            if value is not None:
                raise RequestError(
                    f"{name} is {value}, and kv_bits does not say that anything is quantized", name
                )
        return PLAIN
    scheme = scheme or ("turbo" if kv_bits != math.floor(kv_bits) else "affine")
    key_bits, whole_bits = kv_bits, kv_bits
    if scheme == "turbo":
        _check_turbo_bits("kv_bits", kv_bits)
        key_bits, whole_bits = math.floor(kv_bits), math.ceil(kv_bits)
    return KvPrecision(
        scheme,
        key_bits,
        whole_bits if value_bits is None else value_bits,
        group_size=group_size,
        start_after=min(start_after, LONGEST),
        num_plain_layers=num_plain_layers,
    )


def _check_turbo_bits(name: str, bits: float) -> None:
    if not (MIN_TURBO_BITS <= bits <= MAX_TURBO_BITS and 2 * bits == math.floor(2 * bits)):
        raise RequestError(f"{name} is {bits}; expected a multiple of 0.5 from 1 to 8", name)


def stored_bytes(precision: KvPrecision, bits: float, dim: int, itemsize: int) -> int:
    """Bytes of one vector of `dim` numbers, `itemsize` bytes each as computed: one head's keys of one position."""
    if precision.is_plain:
        return dim * itemsize
    if precision.scheme == "affine":
        return dim * int(bits) // 8 + 2 * min(itemsize, SCALE_BYTES) * (dim // precision.group_size)
    return sum(4 * -(-size * width // 32) + SCALE_BYTES for width, size in turbo_split(bits, dim))


def turbo_split(bits: float, dim: int) -> list[tuple[int, int]]:
    """(bits, channels) of each part of a vector: one where the bits are whole, else the many and the outliers."""
    low, high = math.floor(bits), math.ceil(bits)
    if low == high:
        return [(low, dim)]
    num_high = max(1, min(dim - 1, round((bits - low) * dim)))
    return [(low, dim - num_high), (high, num_high)]
