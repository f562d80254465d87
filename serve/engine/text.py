"""Tokens → text, piece by piece, with stop strings. One TextStream a sequence; no arrays, no requests.

A piece is released when it cannot change any more: not while it ends in half a character, and not while it could
be the beginning of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer, TokenizerWrapper
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one growing answer."""

    def __init__(self, tokenizer: TokenizerWrapper, stop: Sequence[str] = ()) -> None:
        self._decoder = _decoder(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.is_stopped = False
        """True once a stop string has appeared; nothing follows it."""

    def push(self, token_id: int) -> str:
        """The text that this token makes final; often a word, sometimes nothing."""
        return self._release(self._decoder.push(token_id))

    def finish(self) -> str:
        """What was held back, when the answer ends for another reason than a stop string."""
        if self.is_stopped:
            return ""
        piece = self._release(self._decoder.finish())
        held, self._held = self._held, ""
        return piece if self.is_stopped else piece + held

    def _release(self, piece: str) -> str:
        text = self._held + piece
        found = min((index for stop in self._stop if (index := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.is_stopped, self._held = True, ""
            return text[:found]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class _FastDecoder:
    """By the tokenizers library: exact for every fast tokenizer, leading spaces included."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        piece = self._stream.step(self._tokenizer, token_id)
        if piece is None:
            self._pending.append(token_id)
            return ""
        self._pending.clear()
        return piece

    def finish(self) -> str:
        return self._tokenizer.decode(self._pending, skip_special_tokens=True) if self._pending else ""


class _SlowDecoder:
    """For tokenizers written in Python."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._detokenizer = NaiveStreamingDetokenizer(tokenizer._tokenizer)

    def push(self, token_id: int) -> str:
        self._detokenizer.add_token(token_id)
        return self._detokenizer.last_segment

    def finish(self) -> str:
        self._detokenizer.finalize()
        return self._detokenizer.last_segment


def _decoder(tokenizer: TokenizerWrapper) -> _FastDecoder | _SlowDecoder:
    backend = getattr(tokenizer._tokenizer, "backend_tokenizer", None)
    return _FastDecoder(backend) if isinstance(backend, Tokenizer) else _SlowDecoder(tokenizer)
