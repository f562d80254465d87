"""Ends a row's thoughts where they have had their budget: the tokens of the end mark are due then. No arrays."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from serve.engine.thinking import Thinking, ThoughtTokens
from serve.model.token_bytes import TokenBytes

MAX_RETRACTED = 256
"""Tokens that can be taken back."""


class ThinkingBudget:
    """Follows one answer. A mark that the row has begun itself is gone on with."""

    def __init__(
        self,
        thinking: Thinking,
        tokens: TokenBytes,
        follows: Sequence[int] | None = None,
        *,
        before: bool = False,
    ) -> None:
        """`follows` and `before` as ThoughtTokens takes them."""
        assert thinking.budget is not None, "nothing is to be forced"
        self._budget = thinking.budget
        self._close = thinking.thoughts.close_ids
        self._now = _Moment(ThoughtTokens(thinking, tokens, follows, before=before))
        self._past: deque[_Moment] = deque(maxlen=MAX_RETRACTED)
        self._decide(self._now)

    def push(self, token_ids: Sequence[int]) -> None:
        """They are read."""
        for token_id in token_ids:
            self._past.append(self._now)
            self._now = self._now.after(token_id)
            self._decide(self._now)

    def pop(self, count: int) -> None:
        """As if the last `count` had not come."""
        assert count <= len(self._past), "more than can be taken back"
        for _ in range(count):
            self._now = self._past.pop()

    @property
    def due(self) -> int | None:
        """The token that comes next, where the mark is due."""
        return self._now.due[0] if self._now.due else None

    def _decide(self, now: _Moment) -> None:
        read = now.read
        if now.due or read.state != "reasoning" or read.num_thought + read.num_held < self._budget:
            return
        begun = next(
            count
            for count in range(min(read.num_held, len(self._close) - 1), -1, -1)
            if now.last[len(now.last) - count :] == self._close[:count]
        )
        now.due = self._close[begun:]


class _Moment:
    """An answer's tokens so far, and which are due."""

    def __init__(self, read: ThoughtTokens, last: tuple[int, ...] = ()) -> None:
        self.read = read
        self.last = last
        """As many tokens as are held."""
        self.due: tuple[int, ...] = ()

    def after(self, token_id: int) -> _Moment:
        read = self.read.fork()
        read.push(token_id)
        last = (*self.last, token_id)
        moment = _Moment(read, last[len(last) - read.num_held :])
        if self.due and self.due[0] == token_id:
            moment.due = self.due[1:]
        return moment
