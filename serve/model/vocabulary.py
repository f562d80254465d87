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
    """In what two tokenizers differ, ids or which are special, in words that follow both their names; "": nothing."""
    mine, other = ours.get_vocab(), theirs.get_vocab()
    moved = sorted(token for token in mine.keys() & other.keys() if mine[token] != other[token])
    parts = [f"{len(moved):,} tokens have other ids ({_first(moved, mine, other)})"] if moved else []
    for lone, where in ((mine.keys() - other.keys(), "first"), (other.keys() - mine.keys(), "second")):
        if lone:
            parts.append(f"{len(lone):,} tokens are only in the {where} ({min(lone)!r})")
    return ", ".join([*parts, *_of_specials(ours, theirs)])


def _of_specials(ours: Any, theirs: Any) -> list[str]:
    """The first token that is the same text in both, and control in one alone: words that one never says."""
    mine, other = _specials(ours), _specials(theirs)
    for token_id in sorted(mine.keys() & other.keys()):
        (text, is_special), (same, is_theirs) = mine[token_id], other[token_id]
        if text == same and is_special != is_theirs:
            return [
                f"token {token_id}, {text!r}, is special only in the {'first' if is_special else 'second'}"
            ]
    return []


def _specials(tokenizer: Any) -> dict[int, tuple[str, bool]]:
    """By id, the text of each added token, and whether it is a control token."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {token_id: (token.content, bool(token.special)) for token_id, token in added.items()}


def _first(moved: list[str], mine: Mapping[str, int], other: Mapping[str, int]) -> str:
    token = min(moved, key=lambda each: mine[each])
    return f"{token!r} is {mine[token]} and {other[token]}"
