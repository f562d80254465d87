"""Which text each token id stands for: as one hash, and in words where two tokenizers differ. What an adapter learned
on one tokenizer means on another, and whose tokens a drafter can guess."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def vocabulary_hash(tokenizer: Any) -> str:
    """`sha256:…` over every token and its id, added ones included. `tokenizer` is mlx_lm's TokenizerWrapper."""
    known: Mapping[str, int] = tokenizer.get_vocab()
    listed = json.dumps(sorted(known.items(), key=lambda item: (item[1], item[0])))
    return f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"


def difference(ours: Any, theirs: Any) -> str:
    """In what two tokenizers' ids differ, in words that follow both their names; "" where they stand for the same."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    moved = sorted(token for token in mine.keys() & other.keys() if mine[token] != other[token])
    parts = [f"{len(moved):,} tokens have other ids ({_first(moved, mine, other)})"] if moved else []
    for lone, where in ((mine.keys() - other.keys(), "first"), (other.keys() - mine.keys(), "second")):
        if lone:
            parts.append(f"{len(lone):,} tokens are only in the {where} ({min(lone)!r})")
    return ", ".join(parts)


def _first(moved: list[str], mine: Mapping[str, int], other: Mapping[str, int]) -> str:
    token = min(moved, key=lambda each: mine[each])
    return f"{token!r} is {mine[token]} and {other[token]}"
