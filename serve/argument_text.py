"""What was typed, came by a pipe or is a file's name, as text that can be sent."""

from __future__ import annotations

import re
from typing import Any

UNREAD_BYTES = re.compile("[\udc80-\udcff]+")
"""How Python hands on bytes of arguments that its locale cannot read."""
HALF_OF_A_PAIR = re.compile("[\ud800-\udfff]")


def readable(value: Any) -> Any:
    """The same with texts that UTF-8 can say: bytes that the locale could not read are read as UTF-8; where they are
    none, and for other halves of surrogate pairs, stands U+FFFD."""
    if isinstance(value, dict):
        return {readable(name): readable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [readable(inner) for inner in value]
    if not isinstance(value, str) or value.isascii():
        return value
    text = UNREAD_BYTES.sub(
        lambda run: run[0].encode(errors="surrogateescape").decode(errors="replace"), value
    )
    return HALF_OF_A_PAIR.sub("\N{REPLACEMENT CHARACTER}", text)
