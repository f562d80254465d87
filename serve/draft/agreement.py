"""Do two models mean the same by a token's id? A draft model's tokens are checked by the target as they are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from serve.errors import ConfigError
from serve.model.loading import LoadedModel

NUM_SHOWN = 3


def check_agreement(draft: LoadedModel, target: LoadedModel) -> None:
    """ConfigError that says what differs, where the tokenizers are not the same. Heads may be padded otherwise."""
    problems = [*_of_tokens(draft, target), *_of_specials(draft, target)]
    if problems:
        lines = "\n  ".join(problems)
        raise ConfigError(
            f"draft model {draft.name} does not have the tokenizer of {target.name}, so it cannot guess for it:\n"
            f"  {lines}"
        )


def _of_tokens(draft: LoadedModel, target: LoadedModel) -> list[str]:
    ours, theirs = draft.tokenizer.get_vocab(), target.tokenizer.get_vocab()
    if ours == theirs:
        return []
    problems = []
    moved = sorted(token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token])
    if moved:
        shown = ", ".join(
            f"{token!r} is {ours[token]} and not {theirs[token]}" for token in moved[:NUM_SHOWN]
        )
        problems.append(f"{len(moved)} tokens have other ids: {shown}{_more(moved)}")
    for one, other, name in ((ours, theirs, target.name), (theirs, ours, draft.name)):
        absent = sorted(one.keys() - other.keys(), key=one.__getitem__)
        if absent:
            shown = ", ".join(f"{token!r} ({one[token]})" for token in absent[:NUM_SHOWN])
            problems.append(f"{len(absent)} tokens are not {name}'s: {shown}{_more(absent)}")
    return problems


def _of_specials(draft: LoadedModel, target: LoadedModel) -> list[str]:
    ours, theirs = _specials(draft.tokenizer), _specials(target.tokenizer)
    both = ours.keys() & theirs.keys()
    differing = [token_id for token_id in sorted(both) if ours[token_id] != theirs[token_id]]
    return [
        f"token {token_id}, {ours[token_id][0]!r}, is {'' if ours[token_id][1] else 'not '}special, and of "
        f"{target.name} {'is' if theirs[token_id][1] else 'is not'}"
        for token_id in islice(differing, NUM_SHOWN)
        if ours[token_id][0] == theirs[token_id][0]
    ]


def _specials(tokenizer: Any) -> Mapping[int, tuple[str, bool]]:
    """By id, the text of each added token, and whether it is a control token."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {token_id: (token.content, bool(token.special)) for token_id, token in added.items()}


def _more(found: list[str]) -> str:
    return " …" if len(found) > NUM_SHOWN else ""
