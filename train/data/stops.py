"""Which tokens training teaches to end an answer with: token rows in, stop ids out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serve.errors import RequestError
from serve.model.template import ChatTemplate
from train.data.rules import TokenRules
from train.data.tokens import TokenizedExample
from train.recipe.objectives import OBJECTIVES

PLAIN = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "a"})


def stop_ids(rows: Sequence[TokenizedExample], template: ChatTemplate, rules: TokenRules) -> tuple[int, ...]:
    """Tokens that can end a turn and ended those of the rows, smallest first.

    Where prompts are targets too, or rows are prompts alone, no mask tells where answers end. There it is the token
    that ends a plain answer: if the rows teach it, or, where rows are prompts, in any case.
    """
    if OBJECTIVES[rules.objective].asks:
        return _of_plain_answer(template)
    if not rules.mask_prompt:
        found = set(_of_plain_answer(template))
        return tuple(sorted(i for i in found if any(_teaches(row, i) for row in rows)))
    if rules.train_on_eos == "none":
        return ()
    last_only = rules.train_on_eos == "last"
    ends = {
        end
        for row in rows
        for sequence in row.sequences
        for end in _ends(sequence, rules.max_seq_length, last_only).tolist()
    }
    return tuple(sorted(ends & template.end_ids))


def _ends(row: TokenizedExample, limit: int, last_only: bool) -> np.ndarray:
    """Last tokens of a row's supervised spans, [N] int32. One at the very limit may have been cut, and is none."""
    is_end = row.is_target & ~np.append(row.is_target[1:], False)
    places = np.flatnonzero(is_end)
    if last_only:
        places = places[-1:]
    return row.token_ids[places[places < limit - 1]]


def _teaches(row: TokenizedExample, token_id: int) -> bool:
    return any(bool((s.is_target & (s.token_ids == token_id)).any()) for s in row.sequences)


def _of_plain_answer(template: ChatTemplate) -> tuple[int, ...]:
    if not template.exists:
        return ()
    try:
        (answer,) = template.supervise(PLAIN)
    except (RequestError, ValueError):  # it refuses so short a conversation
        return ()
    (_, stop) = answer.spans[-1]
    last = answer.token_ids[stop - 1]
    return (last,) if last in template.end_ids else ()
