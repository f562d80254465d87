"""What a configuration or a request says of keys' and values' bits → KvPrecision. One set of rules for both."""

from __future__ import annotations

import math
from typing import Literal

from serve.cache.capacity import MAX_POSITIONS
from serve.cache.precision import MAX_TURBO_BITS, MIN_TURBO_BITS, PLAIN, KvPrecision
from serve.errors import RequestError

KvScheme = Literal["affine", "turbo"]
PLAIN_BITS = 16
"""Says that nothing is quantized, beside a server that does it by default."""


def make_precision(
    kv_bits: float | None,
    kv_value_bits: float | None = None,
    kv_scheme: KvScheme | None = None,
    *,
    group_size: int = 64,
    start_after: int = 0,
    num_plain_layers: int = 0,
) -> KvPrecision:
    """The precision that these words mean; plain with kv_bits None or 16.

    Half a bit means TurboQuant, whose keys then have the bits rounded down and whose values have them rounded up, as
    mlx-vlm has it. RequestError names the field at fault.
    """
    if kv_bits is None or kv_bits == PLAIN_BITS:
        for name, value in (("kv_value_bits", kv_value_bits), ("kv_scheme", kv_scheme)):
            if value is not None:
                raise RequestError(
                    f"{name} is {value}, and kv_bits does not say that anything is quantized", name
                )
        return PLAIN
    scheme = kv_scheme or ("turbo" if kv_bits != math.floor(kv_bits) else "affine")
    key_bits, value_bits = kv_bits, kv_bits
    if scheme == "turbo":
        _check_turbo(kv_bits)
        key_bits, value_bits = math.floor(kv_bits), math.ceil(kv_bits)
    return KvPrecision(
        scheme=scheme,
        key_bits=key_bits,
        value_bits=value_bits if kv_value_bits is None else kv_value_bits,
        group_size=group_size,
        start_after=min(start_after, MAX_POSITIONS),
        num_plain_layers=num_plain_layers,
    )


def _check_turbo(kv_bits: float) -> None:
    if not (MIN_TURBO_BITS <= kv_bits <= MAX_TURBO_BITS and 2 * kv_bits == math.floor(2 * kv_bits)):
        raise RequestError(
            f"kv_bits is {kv_bits}; expected a multiple of 0.5 from {MIN_TURBO_BITS:g} to {MAX_TURBO_BITS:g}, "
            f"or {PLAIN_BITS} for none",
            "kv_bits",
        )
