"""Tokens → text, piece by piece, with stop strings. One TextStream a sequence; no arrays, no requests.

A piece is released when it cannot change any more: not while it ends in half a character, and not while it could
be the beginning of a stop string. Bytes that are no UTF-8 become U+FFFD; no token ever raises.
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Sequence

from serve.model.token_bytes import TokenBytes

MAX_TAIL = 4
"""Tokens of a prompt that can hold the beginning of one character."""


class TextDecoder:
    """The text of tokens in order, as each makes it final.

    follows  the prompt's ids, where the text goes on from them (a completion): the answer's first token keeps its
             space, and completes a character that the prompt began. None: a text of its own (a chat's answer).
    """

    def __init__(self, tokens: TokenBytes, follows: Sequence[int] | None = None) -> None:
        self._tokens = tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_start = follows is None or all(map(tokens.is_silent, follows))
        self._begun = b""
        if follows is not None and not self._is_start:
            self._utf8.decode(b"".join(tokens[token_id] for token_id in follows[-MAX_TAIL:]))
            self._begun, flags = self._utf8.getstate()
            self._utf8.setstate((self._begun, flags))
        self._is_whole = not self._begun  # no character is half there
        self.num_chars = 0
        """Characters that are final."""

    @property
    def is_start(self) -> bool:
        """The next token is the first of its text."""
        return self._is_start

    @property
    def pending(self) -> bytes:
        """Of a character that is not whole."""
        return self._utf8.getstate()[0]

    def bytes_of(self, token_id: int) -> bytes:
        """What `push` of this token would add; the character that a prompt began belongs to the first."""
        own = self._tokens.first(token_id) if self._is_start else self._tokens[token_id]
        return self._begun + own if own else own

    def offset_of(self, token_id: int) -> int:
        """Characters before this token, if it is the next; where it goes on with a character, those before that."""
        pending = self._utf8.getstate()[0]
        own = self._tokens[token_id]
        goes_on = not own or own[0] & 0xC0 == 0x80
        return self.num_chars + (0 if goes_on else len(pending.decode("utf-8", "replace")))

    def push(self, token_id: int) -> str:
        """The text that this token makes final; often a word, sometimes nothing."""
        if self._is_start:
            own = self._tokens.first(token_id)
            self._is_start = self._tokens.is_silent(token_id)
        else:
            own = self._tokens[token_id]
        if self._is_whole and own.isascii():
            text = str(own, "ascii")
        else:
            if own:
                self._begun = b""
            text = self._utf8.decode(own)
            self._is_whole = not self._utf8.getstate()[0]
        self.num_chars += len(text)
        return text

    def finish(self) -> str:
        """U+FFFD, where the text ends inside a character that it began itself."""
        if self._begun:
            return ""
        return self._utf8.decode(b"", final=True)

    def breaks(self, token_id: int) -> bool:
        """Whether this token, if it is the next, leaves a character unfinished."""
        own = self._tokens[token_id]
        return bool(own) and own[0] & 0xC0 != 0x80 and bool(self._utf8.getstate()[0])

    def cut(self) -> str:
        """As `finish`, and other text may follow."""
        text = self.finish()
        self._utf8.reset()
        self._begun, self._is_whole = b"", True
        self.num_chars += len(text)
        return text

    def fork(self) -> TextDecoder:
        """One that goes on from here, and leaves this one as it is."""
        other = copy.copy(self)
        other._utf8 = copy.copy(self._utf8)
        return other


class Stops:
    """Text up to a stop string, which may stand across its pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.matched: str | None = None
        """The stop string that has appeared; nothing follows it."""

    def push(self, piece: str) -> str:
        """What is final with this piece."""
        if not self._stop:
            return piece
        text = self._held + piece
        matches = [(index, stop) for stop in self._stop if (index := text.find(stop)) >= 0]
        if matches:
            # Where two stop strings begin at one index, the longer one says more.
            index, self.matched = min(matches, key=lambda match: (match[0], -len(match[1])))
            self._held = ""
            return text[:index]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """The text of one growing answer, up to a stop string. `follows` as TextDecoder takes it."""

    def __init__(
        self, tokens: TokenBytes, stop: Sequence[str] = (), follows: Sequence[int] | None = None
    ) -> None:
        self._decoder = TextDecoder(tokens, follows)
        self._stops = Stops(stop)

    @property
    def matched(self) -> str | None:
        """The stop string that has appeared; nothing follows it."""
        return self._stops.matched

    @property
    def is_stopped(self) -> bool:
        """True once a stop string has appeared."""
        return self.matched is not None

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """The text that this token makes final; often a word, sometimes nothing.

        may_stop  a stop string may begin in it
        """
        piece = self._decoder.push(token_id)
        return self._stops.push(piece) if may_stop else piece

    def finish(self) -> str:
        """What was held back, when the answer ends for another reason than a stop string."""
        if self.is_stopped:
            return ""
        piece = self._stops.push(self._decoder.finish())
        return piece if self.is_stopped else piece + self._stops.finish()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
