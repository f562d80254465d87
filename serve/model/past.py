"""What a family keeps of a sequence: the caches of mlx-lm and of mlx-vlm, told apart by what they hold.

The two libraries have classes of the same names with the same contracts. Their names are asked for, so that nobody
imports mlx-vlm to load a text model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LIBRARIES = frozenset(("mlx_lm.models.cache", "mlx_vlm.models.cache"))


def _name(cache: Any) -> str:
    """Of the cache's class; "" for a class of somebody else's, or one derived from theirs."""
    return type(cache).__name__ if type(cache).__module__ in LIBRARIES else ""


def is_list(cache: Any) -> bool:
    """Several caches of one layer."""
    return _name(cache) == "CacheList"


def parts_of(cache: Any) -> Sequence[Any]:
    """The caches in a list, or the one."""
    return cache.caches if is_list(cache) else [cache]


def is_full(cache: Any) -> bool:
    """Keys and values of all tokens."""
    return _name(cache) == "KVCache"


def is_window(cache: Any) -> bool:
    """Keys and values of the last tokens, and of no others."""
    return _name(cache) == "RotatingKVCache" and cache.keep == 0


def is_state(cache: Any) -> bool:
    """Arrays of one size at any length."""
    return _name(cache) == "ArraysCache"


def window_of(cache: Any) -> int | None:
    """How many tokens back its keys go; None: to the first."""
    return cache.max_size if is_window(cache) else None
