"""What changes a row's logits before a token is drawn from them: the interface, and who makes it. No arrays of MLX.

An edit belongs to one sequence. It is told the answer's tokens in order, each once, and says what the logits of the
next one are changed by. Who has none costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, Protocol

import numpy as np

from serve.engine.penalties import Penalties, TokenChanges
from serve.engine.request import Request
from serve.engine.thinking_budget import ThinkingBudget
from serve.model.token_bytes import TokenBytes


class LogitsChange(NamedTuple):
    """What one row's logits become, in the order of the fields. Its arrays are the edit's, until it is told more."""

    tokens: TokenChanges | None = None
    """Some tokens', each with its own numbers: penalties and biases."""
    allowed: np.ndarray | None = None
    """[ceil(V / 32)] uint32; token t may come if bit t % 32 of word t // 32 is set, as llguidance packs it."""
    forced: int | None = None
    """This token and no other, whatever its logit; not while others do not allow it, as in the midst of a character's
    bytes."""

    def allows(self, token_id: int) -> bool:
        """Whether that token may come."""
        if self.forced is not None:
            return token_id == self.forced
        return self.allowed is None or bool(self.allowed[token_id // 32] >> np.uint32(token_id % 32) & 1)

    def copy(self) -> LogitsChange:
        """One that stays what it is when the edit is told more."""
        tokens = None if self.tokens is None else TokenChanges(*(part.copy() for part in self.tokens))
        return LogitsChange(tokens, None if self.allowed is None else self.allowed.copy(), self.forced)

    def then(self, other: LogitsChange) -> LogitsChange:
        """Both: what either does not allow does not come. One of them changes tokens at most, and one forces."""
        assert self.tokens is None or other.tokens is None, "two edits of tokens' logits"
        masks = [mask for mask in (self.allowed, other.allowed) if mask is not None]
        both = LogitsChange(
            other.tokens if self.tokens is None else self.tokens,
            reduce(np.bitwise_and, masks) if masks else None,
        )
        forced = other.forced if self.forced is None else self.forced
        return both._replace(forced=forced) if forced is None or both.allows(forced) else both


class LogitsEdit(Protocol):
    """What one sequence's logits are changed by. Whatever it raises ends that sequence alone, by that error.

    With a draft, it is told of each guessed token in turn and asked between them, and what was not accepted is taken
    back.
    """

    def advance(self, token_ids: Sequence[int]) -> None:
        """The answer goes on by these tokens. The last may be one that ends it; nobody is asked for what follows.
        Where it raises, it has heard none of them."""

    def retract(self, count: int) -> None:
        """The last `count` tokens that it was told of are not the answer's."""

    def change(self) -> LogitsChange | None:
        """What the logits of the next token are changed by; None: they stay. Asking changes nothing."""


@dataclass(frozen=True)
class Edits:
    """Several edits of one sequence, in this order."""

    parts: tuple[LogitsEdit, ...]

    def advance(self, token_ids: Sequence[int]) -> None:
        """All are told, or none."""
        for number, part in enumerate(self.parts):
            try:
                part.advance(token_ids)
            except Exception:
                for told in self.parts[:number]:
                    told.retract(len(token_ids))
                raise

    def retract(self, count: int) -> None:
        """All take it back."""
        for part in self.parts:
            part.retract(count)

    def change(self) -> LogitsChange | None:
        """What all of them do."""
        changes = [change for part in self.parts if (change := part.change()) is not None]
        return reduce(LogitsChange.then, changes) if changes else None


class PenaltyEdit:
    """Penalties, biases and the ban on ends before `min_tokens`."""

    def __init__(self, penalties: Penalties) -> None:
        self._penalties = penalties

    def advance(self, token_ids: Sequence[int]) -> None:
        """They are counted."""
        self._penalties.push(token_ids)

    def retract(self, count: int) -> None:
        """They are counted no more."""
        self._penalties.pop(count)

    def change(self) -> LogitsChange | None:
        """Of tokens that have come or are named."""
        changes = self._penalties.changes()
        return None if changes is None else LogitsChange(tokens=changes)


class ThinkingEdit:
    """The end of a thought that has had its budget."""

    def __init__(self, budget: ThinkingBudget) -> None:
        self._budget = budget

    def advance(self, token_ids: Sequence[int]) -> None:
        """They are counted."""
        self._budget.push(token_ids)

    def retract(self, count: int) -> None:
        """They are counted no more."""
        self._budget.pop(count)

    def change(self) -> LogitsChange | None:
        """The next token of the mark, once it is due."""
        due = self._budget.due
        return None if due is None else LogitsChange(forced=due)


def parts_of(edit: LogitsEdit | None) -> tuple[LogitsEdit, ...]:
    """The several edits that one is."""
    return edit.parts if isinstance(edit, Edits) else () if edit is None else (edit,)


def make_edit(
    request: Request, ends: Collection[int], tokens: TokenBytes, *others: LogitsEdit
) -> LogitsEdit | None:
    """What a request asks for; None where it leaves the logits alone.

    ends    tokens that would end its answer
    others  what comes after its penalties
    """
    parts: list[LogitsEdit] = []
    if Penalties.are_wanted(request.sampling):
        parts.append(PenaltyEdit(Penalties(request.sampling, request.prompt, ends)))
    thinking = request.thinking
    if thinking is not None and thinking.budget is not None:
        follows = request.prompt.token_ids if request.continues_prompt else None
        before = request.thinks_before
        parts.append(ThinkingEdit(ThinkingBudget(thinking, tokens, follows, before=before)))
    parts += others
    return None if not parts else parts[0] if len(parts) == 1 else Edits(tuple(parts))
