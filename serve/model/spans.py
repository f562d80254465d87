"""Turns of a conversation as text -> training sequences: token ids, and the spans of them that a loss may use.

A sequence begins with the prompt as served, token for token. Where the joint between prompt and answer would be
tokenized otherwise, or where turns are no beginnings of one text, each turn is a sequence of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from serve.model.words import Encoder

MAX_TAILS, MAX_TAIL_CHARS = 1024, 256
"""Ends of prompts whose tokens are remembered; nearly all prompts of a template share one."""


@dataclass(frozen=True)
class Turn:
    """A turn to learn from, as text: the conversation up to and with it, through its end token."""

    text: str
    rest: str
    """What the template writes after that token."""
    num_prompt: int
    """Characters of it that were there before the turn, as served."""
    spans: tuple[tuple[int, int], ...]
    """What is learned, in characters of `text`; never before `num_prompt`."""
    with_end: bool = True
    """Whether its end token is learned too."""
    variables: Mapping[str, Any] | None = None
    """What the template was told besides what was asked of it, so that prompt and turn agree; None: anything."""

    @property
    def prompt(self) -> str:
        return self.text[: self.num_prompt]

    @property
    def whole(self) -> str:
        return self.text + self.rest


@dataclass(frozen=True)
class Supervised:
    """One training sequence; `spans` are half-open token ranges that loss may use."""

    token_ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template was told besides what was asked of it; serving must tell it the same."""


class SpanWriter:
    """Makes sequences of turns. `is_blank` and `is_end` tell white space and end tokens by their id."""

    def __init__(
        self, reader: Reader, is_blank: Callable[[int], bool], is_end: Callable[[int], bool]
    ) -> None:
        self._reader = reader
        self._is_blank = is_blank
        self._is_end = is_end

    def joint(self, whole: str, turns: Sequence[Turn]) -> Supervised | None:
        """All turns in one sequence, if each prompt, as served, is a prefix of it; otherwise None."""
        if not all(whole.startswith(turn.text) for turn in turns):
            return None
        ids, begins = self._reader.encoder.encode_with_begins(whole)

        def index(num_chars: int) -> int:
            if num_chars == len(whole):
                return len(ids)
            if begins is not None:
                return bisect_left(begins, num_chars)
            return _common(ids, self._reader.encoder.encode(whole[:num_chars]))

        spans: list[tuple[int, int]] = []
        for turn in turns:
            head = self._reader.prompt_length(turn.prompt, ids, begins)
            if head is None:
                return None
            found = [(head if a == turn.num_prompt else index(a), index(b)) for a, b in turn.spans]
            spans += self._trimmed(ids, found, turn.with_end)
        told = next((turn.variables for turn in turns if turn.variables is not None), {})
        return Supervised(ids, tuple(spans), told)

    def alone(self, turn: Turn) -> Supervised:
        """One turn after its prompt as served; what follows the turn is cut off."""
        joint = self.joint(turn.whole, [turn])
        if joint is not None:
            return joint
        ids = self._reader.encoder.encode(turn.prompt)
        spans: list[tuple[int, int]] = []
        end = turn.num_prompt
        for start, stop in turn.spans:
            ids += self._reader.encoder.encode(turn.text[end:start]) if start > end else ()
            begin = len(ids)
            ids += self._reader.encoder.encode(turn.text[start:stop])
            spans.append((begin, len(ids)))
            end = stop
        ids += self._reader.encoder.encode(turn.whole[end:]) if end < len(turn.whole) else ()
        return Supervised(ids, tuple(self._trimmed(ids, spans, turn.with_end)), turn.variables or {})

    def _trimmed(
        self, ids: tuple[int, ...], spans: Sequence[tuple[int, int]], with_end: bool
    ) -> list[tuple[int, int]]:
        """Spans of a turn; the last without white space after its end token, or without that token too."""
        *before, (start, stop) = spans
        while stop > start and self._is_blank(ids[stop - 1]):
            stop -= 1
        if stop > start and not with_end and self._is_end(ids[stop - 1]):
            stop -= 1
        return [*before, (start, stop)]


class Reader:
    """An encoder that remembers the ends of prompts."""

    def __init__(self, encoder: Encoder, cut_ids: Collection[int]) -> None:
        """cut_ids: tokens that are found in a text before anything else, and part it."""
        self.encoder = encoder
        self._cut_ids = cut_ids
        self._tails: dict[str, tuple[int, ...]] = {}

    def prompt_length(self, prompt: str, ids: tuple[int, ...], begins: Sequence[int] | None) -> int | None:
        """Tokens of `prompt` if `ids`, of a text that goes on from it, begin with them; otherwise None.

        A fast tokenizer looks for special tokens before anything else and encodes what is between them piece by
        piece, so only the prompt's tail from its last special token on is encoded: all before it is the same.
        """
        tail = 0
        if begins is not None:
            tail = max(bisect_left(begins, len(prompt)) - 1, 0)
            while tail and ids[tail] not in self._cut_ids:
                tail -= 1
        words = prompt[begins[tail] :] if begins is not None and tail else prompt
        found = self._tail(words)
        return tail + len(found) if ids[tail : tail + len(found)] == found else None

    def _tail(self, words: str) -> tuple[int, ...]:
        found = self._tails.get(words)
        if found is None:
            found = self.encoder.encode(words)
            if len(self._tails) < MAX_TAILS and len(words) <= MAX_TAIL_CHARS:
                self._tails[words] = found
        return found


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
