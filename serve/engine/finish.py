"""When an answer ends, and with which text: stop ids, stop strings, length. One FinishRule a sequence."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from serve.engine.request import FinishReason, Request
from serve.engine.text import TextStream
from serve.engine.thinking import ThoughtStream
from serve.model.token_bytes import TokenBytes


class Step(NamedTuple):
    """What some tokens made of an answer."""

    text: str
    num_tokens: int
    """How many of them belong to it; what follows the end does not."""
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    reasoning: str = ""
    """What they made final of its thoughts."""
    num_thought: int = 0
    """Tokens of thoughts since the answer began."""


class Whole(Protocol):
    """What knows where an answer is whole."""

    @property
    def length(self) -> int | None:
        """So many tokens are the whole answer; None where more may come."""


class FinishRule:
    """Follows one answer. Once it has ended, it is not to be asked again.

    The end tokens of model, adapter and request end it unless `ignore_eos`; a stop string ends it where it appears in
    the text, or at the special token of that name, which no text shows; `max_tokens` ends what nothing else has. The
    tokens of `stop_token_ids` end it in any case. Before `min_tokens` nothing does: no end can be drawn there, and
    stop strings are looked for in what follows. In thoughts no stop string is looked for. An answer that is whole,
    for its grammar lets nothing follow, ends there, whatever else was asked.
    """

    def __init__(self, request: Request, tokens: TokenBytes, eos: Collection[int]) -> None:
        sampling = request.sampling
        assert sampling.max_tokens is not None, "set by Engine.check"
        self._remaining = sampling.max_tokens
        self._num_pushed = 0
        self.whole: Whole | None = None
        """What knows where the answer is whole, if anything does. It hears of tokens before `push` does."""
        self._ends: dict[int, str | int | None] = (
            {} if sampling.ignore_eos else dict.fromkeys((*eos, *request.all_stop_ids))
        )
        self._ends |= {token_id: token_id for token_id in sampling.stop_token_ids}
        for stop in sampling.stop:
            token_id = tokens.special_id(stop)
            if token_id is not None:
                self._ends[token_id] = stop
        follows = request.prompt.token_ids if request.continues_prompt else None
        self._text: TextStream | ThoughtStream = TextStream(tokens, sampling.stop, follows)
        if request.thinking is not None:
            self._text = ThoughtStream(
                request.thinking, tokens, sampling.stop, follows, before=request.thinks_before
            )
        self._num_free = sampling.min_tokens  # tokens to come in whose text no stop string counts

    @property
    def ends(self) -> Collection[int]:
        """Tokens that end it."""
        return self._ends.keys()

    def push(self, token_ids: Sequence[int]) -> Step:
        """The text that these tokens make final, and whether the answer ends among them."""
        step = self._push(token_ids)
        if isinstance(self._text, ThoughtStream):
            return step._replace(reasoning=self._text.take_reasoning(), num_thought=self._text.num_thought)
        return step

    def _push(self, token_ids: Sequence[int]) -> Step:
        text, stream = "", self._text
        for count, token_id in enumerate(token_ids, start=1):
            if self._is_whole():  # its last token was, which nobody knew
                return Step(text + stream.finish(), count - 1, "stop", stream.matched)
            self._num_pushed += 1
            self._remaining -= 1
            if token_id in self._ends:
                text += stream.finish()
                return Step(text, count, "stop", stream.matched or self._ends[token_id])
            text += stream.push(token_id, may_stop=self._num_free <= 0)
            self._num_free -= 1
            is_whole = self._is_whole()
            if self._remaining == 0 or is_whole:
                text += stream.finish()
            if stream.matched is not None or is_whole:
                return Step(text, count, "stop", stream.matched)
            if self._remaining == 0:
                return Step(text, count, "length")
        return Step(text, len(token_ids))

    def _is_whole(self) -> bool:
        return (
            self.whole is not None and self.whole.length is not None and self._num_pushed >= self.whole.length
        )
